"""README's table has what the results files have, and says so where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amk.dev.generate import GENERATED
from amk.dev.readme_table import BEGIN, END, NOTHING, table, with_table
from amk.tests.dev.results_file import results, row

README = f"before\n{BEGIN}\n{END}\nafter\n"


def folder(tmp_path: Path, **files: dict[str, Any]) -> Path:
    for name, data in files.items():
        (tmp_path / f"{name.replace('_', '-')}.json").write_text(json.dumps(data), encoding="utf-8")
    return tmp_path


def test_without_a_results_file_nothing_is_measured_yet(tmp_path: Path) -> None:
    other = folder(tmp_path, gpu_tests={"tests": {}}, soundness={})
    assert table(other) == NOTHING
    assert table(tmp_path / "nowhere") == NOTHING


def test_a_table_names_where_its_figures_come_from(tmp_path: Path) -> None:
    origin = table(folder(tmp_path, bench_h200=results(row()))).splitlines()[0]
    facts = ("results/bench-h200.json", "NVIDIA H200", "580.1", "1980 MHz", "3201 MHz", "4561 to 4571", "`0123456789ab` with", "3 fresh")
    assert [fact for fact in facts if fact not in origin] == []


def test_a_line_has_time_share_and_ratio_to_each_baseline(tmp_path: Path) -> None:
    lines = table(folder(tmp_path, bench_h200=results(row(16), row(128, 750.0, spread_pct=1.25), row(64, config="unroll=8"))))
    assert "| llama-3.2-1b-shape | 16 | 600.0 | 90.0 % | 2400.0 (4.00x) | failed |" in lines
    assert "| llama-3.2-1b-shape | 128 | 750.0 (spread 1.2 %) | 72.0 % | 3000.0 (4.00x) | failed |" in lines
    assert "| 64 |" not in lines


def test_lines_of_a_run_without_baselines_say_not_measured(tmp_path: Path) -> None:
    old = {key: value for key, value in row().items() if key != "baselines"}
    assert "| 600.0 | 90.0 % | not measured | not measured |" in table(folder(tmp_path, bench_h200=results(old)))


def test_every_results_file_has_a_table(tmp_path: Path) -> None:
    text = table(folder(tmp_path, bench_h200=results(row(16)), bench_b200=results(row(128))))
    assert text.index("bench-b200.json") < text.index("bench-h200.json")
    assert text.count("| model |") == 2


def test_a_readme_that_is_not_what_the_results_give_is_outdated() -> None:
    once = with_table(README, "one")
    assert once == f"before\n{BEGIN}\none\n{END}\nafter\n"
    assert with_table(once, "one") == once != with_table(once, "two")
    assert "README.md" in GENERATED


@pytest.mark.parametrize("broken", ["no markers", f"{BEGIN} only", f"{END} {BEGIN}", README + README])
def test_a_readme_without_its_markers_is_an_error(broken: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        with_table(broken, "one")
