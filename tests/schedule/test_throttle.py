"""When feeders hold back: what is chosen for which model, what a config makes of it, and what users are told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amk.models.registry import describe
from amk.schedule.compile import effective_config, lower, notes
from amk.schedule.config import parse_config
from amk.schedule.digest import schedule_id
from amk.schedule.knobs import Config
from amk.schedule.model import layer_bytes, matrices_bytes
from amk.schedule.program import Program
from amk.schedule.targets import TARGETS, Target
from amk.schedule.throttle import BY_LAYER_US, OFF, Throttle, throttle_of
from amk.tests.schedule.specs import TOY
from amk.vm.source import kernel_source

H200 = TARGETS["h200"]
SMALL = describe("small")  # a layer of it fits into the ring many times over


def chosen(program: Program) -> Throttle:
    return Throttle(program.machine.throttled, program.machine.watermark)


def small(target: Target = H200, **knobs: int) -> Program:
    return lower(SMALL, Config(**knobs), target)


@pytest.mark.parametrize(
    ("name", "throttle"),
    [
        ("llama-3.1-8b-shape", Throttle(2, 6)),
        ("llama-3.2-1b-shape", Throttle(2, 6)),
        ("llama-3.2-1b-shape@int8", Throttle(2, 4)),
        ("llama-3.2-1b-shape@int4-g128", Throttle(1, 4)),
        ("qwen3-0.6b-shape", Throttle(1, 4)),
        ("smollm2-135m-shape", OFF),
        ("toy", OFF),
    ],
)
def test_each_model_has_the_throttle_that_was_measured_to_be_the_fastest(name: str, throttle: Throttle) -> None:
    assert chosen(lower(describe(name), Config(), H200, context=1024)) == throttle


@pytest.mark.parametrize(("least", "throttle"), BY_LAYER_US)
def test_bounds_are_of_the_time_that_a_layer_takes_on_the_card(least: float, throttle: Throttle) -> None:
    spec = describe("llama-3.2-1b-shape")
    rate = layer_bytes(spec) / least * 1e-3
    assert throttle_of(spec, Config(), replace(H200, bandwidth_gbs=rate), "bulk") == throttle
    assert throttle_of(spec, Config(), replace(H200, bandwidth_gbs=rate * 1.001), "bulk") != throttle


def test_bytes_of_layers_and_of_what_is_in_none_are_those_of_the_model() -> None:
    spec = describe("llama-3.2-1b-shape@int8")
    outside = replace(spec, layers=0)
    assert spec.layers * layer_bytes(spec) + matrices_bytes(outside) == matrices_bytes(spec)


@pytest.mark.parametrize("feed", ["cp_async", "plain"])
def test_other_feeds_are_throttled_only_where_that_is_asked_for(feed: str) -> None:
    spec = describe("llama-3.2-1b-shape")
    assert throttle_of(spec, Config(), H200, feed) == OFF
    assert throttle_of(spec, Config(throttled_depth=1), H200, feed) == Throttle(1, 4)


def test_what_is_not_asked_for_comes_from_the_model_or_is_usual() -> None:
    assert chosen(small(throttled_depth=1)) == Throttle(1, 4)
    assert chosen(small(high_watermark=5)) == Throttle(2, 5)
    spec = describe("qwen3-0.6b-shape")
    assert throttle_of(spec, Config(high_watermark=3), H200, "bulk") == Throttle(1, 3)
    assert throttle_of(spec, Config(throttled_depth=2), H200, "bulk") == Throttle(2, 4)


def test_a_throttle_that_changes_nothing_is_none() -> None:
    default = small()
    stages = default.machine.stages
    for knobs in ({"throttled_depth": 3}, {"throttled_depth": 12, "high_watermark": 2}, {"throttled_depth": 1, "high_watermark": stages}):
        assert schedule_id(small(**knobs)) == schedule_id(default), knobs
    assert chosen(small(throttled_depth=1, high_watermark=stages - 1)) == Throttle(1, stages - 1)
    assert chosen(small(throttled_depth=3, pipelining_depth=4)) == Throttle(3, 4)


def test_a_stretch_is_never_throttled() -> None:
    program = lower(describe("llama-3.2-1b-shape"), Config(throttled_depth=1), H200, context=1024, batch=64, prefill=True)
    assert chosen(program) == OFF


@pytest.mark.parametrize("name", ["toy", "llama-3.2-1b-shape", "qwen3-0.6b-shape"])
@pytest.mark.parametrize("knobs", [{}, {"throttled_depth": 1}, {"high_watermark": 31}, {"throttled_depth": 3}])
def test_the_effective_config_makes_the_same_program(name: str, knobs: dict[str, int]) -> None:
    spec, config = describe(name), Config(**knobs)
    program = lower(spec, config, H200, context=1024)
    again = parse_config(effective_config(config, program))
    assert isinstance(again, Config)
    assert schedule_id(lower(spec, again, H200, context=1024)) == schedule_id(program)


def test_users_are_told_of_a_throttle_that_is_none() -> None:
    def told(**knobs: int) -> list[str]:
        return notes(Config(**knobs), small(**knobs))

    stages = small().machine.stages
    assert told() == told(throttled_depth=1) == told(high_watermark=5) == []
    assert told(throttled_depth=3) == []  # asked for, and done
    assert told(high_watermark=31) == [f"high_watermark: never reached: the ring has {stages} stages"]
    for knobs, most in (({"throttled_depth": 4}, 3), ({"pipelining_depth": 2}, 2), ({"pipelining_depth": 1}, 1)):
        why = f"high_watermark: 5 stages asked for, but never throttled: no more than {most} are copied at a time"
        assert told(high_watermark=5, **knobs) == [why]
    for knobs in ({"pipelining_depth": 2}, {"throttled_depth": 12}, {"throttled_depth": 1}):
        assert told(high_watermark=31, **knobs) == [f"high_watermark: never reached: the ring has {stages} stages"]
    plain = Config(high_watermark=5, weight_feed="plain")
    said = notes(plain, lower(replace(TOY, dtype="fp16"), plain, TARGETS["t4"]))
    assert any(text.startswith("high_watermark") for text in said)


def test_a_build_that_copies_nothing_is_not_throttled() -> None:
    """It shows what steps that wait for each other take, and the looks at the ring would be a part of that."""
    program = lower(describe("qwen3-0.6b-shape"), Config(), H200, context=1024)
    assert f"constexpr int WATERMARK = {program.machine.watermark};" in kernel_source(program) and program.machine.watermark
    assert "constexpr int WATERMARK = 0;" in kernel_source(program, DRY_FEED=1)
