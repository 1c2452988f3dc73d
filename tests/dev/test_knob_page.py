"""The page of knob effects says where each knob has one beyond the noise, and what was not measured."""

from __future__ import annotations

from pathlib import Path

from amk.dev.knob_effects import other_values, shown
from amk.dev.knob_page import NOTHING, page
from amk.schedule.config import parse_config, with_value
from amk.schedule.knobs import KNOBS, Config
from amk.tests.dev.results_file import effect, effects
from amk.tests.dev.test_readme_table import folder


def line_of(text: str, knob: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(f"| `{knob}` |"))


def test_without_a_results_file_nothing_is_measured_yet(tmp_path: Path) -> None:
    assert NOTHING in page(tmp_path)


def test_the_largest_effect_beyond_the_noise_is_named_with_its_model_and_position(tmp_path: Path) -> None:
    rows = [effect("kernel_knobs.sync", '"tags"', 630.0), effect("tiling.attention.kv_block", "16", 602.0)]
    rows += [effect("tiling.attention.kv_block", value, latency, position=1024) for value, latency in (("16", 540.8), ("64", 620.0))]
    text = page(folder(tmp_path, knob_effects_h200=effects(*rows)))
    assert 'llama-3.2-1b-shape at 128: +5.0 % (`"tags"`)' in line_of(text, "kernel_knobs.sync")
    assert line_of(text, "tiling.attention.kv_block").endswith("| llama-3.2-1b-shape at 1024: -9.9 % (`16`) |")
    assert "602.0 us, +0.3 % ± 0.5; 540.8 us at 1024, **-9.9 %** ± 0.5" in text
    assert line_of(text, "kernel_knobs.poll_sleep_ns").endswith("| not measured |")


def test_an_arena_of_another_size_is_an_effect(tmp_path: Path) -> None:
    linear = effect("page_allocation", '"linear"', 600.0, arena_bytes=4_000_000)
    found = line_of(page(folder(tmp_path, knob_effects_h200=effects(linear))), "page_allocation")
    assert "arena 302720 to 4000000 bytes" in found


def test_a_value_that_has_no_program_of_its_own_or_none_says_so(tmp_path: Path) -> None:
    same = {"model": "m", "knob": "kernel_knobs.kv_splits", "value": "16", "latency_us": None, "same_program_as": "0"}
    refused = same | {"value": "8", "reason": "kv_splits: must be less"}
    del refused["same_program_as"]
    text = page(folder(tmp_path, knob_effects_h200=effects(same, refused)))
    assert "| `16` | as `0` |" in text and "| `8` | kv_splits: must be less |" in text


def test_every_knob_has_values_to_try_and_all_of_them_are_offered() -> None:
    for knob in KNOBS:
        values = other_values(knob)
        assert values and len({shown(value) for value in values}) == len(values)
        assert knob.default not in values
        assert not knob.choices or knob.type == "set" or set(values) | {knob.default} == set(knob.choices)
        for value in values:
            assert with_value(Config(), knob.name, value) != Config()
            assert knob.parse(list(value) if knob.type == "set" else value)[1] == []
    assert isinstance(parse_config({}), Config)
