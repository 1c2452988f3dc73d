"""When a watcher pauses: as asked, or by what a layer takes and whether there is a batch; never for nobody, as in prefill."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amk.isa.weight_format import FORMATS
from amk.models.quantised_weights import with_weights
from amk.schedule.compile import effective_config, lower
from amk.schedule.knobs import NO_PAUSE, Config
from amk.schedule.model import ModelSpec
from amk.schedule.program import Program
from amk.schedule.targets import TARGETS
from amk.tests.schedule.specs import LLAMA_1B, TOY

INT8, INT4 = (with_weights(LLAMA_1B, FORMATS[name]) for name in ("int8", "int4-g128"))


def lowered(spec: ModelSpec, asked: int = 0, **how: int) -> Program:
    program = lower(spec, Config(poll_sleep_ns=asked), TARGETS["h200"], context=1024, **how)
    assert isinstance(program, Program)
    return program


@pytest.mark.parametrize(("spec", "batch", "usual"), [(LLAMA_1B, 1, 0), (INT8, 1, 50), (INT4, 1, 0), (LLAMA_1B, 8, 50), (LLAMA_1B, 16, 50)])
def test_what_nobody_asked_for_is_what_was_measured_to_be_the_fastest(spec: ModelSpec, batch: int, usual: int) -> None:
    assert lowered(spec, batch=batch).device.poll_sleep_ns == usual
    assert lowered(spec, 20, batch=batch).device.poll_sleep_ns == 20
    assert lowered(spec, NO_PAUSE, batch=batch).device.poll_sleep_ns == 0


@pytest.mark.parametrize("other", [{"sync": "tags"}, {"weight_feed": "cp_async"}, {"weight_feed": "plain"}])
def test_where_it_was_not_measured_nobody_pauses_unasked(other: dict[str, str]) -> None:
    for spec, batch in ((INT8, 1), (LLAMA_1B, 8)):
        program = lower(spec, Config(**other), TARGETS["h200"], context=1024, batch=batch)  # type: ignore[arg-type]
        assert isinstance(program, Program) and program.device.poll_sleep_ns == 0


@pytest.mark.parametrize("asked", [0, NO_PAUSE, 100])
@pytest.mark.parametrize("spec", [LLAMA_1B, INT8])
def test_the_effective_config_gives_the_same_program(spec: ModelSpec, asked: int) -> None:
    program = lowered(spec, asked)
    effective = effective_config(Config(poll_sleep_ns=asked), program)["kernel_knobs"]["poll_sleep_ns"]
    assert effective != 0 and lowered(spec, effective) == program


def test_a_program_for_prefill_has_no_pause_as_nothing_reads_it() -> None:
    spec = replace(TOY, dtype="bf16")
    found = [lower(spec, Config(poll_sleep_ns=asked), TARGETS["h200"], batch=32, prefill=True) for asked in (0, 100)]
    assert found[0] == found[1] and isinstance(found[0], Program) and found[0].device.poll_sleep_ns == 0
