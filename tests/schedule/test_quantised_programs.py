"""Programs with quantised weights: proven, counted by their true bytes, told apart, and refused where a format does not fit."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest

from amk.eval.soundness.static_rules import static_problem
from amk.eval.soundness.trace import check_traces
from amk.isa.machine import quantised_piece
from amk.isa.matvec import MatVec
from amk.isa.weight_format import FORMATS, known_formats
from amk.models.quantised_weights import with_weights
from amk.schedule.compile import compile_program, effective_config, lower
from amk.schedule.config import parse_config
from amk.schedule.cost import latency_us, streamed_bytes
from amk.schedule.digest import program_digest
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec
from amk.schedule.program import Program
from amk.schedule.proven import ValidProgram
from amk.schedule.targets import TARGETS, small_target
from amk.schedule.validate import validate
from amk.tests.schedule.configs import random_config
from amk.tests.schedule.specs import LLAMA_1B, TINY, TOY, random_spec, spec

SMALL = spec("small", 256, 1, 4, 2, 32, 320, 300)


def program(model: ModelSpec, name: str, **knobs: Any) -> Program:
    return lower(with_weights(model, FORMATS[name]), Config(**knobs), small_target(4))


def kinds(changed: Program) -> set[str]:
    verdict = validate(changed)
    return set() if isinstance(verdict, ValidProgram) else {rejection.kind for rejection in verdict}


@pytest.mark.parametrize("seed", range(24))
def test_any_model_in_any_format_is_proven_under_any_config(seed: int) -> None:
    rng = Random(seed)
    model = replace(random_spec(seed), dtype=rng.choice(("bf16", "fp16")))
    config = replace(random_config(seed), smem_bytes_per_block=0, stage_bytes=0)
    made = compile_program(with_weights(model, FORMATS[rng.choice(list(FORMATS))]), config, small_target(6))
    assert isinstance(made, Program), made
    assert isinstance(validate(made), ValidProgram), validate(made)
    assert static_problem(made) is None


@pytest.mark.parametrize("name", ["int4-g128-asym", "int8", "int8-g32"])
def test_the_independent_checkers_accept_them(name: str) -> None:
    assert check_traces(program(replace(TINY, layers=1), name), Random(1), orders=8) is None


@pytest.mark.parametrize("name", FORMATS)
def test_streamed_bytes_are_those_of_codes_scales_and_zeros(name: str) -> None:
    form, whole = FORMATS[name], lower(LLAMA_1B, Config(), TARGETS["h200"], context=4096)
    quantised = lower(with_weights(LLAMA_1B, form), Config(), TARGETS["h200"], context=4096)
    weights = sum(m.rows * m.cols for m in whole.matrices)
    groups = sum(m.rows * form.groups(m.cols) for m in whole.matrices)
    zeros = groups * form.bits // 8 if form.asymmetric else 0
    for position in (0, 1000):
        saved = streamed_bytes(whole, position) - streamed_bytes(quantised, position)
        assert saved == 2 * weights - (weights * form.bits // 8 + 2 * groups + zeros)
    assert latency_us(quantised, TARGETS["h200"], 128) < latency_us(whole, TARGETS["h200"], 128)
    streamed = sum(t.tiles * t.plan(quantised.machine).tile_bytes for queue in quantised.queues for t in queue if isinstance(t, MatVec))
    assert streamed < 1.04 * streamed_bytes(quantised, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_scales_do_not_cost_a_stage_its_room(name: str) -> None:
    form = FORMATS[name]
    made = lower(with_weights(LLAMA_1B, form), Config(), TARGETS["h200"], context=4096)
    fullest = max(max(t.chunk_bytes(made.machine, 0)) for queue in made.queues for t in queue if isinstance(t, MatVec))
    assert fullest == made.machine.stage_bytes and made.machine.stage_bytes % 16 == 0
    assert made.machine.stages * made.machine.stage_bytes > 180_000
    effective = effective_config(Config(), made)
    assert effective["kernel_knobs"]["stage_bytes"] == 16384 and isinstance(parse_config(effective), Config)


def test_formats_have_digests_of_their_own() -> None:
    digests = {program_digest(lower(SMALL, Config(), small_target(4)))}
    for form in known_formats():
        quantised = replace(SMALL, layer_weights=form, head_weights=form)
        digests |= {program_digest(lower(model, Config(), small_target(4))) for model in (quantised, replace(quantised, head_weights=None))}
    assert len(digests) == 1 + 2 * len(known_formats())


def with_flags(made: Program, change: Any) -> Program:
    """The first product's flags changed, in the task and in the shape that it names."""
    sm, index, task = next((s, i, t) for s, queue in enumerate(made.queues) for i, t in enumerate(queue) if isinstance(t, MatVec))
    flags = change(task.flags)
    queue = tuple(replace(t, flags=flags, shape=len(made.shapes)) if i == index else t for i, t in enumerate(made.queues[sm]))
    shapes = (*made.shapes, replace(made.shapes[task.shape], flags=flags))
    return replace(made, shapes=shapes, queues=tuple(queue if s == sm else q for s, q in enumerate(made.queues)))


@pytest.mark.parametrize("bits", [4 ^ 8, 16, 32, 64])
def test_a_task_that_decodes_another_format_than_its_matrix_has_is_rejected(bits: int) -> None:
    made = program(SMALL, "int4-g32")
    assert kinds(with_flags(made, lambda flags: flags)) == set()
    wrong = with_flags(made, lambda flags: flags ^ bits)
    assert "kind" in kinds(wrong) and static_problem(wrong) is not None


@pytest.mark.parametrize("bits", [8, 128, 1 << 8, -1 << 31])
def test_flags_without_a_meaning_are_rejected(bits: int) -> None:
    assert kinds(with_flags(lower(SMALL, Config(), small_target(4)), lambda flags: flags ^ bits)) & {"kind", "bounds"}
    assert kinds(with_flags(program(SMALL, "int8"), lambda flags: flags ^ bits)) & {"kind", "bounds"}


@pytest.mark.parametrize("weights", ["int4", 4, (), FORMATS["int8"]])
def test_a_matrix_in_a_format_that_its_tasks_do_not_decode_is_rejected(weights: Any) -> None:
    made = program(SMALL, "int4-g32")
    wrong = replace(made, matrices=(replace(made.matrices[0], weights=weights), *made.matrices[1:]))
    assert "kind" in kinds(wrong)


@pytest.mark.parametrize(("layers", "head"), [("fp8", "int8"), ("int4-g32", "fp8")])
def test_integers_and_fp8_in_one_program_are_rejected(layers: str, head: str) -> None:
    """The device code multiplies the ones or the others."""
    mixed = replace(with_weights(SMALL, FORMATS[layers]), head_weights=FORMATS[head])
    refused = compile_program(mixed, Config(), small_target(4))
    assert isinstance(refused, list) and head in str(refused[0]) and layers in str(refused[0])
    made = program(SMALL, layers)
    last = replace(made.matrices[-1], weights=FORMATS[head])
    assert "kind" in kinds(replace(made, matrices=(*made.matrices[:-1], last)))
    assert lower(replace(mixed, head_weights=None), Config(), small_target(4)).floating == (layers == "fp8")


def test_quantised_weights_need_16_bit_activations() -> None:
    made = program(SMALL, "int8")
    assert "kind" in kinds(replace(made, machine=replace(made.machine, dtype="fp32")))
    refused = compile_program(replace(TOY, layer_weights=FORMATS["int8"]), Config(), small_target(4))
    assert isinstance(refused, list) and "fp32" in str(refused[0])


@pytest.mark.parametrize("name", FORMATS)
def test_a_stage_holds_a_piece_of_each_warp_and_no_less(name: str) -> None:
    made, piece = program(SMALL, name, threads_per_block=128), quantised_piece(FORMATS[name])
    short = replace(made, machine=replace(made.machine, context=32))
    least = 4 * piece.bytes + piece.tail
    assert "ring" not in kinds(replace(short, machine=replace(short.machine, stage_bytes=least)))
    assert "ring" in kinds(replace(short, machine=replace(short.machine, stage_bytes=least - 16)))
