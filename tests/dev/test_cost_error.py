"""The cost model beside measurements: what a prediction is compared with, and on the committed results, how good it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amk.dev.cost_error import RESULTS, default_files, lines
from amk.schedule.config import config_dict
from amk.schedule.cost import error_report
from amk.schedule.knobs import Config

FLOOR = {"streamed_bytes": 46 * 10**6, "floor_us": 10.0}  # 4,600 GB/s


def test_each_line_is_predicted_at_the_bandwidth_of_its_own_floor(tmp_path: Path) -> None:
    """A file of parts has lines of cards that do not read equally fast."""
    row = {"model": "llama-3.2-1b-shape", "config": "default", "effective": config_dict(Config()), "position": 16, "latency_us": 50.0}
    slow = row | FLOOR | {"floor_us": 11.0}
    file = tmp_path / "knob-effects-h200.json"
    file.write_text(json.dumps({"plain_read_gbs": [4600.0, 4182.0], "rows": [row | FLOOR, slow]}), encoding="utf-8")
    (_, at_4600), (_, at_4182) = lines([file])
    assert at_4182 == pytest.approx(1.1 * at_4600, rel=0.02)


def test_each_line_is_predicted_at_its_own_position_and_config(tmp_path: Path) -> None:
    few = config_dict(Config()) | {"fusion_grouping": []}
    rows = [
        {"model": "small", "config": name, "effective": config, "position": position, "latency_us": 50.0, **FLOOR}
        for name, config, position in [("default", config_dict(Config()), 16), ("default", config_dict(Config()), 500), ("apart", few, 16)]
    ]
    file = tmp_path / "bench-h200.json"
    file.write_text(json.dumps({"plain_read_gbs": [4600.0], "latency": rows[:2], "knobs": rows[2:]}), encoding="utf-8")
    early, late, apart = (guess for _, guess in lines([file]))
    assert 0 < early <= late < apart


def test_steps_of_batches_are_not_compared_with_predictions_of_a_token(tmp_path: Path) -> None:
    row = {"model": "small", "config": "default", "effective": config_dict(Config()), "position": 16, "latency_us": 50.0, **FLOOR}
    file = tmp_path / "knob-effects-h200.json"
    file.write_text(json.dumps({"plain_read_gbs": [4600.0], "rows": [row | {"batch": 8}, row | {"batch": 1}, row]}), encoding="utf-8")
    assert [found.get("batch", 1) for found, _ in lines([file])] == [1, 1]


def test_the_published_latencies_are_predicted_within_15_percent(tmp_path: Path) -> None:
    """The default configs only: a change of the constants that loses what was measured is noticed here."""
    pairs = []
    for published in sorted(RESULTS.glob("bench-*.json")):
        file = tmp_path / published.name
        file.write_text(json.dumps(json.loads(published.read_text(encoding="utf-8")) | {"knobs": []}), encoding="utf-8")
        pairs += [(guess, row["latency_us"]) for row, guess in lines([file])]
    report = error_report(pairs)
    assert report.points >= 8 and report.worst_pct <= 15 and report.rank == pytest.approx(1.0, abs=0.05)


def test_the_error_that_the_page_names_is_that_of_the_published_figures() -> None:
    pairs = [(guess, row["latency_us"]) for row, guess in lines(default_files())]
    report = error_report(pairs)
    page = (RESULTS.parent / "HARNESS.md").read_text(encoding="utf-8")
    assert f"{report.points} points of an H200, mean error {report.mean_abs_pct:.1f} %" in page
