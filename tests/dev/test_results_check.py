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
    "few raw samples": (lambda d: d["latency"][0].update(samples_us=[600.0] * 4), "at least 5 samples"),
    "baselines of quantised weights": (lambda d: d["latency"][0].update(model="llama-3.2-1b-shape@int8"), "16 bits"),
    "samples of another time": (lambda d: d["latency"][0].update(samples_us=[700.0] * 5), "median of its samples"),
    "under the floor": (lambda d: d["latency"].append(row(latency_us=FLOOR - 1)), "under the floor"),
    "a floor of another bandwidth": (lambda d: d["latency"][0].update(floor_us=500.0, pct_of_roofline=50000 / 600), "plain read"),
    "a floor too high": (lambda d: d["latency"][0].update(floor_us=560.0, pct_of_roofline=56000 / 600), "plain read"),
    "a share of another floor": (lambda d: d["latency"][0].update(pct_of_roofline=99.0), "floor over latency"),
    "a baseline under the floor": (lambda d: d["latency"][0].update(baselines=[baseline("a", 500.0, 500 / 600)]), "under the floor"),
    "a ratio to another time": (lambda d: d["latency"][0]["baselines"][0].update(ratio=5.0), "its time over ours"),
    "a time of a refused baseline": (lambda d: d["latency"][0]["baselines"][0].update(status="refused"), "has no time"),
    "no commit": (lambda d: d["provenance"].update(commit="unknown"), "commit"),
    "changes to no commit": (lambda d: d["provenance"].update(commit="unknown+changes"), "commit"),
    "no card": (lambda d: d["provenance"].update(cards=[]), "card"),
    "another card than the file's": (lambda d: d["provenance"]["cards"][0].update(name="NVIDIA B200"), "named after"),
    "another card than the one measured": (lambda d: d.update(device_name="NVIDIA B200"), "measured on"),
    "two kinds of card": (lambda d: d["provenance"]["cards"].append(d["provenance"]["cards"][0] | {"name": "NVIDIA B200"}), "kind of"),
    "no plain read": (lambda d: d.update(plain_read_gbs=[]), "plain read"),
    "a slow card": (lambda d: d["plain_read_gbs"].append(2000.0), "must reach"),
    "fewer processes than it says": (lambda d: d["latency"][0].update(process_medians_us=[600.0] * 2), "processes"),
    "one process of three": (lambda d: d["latency"][0].update(process_medians_us=[600.0]), "processes"),
    "samples that the latency is not among": (
        lambda d: d.update(latency=[row(latency_us=650.0, samples_us=[600.0] * 5, process_medians_us=[650.0] * 3)]), "lie among",
    ),
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


def l4(name: str) -> dict[str, Any]:
    data = results(row())
    data["provenance"]["cards"][0]["name"] = data["device_name"] = "NVIDIA L4"
    data["plain_read_gbs"] = [280.0, 281.0]
    line = data["latency"][0]
    line.update(floor_us=line["streamed_bytes"] / 281e3, latency_us=9000.0, samples_us=[9000.0] * 5, baselines=[])
    line["pct_of_roofline"] = 100 * line["floor_us"] / 9000
    return {name: data}


def test_a_card_whose_name_begins_with_another_ones_is_told_apart(tmp_path: Path) -> None:
    assert "NVIDIA L4" in table(folder(tmp_path, **l4("bench_l4")))
    with pytest.raises(ValueError, match="named after"):
        table(folder(tmp_path, **l4("bench_l40s")))


def test_a_card_of_no_table_is_shown_as_itself(tmp_path: Path) -> None:
    data = l4("x")["x"]
    data["provenance"]["cards"][0]["name"] = data["device_name"] = "NVIDIA GeForce RTX 4090"
    assert "RTX 4090" in table(folder(tmp_path, bench_auto=data))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"beyond_noise": True}, "beyond the noise"),
        ({"effect_pct": 3.0}, "medians differ"),
        ({"default_us": 590.0}, "median of its copies"),
        ({"copies_samples_us": [[600.0] * 5] * 3}, "beyond the noise"),
    ],
    ids=["no effect", "another effect", "another default", "less noise"],
)
def test_an_effect_is_what_the_samples_say(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    data = effects(effect("kernel_knobs.sync", '"tags"', 602.0))
    assert "602.0 us" in page(folder(tmp_path, knob_effects_h200=data))
    with pytest.raises(ValueError, match=words):
        page(folder(tmp_path, knob_effects_h200=effects(effect("kernel_knobs.sync", '"tags"', 602.0) | change)))


def test_an_effect_of_a_wrong_program_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="correctness pass"):
        page(folder(tmp_path, knob_effects_h200=effects(effect("kernel_knobs.sync", '"tags"', correct=False))))


@pytest.mark.parametrize("change", [{"latency_us": 300.0}, {"is": ""}, {"macros": {}}, {"chain_us": 299.0}, {"pct_of_roofline": 120.0}])
def test_the_chain_alone_never_passes_for_a_latency(change: dict[str, Any]) -> None:
    assert honest_chains(NAME, {"chain": [CHAIN]}) == [CHAIN]
    with pytest.raises(ValueError, match="chain"):
        honest_chains(NAME, {"chain": [CHAIN | change]})
