"""Batches: rows with positions of their own, computed side by side, and how their values lie in the arena."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from amk.isa.attention import Attention
from amk.isa.batch import deinterleave, interleave
from amk.isa.machine import chunk_plan
from amk.isa.matmul import X_KEPT, MatMul
from amk.isa.matvec import X_NORM
from amk.schedule.compile import ConfigRejected, lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.stream import stream_of
from amk.schedule.targets import TARGETS, small_target
from amk.schedule.validate import ValidProgram, validate
from amk.tests.vm.test_reference import BF16_ERROR, SHAPES, error
from amk.vm.build import compile_kernel
from amk.vm.image import pack_matrix, pack_program, unpack_program
from amk.vm.reference import ReferenceVM
from amk.vm.scheduler import adversarial
from amk.vm.source import kernel_source

STEPS = 10


def batch_program(spec: Any, batch: int = 8, sms: int = 4, **knobs: Any) -> Program:
    return lower(spec, Config(**knobs), small_target(sms), batch=batch)


def proven(program: Program) -> ValidProgram:
    valid = validate(program)
    assert isinstance(valid, ValidProgram), valid
    return valid


def seeded(vm: ReferenceVM, decoders: list[Any], positions: list[int]) -> None:
    for row, (decoder, position) in enumerate(zip(decoders, positions, strict=True)):
        for layer, (keys, values) in enumerate(zip(decoder.keys, decoder.values, strict=True)):
            vm.seed_kv(layer, keys[:, :position], values[:, :position], row)


@pytest.mark.parametrize("batch", [8, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_row_has_the_plain_decoders_logits_at_its_own_position(
    shape: str, batch: int, make_spec: Any, make_source: Any, plain: Any
) -> None:
    spec = make_spec("bf16", **SHAPES[shape])
    source, rng = make_source(spec), random.Random(batch)
    sequences = [rng.choices(range(spec.vocab), k=90) for _ in range(batch)]
    positions = [rng.randrange(0, 80) for _ in range(batch)]
    decoders = [plain(spec, source, tokens) for tokens in sequences]
    vm = ReferenceVM(proven(batch_program(spec, batch, kv_block=16, kv_splits=2)), source)
    seeded(vm, decoders, positions)
    given = [tokens[at : at + STEPS] for tokens, at in zip(sequences, positions, strict=True)]
    decoded = vm.decode_batch(given, positions, logits=True)
    for row, (decoder, at) in enumerate(zip(decoders, positions, strict=True)):
        assert error(decoded.logits[:, row], decoder.logits[at : at + STEPS]) < BF16_ERROR, row


@pytest.mark.parametrize("knobs", [{"fusion": ("norm", "gate_up")}, {"page_allocation": "linear"}, {"sm_assignment": "round_robin"}])
def test_what_the_config_says_does_not_change_the_rows(knobs: dict[str, Any], make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16", qkv_bias=True)
    rows = [[row, 2 * row + 1] for row in range(8)]
    answers = [
        ReferenceVM(proven(batch_program(spec, **changed)), make_source(spec)).decode_batch(rows, [0] * 8, steps=20)
        for changed in ({}, knobs)
    ]
    assert answers[0].tokens == answers[1].tokens


def test_actors_in_adversarial_orders_agree_with_whole_tasks(make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16", layers=1, vocab=40)
    program, source = proven(batch_program(spec, sms=3)), make_source(spec)
    rows, positions = [[3 * row + 1] for row in range(8)], [5 * row for row in range(8)]
    whole = ReferenceVM(program, source).decode_batch(rows, positions, steps=3, logits=True)
    for seed in (1, 2):
        found = ReferenceVM(program, source, order=adversarial(seed)).decode_batch(rows, positions, steps=3, logits=True)
        assert (found.logits - whole.logits).abs().max() < 0.04 * whole.logits.std()


def test_a_row_does_not_see_the_others(make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    program, source = proven(batch_program(spec)), make_source(spec)
    alone = ReferenceVM(program, source).decode_batch([[7, 8, 9]], [0], steps=20, logits=True)
    beside = ReferenceVM(program, source).decode_batch([[7, 8, 9], [1], [2, 3]], [0, 4, 60], steps=20, logits=True)
    assert torch.equal(alone.logits[:, 0], beside.logits[:, 0])


def test_rows_go_on_by_their_own_choice_after_prompts_of_different_lengths(make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    program, source = proven(batch_program(spec)), make_source(spec)
    free = ReferenceVM(program, source).decode_batch([[4], [5, 6, 7]], [0, 0], steps=12)
    inputs = [[4, *free.tokens[0][:-1]], [5, 6, 7, *free.tokens[1][2:-1]]]
    assert ReferenceVM(program, source).decode_batch(inputs, [0, 0]).tokens == free.tokens


def test_all_batches_of_a_config_stream_the_same_bytes(make_spec: Any) -> None:
    spec = make_spec("bf16", vocab=500, layers=3)
    for knobs in ({}, {"sm_assignment": "contiguous"}, {"n_tile": 64}):
        assert len({stream_of(batch_program(spec, batch, 5, **knobs)) for batch in (1, 8, 16)}) == 1
    assert stream_of(batch_program(spec, 1, 5)) != stream_of(batch_program(spec, 1, 4))


def test_a_program_runs_from_its_packed_bytes(make_spec: Any) -> None:
    program = batch_program(make_spec("bf16", vocab=300), 16)
    assert unpack_program(pack_program(program), program) == program


@pytest.mark.parametrize("broken", ["batch word", "seats swapped", "x by seat", "a position short"])
def test_mutants_are_rejected(broken: str, make_spec: Any) -> None:
    program = batch_program(make_spec("bf16"))
    queues = [list(queue) for queue in program.queues]
    if broken == "a position short":  # the tail of one seat is gone: its rows are appended by nobody
        sm, at, task = _first(queues, lambda t: isinstance(t, Attention) and t.layer == program.layers * 3)
        queues[sm][at] = replace(task, layer=0)
    elif broken == "seats swapped":  # two seats write the same output
        sm, at, task = _first(queues, lambda t: isinstance(t, Attention) and t.layer == program.layers * 3)
        other = _first(queues, lambda t: isinstance(t, Attention) and t.layer == 0)[2]
        queues[sm][at] = replace(task, out_buf=other.out_buf)
    else:
        sm, at, task = _first(queues, lambda t: isinstance(t, MatMul) and t.stem == "gemm" and not t.flags & 256)
        queues[sm][at] = replace(task, batch=16) if broken == "batch word" else replace(task, flags=task.flags | 256)
    result = validate(replace(program, queues=tuple(map(tuple, queues))))
    assert not isinstance(result, ValidProgram)


def _first(queues: list[list[Any]], wanted: Any) -> tuple[int, int, Any]:
    return next((sm, i, task) for sm, queue in enumerate(queues) for i, task in enumerate(queue) if wanted(task))


def test_what_a_batch_cannot_do_is_rejected_with_all_reasons(make_spec: Any) -> None:
    with pytest.raises(ConfigRejected) as refused:
        batch_program(make_spec("fp32"), 7, fusion=())
    said = str(refused.value)
    assert "batch: must be one of (1, 8, 16), but got 7" in said
    assert "model dtype: must be bf16 or fp16 for a batch" in said
    assert "norm and gate_up" in said


def test_unreasonable_launches_are_refused_in_one_sentence(make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    vm = ReferenceVM(proven(batch_program(spec)), make_source(spec))
    for tokens, positions, message in (
        ([], [], "1 to 8 rows"),
        ([[1]] * 9, [0] * 9, "1 to 8 rows"),
        ([[1]], [0, 0], "1 to 8 rows"),
        ([[1], []], [0, 0], "row 1 must have 1 to 1 tokens"),
        ([[1], [spec.vocab]], [0, 0], "row 1: tokens must lie in"),
        ([[1, spec.vocab]], [0], "row 0: tokens must lie in"),
        ([[1], [1, 2]], [0, vm.context - 1], "row 1 must stay in positions"),
    ):
        with pytest.raises(ValueError, match=message):
            vm.decode_batch(tokens, positions)
    with pytest.raises(ValueError, match="row: must be from 0 to 7, but got 8"):
        vm.read_kv(0, 1, 8)


# ---- the device's index arithmetic, written out again from isa/device/batch.cuh and matmul.cuh


def narrow_packet(blocks: int, run: int, block: int, g: int, quarter: int) -> int:
    return (run * blocks + block) * 32 + g * 4 + quarter * 2


@pytest.mark.parametrize("batch", [8, 16, 64])
def test_lanes_find_their_operands_in_interleaved_packets(batch: int) -> None:
    """A lane (g, t) of fragment f must get x[16 f + 4 t ... + 3] of seat g of each block, as the packing of the weights has it."""
    elements, blocks = 64, batch // 8
    x = np.arange(elements * batch, dtype=np.float32).reshape(elements, batch)
    narrow = interleave(x)
    np.testing.assert_array_equal(deinterleave(narrow, batch), x)
    for f in range(elements // 16):
        for block in range(blocks):
            for lane in range(32):
                g, t = lane >> 2, lane & 3
                expected = x[16 * f + 4 * t : 16 * f + 4 * t + 4, 8 * block + g]
                packet = narrow_packet(blocks, 2 * f + (t >> 1), block, g, t & 1)
                np.testing.assert_array_equal(narrow[2 * packet : 2 * packet + 4], expected)


def test_fragments_times_operands_are_the_product(make_spec: Any) -> None:
    """m16n8k16 lane by lane: packed weights as A, a lane's two words of x as B, and where the sums go in a reduction slot."""
    program = batch_program(make_spec("bf16", hidden=128, intermediate=208), 8)
    machine = program.machine
    task = next(t for queue in program.queues for t in queue if isinstance(t, MatMul) and t.cols == 208)
    plan, rng = task.plan(machine), np.random.default_rng(0)
    w = torch.tensor(rng.integers(-8, 8, (16, 208)), dtype=torch.float32)
    x = rng.integers(-8, 8, (208, 8)).astype(np.float32)
    packed = pack_matrix(w, plan, machine).view(torch.bfloat16).float().numpy().reshape(-1, 32, 4, 2)  # fragment, lane, register, half
    narrow = interleave(x)
    slot = np.zeros((8, 20))  # seats by rows
    for place, piece in enumerate(plan.stream_order()):
        a, b = np.zeros((16, 16)), np.zeros((16, 8))
        for lane in range(32):
            g, t = lane >> 2, lane & 3
            a[g, 2 * t : 2 * t + 2], a[g + 8, 2 * t : 2 * t + 2] = packed[place, lane, 0], packed[place, lane, 1]
            a[g, 2 * t + 8 : 2 * t + 10], a[g + 8, 2 * t + 8 : 2 * t + 10] = packed[place, lane, 2], packed[place, lane, 3]
            if 16 * piece + 4 * t < 208:
                at = 2 * narrow_packet(1, 2 * piece + (t >> 1), 0, g, t & 1)
                b[2 * t : 2 * t + 2, g], b[2 * t + 8 : 2 * t + 10, g] = narrow[at : at + 2], narrow[at + 2 : at + 4]
        d = a @ b
        for lane in range(32):
            g, t = lane >> 2, lane & 3
            for i in range(4):
                slot[t * 2 + i % 2, g + i // 2 * 8] += d[g + i // 2 * 8, 2 * t + i % 2]
    np.testing.assert_array_equal(slot[:, :16].T, w.numpy() @ x)


@pytest.mark.parametrize(("hidden", "warps"), [(1280, 4), (2816, 8)])
def test_kernels_of_slices_that_end_within_a_chunk_are_built(hidden: int, warps: int, make_spec: Any) -> None:
    """Device code that would take what lies behind such a slice for a part of it, in squares and gains, does not compile."""
    spec = make_spec("bf16", hidden=hidden, heads=16, kv_heads=2, head_dim=64, layers=1)
    program = lower(spec, Config(threads_per_block=32 * warps), TARGETS["h200"], context=64, batch=16)
    plan = chunk_plan(program.machine, hidden)
    assert plan.high * warps == plan.tile_pieces and plan.chunks * plan.per_chunk > plan.high
    assert any(t.cols == hidden and t.flags & X_NORM and not t.flags & X_KEPT for q in program.queues for t in q if isinstance(t, MatMul))
    assert compile_kernel(kernel_source(program), "sm_90a").spill_store_bytes == 0


def test_products_of_several_tiles_keep_their_input_and_others_do_not(make_spec: Any) -> None:
    program = batch_program(make_spec("bf16", vocab=4000), sms=4)
    for task in (task for queue in program.queues for task in queue if isinstance(task, MatMul)):
        alike = [t.tiles for queue in program.queues for t in queue if isinstance(t, MatMul) and t.weight == task.weight]
        assert bool(task.flags & X_KEPT) == (max(alike) > 1)
