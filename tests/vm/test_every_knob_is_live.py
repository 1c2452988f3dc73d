"""Every knob changes what runs: the program's digest, or the binary's where only the device code reads it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from amk.models.registry import describe
from amk.schedule.compile import lower
from amk.schedule.config import parse_config, with_value
from amk.schedule.digest import program_digest, schedule_id
from amk.schedule.knobs import KNOBS, Config, Knob
from amk.schedule.program import Program
from amk.schedule.targets import TARGETS
from amk.vm.build import compile_kernel
from amk.vm.source import kernel_source


def program(config: Config) -> Program:
    return lower(describe("small"), config, TARGETS["h200"])


def binary_digest(lowered: Program) -> str:
    return compile_kernel(kernel_source(lowered), "sm_90a").digest


def other_values(knob: Knob) -> list[Any]:
    return [value for value in knob.values if with_value(Config(), knob.name, value) != Config()]


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_changing_the_knob_changes_the_program_or_the_binary(knob: Knob) -> None:
    default = program(Config())
    values = [tuple(v for v in knob.choices if v != dropped) for dropped in knob.choices] if knob.type == "set" else other_values(knob)
    changed = [program(with_value(Config(), knob.name, value)) for value in values]
    assert changed
    programs_differ = [p for p in changed if program_digest(p) != program_digest(default)]
    rest = [p for p in changed if program_digest(p) == program_digest(default)]
    binaries_differ = [p for p in rest[:2] if binary_digest(p) != binary_digest(default)]
    assert programs_differ or binaries_differ
    # A value that changes neither is the default under another name, and has its id.
    same = [p for p in rest if p.device == default.device]
    assert all(schedule_id(p) == schedule_id(default) for p in same)


@pytest.mark.parametrize("field", ["cache_hint", "poll_sleep_ns", "release_early"])
def test_every_value_of_a_device_knob_has_a_binary_of_its_own(field: str) -> None:
    knob = next(knob for knob in KNOBS if knob.name.endswith(field))
    lowered = program(Config())
    digests = [binary_digest(replace(lowered, device=replace(lowered.device, **{field: value}))) for value in knob.values]
    assert len(set(digests)) == len(digests)


def test_an_unknown_value_never_reaches_a_program() -> None:
    assert isinstance(parse_config({"kernel_knobs": {"unroll": 3}}), list)
