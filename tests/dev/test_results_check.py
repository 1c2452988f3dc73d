"""The rules of honesty hold of results files: each way to break one is found before a figure is shown."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from amk.dev.knob_page import page
from amk.dev.readme_table import table
from amk.dev.results_check import honest_chains, honest_rows
from amk.tests.dev.results_file import CHAIN, FLOOR, baseline, effect, effects, results, row
from amk.tests.dev.test_readme_table import folder

NAME = "bench-h200.json"
Break = Callable[[dict[str, Any]], Any]

BROKEN: dict[str, tuple[Break, str]] = {
    "no correctness": (lambda d: d["latency"][0].pop("correct"), "needs correct"),
    "an incorrect program": (lambda d: d["latency"][0].update(correct=False), "correctness pass"),
    "a failed tolerance": (lambda d: d["latency"][0].update(tolerance_used=1.0), "correctness pass"),
    "a tolerance that is no number": (lambda d: d["latency"][0].update(tolerance_used=float("nan")), "correctness pass"),
    "no program": (lambda d: d["latency"][0].update(program_digest=""), "needs program_digest"),
    "no raw samples": (lambda d: d["latency"][0].update(samples_us=[]), "needs samples_us"),
    "samples of another time": (lambda d: d["latency"][0].update(samples_us=[700.0] * 3), "median of its samples"),
    "under the floor": (lambda d: d["latency"].append(row(latency_us=FLOOR - 1)), "under the floor"),
    "a floor of another bandwidth": (lambda d: d["latency"][0].update(floor_us=500.0, pct_of_roofline=50000 / 600), "plain read"),
    "a share of another floor": (lambda d: d["latency"][0].update(pct_of_roofline=99.0), "floor over latency"),
    "a baseline under the floor": (lambda d: d["latency"][0].update(baselines=[baseline("a", 500.0, 500 / 600)]), "under the floor"),
    "a ratio to another time": (lambda d: d["latency"][0]["baselines"][0].update(ratio=5.0), "its time over ours"),
    "a time of a refused baseline": (lambda d: d["latency"][0]["baselines"][0].update(status="refused"), "has no time"),
    "no commit": (lambda d: d["provenance"].update(commit="unknown"), "commit"),
    "no card": (lambda d: d["provenance"].update(cards=[]), "card"),
    "another card than the file's": (lambda d: d["provenance"]["cards"][0].update(name="NVIDIA B200"), "named after"),
    "another card than the one measured": (lambda d: d.update(device_name="NVIDIA B200"), "measured on"),
    "two kinds of card": (lambda d: d["provenance"]["cards"].append(d["provenance"]["cards"][0] | {"name": "NVIDIA B200"}), "kind of"),
    "no plain read": (lambda d: d.update(plain_read_gbs=[]), "plain read"),
    "a slow card": (lambda d: d["plain_read_gbs"].append(2000.0), "must reach"),
    "fewer processes than it says": (lambda d: d["latency"][0].update(process_medians_us=[600.0] * 2), "processes"),
}  # fmt: skip


def test_an_honest_file_is_shown() -> None:
    data = results(row(), row(128, 700.0))
    assert honest_rows(NAME, data, "latency") == data["latency"]


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_breaks_a_rule_is_not_shown(name: str, tmp_path: Path) -> None:
    breaks, words = BROKEN[name]
    data = deepcopy(results(row()))
    breaks(data)
    with pytest.raises(ValueError, match=words):
        honest_rows(NAME, data, "latency")
    with pytest.raises(ValueError, match="bench-h200.json"):
        table(folder(tmp_path, bench_h200=data))


def test_a_line_without_a_latency_claims_nothing() -> None:
    refused = effect("kernel_knobs.sync", '"tags"', correct=False, reason="wrong") | {"latency_us": None}
    assert honest_rows("knob-effects-h200.json", effects(refused), "rows") == [refused]


def test_an_effect_of_a_wrong_program_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="correctness pass"):
        page(folder(tmp_path, knob_effects_h200=effects(effect("kernel_knobs.sync", '"tags"', correct=False))))


@pytest.mark.parametrize("change", [{"latency_us": 300.0}, {"is": ""}, {"macros": {}}, {"chain_us": 299.0}, {"pct_of_roofline": 120.0}])
def test_the_chain_alone_never_passes_for_a_latency(change: dict[str, Any]) -> None:
    assert honest_chains(NAME, {"chain": [CHAIN]}) == [CHAIN]
    with pytest.raises(ValueError, match="chain"):
        honest_chains(NAME, {"chain": [CHAIN | change]})
