"""The page of knob effects says where each knob has one beyond the noise, and what was not measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from amk.dev.knob_effects import SUBJECTS, other_values, share, shown
from amk.dev.knob_page import NOTHING, RESULTS, Row, page
from amk.dev.results_check import honest_rows
from amk.schedule.config import parse_config, with_value
from amk.schedule.knobs import KNOBS, Config
from amk.tests.dev.results_file import READS, effect, effects
from amk.tests.dev.test_readme_table import folder

NONE = "| not measured "
OTHERS = NONE * (len(SUBJECTS) - 1) + "|"  # of a page with lines of the first model alone


def line_of(text: str, knob: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| `{knob}` |"))


def test_without_a_results_file_nothing_is_measured_yet(tmp_path: Path) -> None:
    assert NOTHING in page(tmp_path)


def test_the_largest_effect_beyond_the_noise_is_named_with_its_model_and_position(tmp_path: Path) -> None:
    rows = [effect("kernel_knobs.sync", '"tags"', 630.0), effect("tiling.attention.kv_block", "16", 602.0)]
    rows += [effect("tiling.attention.kv_block", value, latency, position=1024) for value, latency in (("16", 540.8), ("64", 620.0))]
    text = page(folder(tmp_path, knob_effects_h200=effects(*rows)))
    assert line_of(text, "kernel_knobs.sync").endswith(f'| `"tags"`: 630.0 us, **1.050** ± 0.005 of 600.0 {OTHERS}')
    assert f"| `16`: 540.8 us at 1024, **0.901** ± 0.005 of 600.0 {OTHERS}" in line_of(text, "tiling.attention.kv_block")
    assert f"| 602.0 us, 1.003 ± 0.005 of 600.0; 540.8 us at 1024, **0.901** ± 0.005 of 600.0 {OTHERS}" in text
    assert line_of(text, "kernel_knobs.poll_sleep_ns").endswith(f"{NONE}{OTHERS}")


def test_each_model_has_a_column_with_ratios_to_its_own_default(tmp_path: Path) -> None:
    half = {"default_us": 300.0, "copies_samples_us": [[300.0] * 5] * 2, "streamed_bytes": 10**9}
    small = half | {"model": "smollm2-135m-shape", "floor_us": 10**9 / READS[1] * 1e-3, "effect_pct": 110.0, "pct_of_roofline": None}
    del small["pct_of_roofline"]
    rows = [effect("kernel_knobs.sync", '"tags"', 630.0), effect("kernel_knobs.sync", '"tags"', 630.0, **small)]
    rows[1]["pct_of_roofline"] = 100 * rows[1]["floor_us"] / 630
    text = page(folder(tmp_path, knob_effects_h200=effects(*rows)))
    assert f"| knob | value | {' | '.join(map(str, SUBJECTS))} |" in text
    assert "| 630.0 us, **1.050** ± 0.005 of 600.0 | 630.0 us, **2.100** ± 0.005 of 300.0 |" in text


def test_an_arena_of_another_size_is_an_effect(tmp_path: Path) -> None:
    linear = effect("page_allocation", '"linear"', 600.0, arena_bytes=4_000_000)
    found = line_of(page(folder(tmp_path, knob_effects_h200=effects(linear))), "page_allocation")
    assert "arena 4000000 bytes of 302720" in found


def test_a_value_that_has_no_program_of_its_own_or_none_says_so(tmp_path: Path) -> None:
    same = {"model": "m", "knob": "kernel_knobs.kv_splits", "value": "16", "latency_us": None, "same_program_as": "0"}
    refused = same | {"value": "8", "reason": "kv_splits: must be less"}
    del refused["same_program_as"]
    text = page(folder(tmp_path, knob_effects_h200=effects(same, refused)))
    assert line_of(text, "kernel_knobs.kv_splits").endswith(f"{NONE}{NONE}{OTHERS}")
    assert f"| `16` {NONE * len(SUBJECTS)}| as `0` |" in text
    assert f"| `8` {NONE * len(SUBJECTS)}| kv_splits: must be less |" in text


def published() -> list[Row]:
    """The timed lines of every published file."""
    files = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(RESULTS.glob("knob-effects-*.json"))]
    return [row for name, data in files for row in honest_rows(name, data, "rows") if row["latency_us"] is not None]


def test_no_published_value_is_faster_than_the_default() -> None:
    """By more than the noise of its round: else the default would have to follow."""
    rows = published()
    assert len(rows) > 100
    assert [(row["model"], row["knob"], row["value"]) for row in rows if row["beyond_noise"] and row["effect_pct"] < 0] == []


def test_every_knob_has_a_published_effect() -> None:
    """On the time of a token beyond the noise, or on the bytes of the arena."""
    found = {row["knob"] for row in published() if row["beyond_noise"] or row["arena_bytes"] != row["default_arena_bytes"]}
    assert found == {knob.name for knob in KNOBS}


@pytest.mark.parametrize("every", [False, True])
def test_every_knob_has_values_to_try_that_it_takes(every: bool) -> None:
    for knob in KNOBS:
        values = other_values(knob, every)
        assert values and len({shown(value) for value in values}) == len(values)
        assert knob.default not in values and (every or len(values) <= 3)
        for value in values:
            assert with_value(Config(), knob.name, value) != Config()
            assert knob.parse(list(value) if knob.type == "set" else value)[1] == []
        if every and knob.choices and knob.type != "set":
            assert set(values) | {knob.default} == set(knob.choices)
    assert isinstance(parse_config({}), Config)


def test_shares_have_every_knob_once() -> None:
    shares = [share(f"{number}/4", KNOBS) for number in (1, 2, 3, 4)]
    assert sorted(knob.name for part in shares for knob in part) == sorted(knob.name for knob in KNOBS)
    assert all(shares)


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/2", "²/3", "1/²", "1/" + "9" * 5000])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="K/N"):
        share(text, KNOBS)
