"""Timings are written down with where they come from."""

from __future__ import annotations

import json
from pathlib import Path

from amk.dev.provenance import write_results
from amk.dev.timings import timed


def test_a_timed_command_reports_its_exit_code_and_its_memory(tmp_path: Path) -> None:
    run = timed(("-c", "data = bytearray(64 << 20); raise SystemExit(3)"), tmp_path)
    assert run["exit_code"] == 3
    assert run["peak_mb"] > 64
    assert run["seconds"] > 0


def test_results_stand_under_their_provenance(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.json"
    write_results(path, {"samples_us": [1.5, 2.5]})
    written = json.loads(path.read_text(encoding="utf-8"))
    assert written["samples_us"] == [1.5, 2.5]
    assert set(written["provenance"]) == {"commit", "time_utc", "machine", "cores", "python", "cards"}
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]
