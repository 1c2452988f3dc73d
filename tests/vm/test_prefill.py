"""Prefill: stretches of one sequence's positions, whose KV rows decoding goes on from."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from amk.isa.attention import Attention
from amk.isa.attention_prefill import AttentionPrefill
from amk.isa.instruction import Instruction
from amk.isa.machine import KV_BLOCK_ROWS
from amk.isa.matmul import MatMul
from amk.schedule.compile import ConfigRejected, lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.stream import stream_of
from amk.schedule.targets import small_target
from amk.schedule.validate import ValidProgram, validate
from amk.tests.vm.test_reference import BF16_ERROR, SHAPES, error
from amk.vm.image import pack_program, unpack_program
from amk.vm.interface import LaunchFailed
from amk.vm.reference import ReferenceVM
from amk.vm.scheduler import adversarial

KV_ERROR = 0.02  # relative, of KV rows: as BF16_ERROR, without the head


def program(spec: Any, batch: int = 16, sms: int = 4, **knobs: Any) -> Program:
    return lower(spec, Config(**knobs), small_target(sms), batch=batch, prefill=batch > 1)


def proven(program: Program) -> ValidProgram:
    valid = validate(program)
    assert isinstance(valid, ValidProgram), valid
    return valid


def pair(spec: Any, source: Any, batch: int, **knobs: Any) -> tuple[ReferenceVM, ReferenceVM]:
    """The machine that decodes and the one for prefill beside it."""
    decoder = ReferenceVM(proven(program(spec, 1, **knobs)), source)
    return decoder, ReferenceVM(proven(program(spec, batch, **knobs)), source, beside=decoder)


def row_errors(vm: ReferenceVM, plain: Any, first: int, stop: int) -> list[float]:
    found = [vm.read_kv(layer, stop) for layer in range(len(plain.keys))]
    return [
        error(rows[:, first:], true[:, first:stop])
        for (keys, values), true_keys, true_values in zip(found, plain.keys, plain.values, strict=True)
        for rows, true in ((keys, true_keys), (values, true_values))
    ]


@pytest.mark.parametrize("batch", [8, 16, 32, 64])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_what_is_decoded_from_them_are_the_plain_decoders(
    shape: str, batch: int, make_spec: Any, make_source: Any, plain: Any
) -> None:
    """Two whole stretches and a part of one, a token alone, a stretch that begins within a block of KV rows; then tokens one by one."""
    spec = make_spec("bf16", **SHAPES[shape])
    source = make_source(spec)
    ends = [2 * batch + 5, 2 * batch + 6, 3 * batch + 1]
    tokens = random.Random(batch).choices(range(spec.vocab), k=ends[-1] + 12)
    true = plain(spec, source, tokens)
    decoder, prefill = pair(spec, source, batch, kv_block=16, kv_splits=2)
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        prefill.prefill(tokens[start:stop], start)
        assert max(row_errors(decoder, true, start, stop)) < KV_ERROR
    decoded = decoder.decode(tokens[ends[-1] :], ends[-1], logits=True)
    assert error(decoded.logits, true.logits[ends[-1] :]) < BF16_ERROR


def test_late_stretches_see_the_rows_that_decoding_left(make_spec: Any, make_source: Any, plain: Any) -> None:
    spec = make_spec("bf16", windows=(40, None))
    source, tokens = make_source(spec), random.Random(3).choices(range(spec.vocab), k=220)
    true = plain(spec, source, tokens)
    decoder, prefill = pair(spec, source, 16)
    for layer, (keys, values) in enumerate(zip(true.keys, true.values, strict=True)):
        decoder.seed_kv(layer, keys[:, :150], values[:, :150])
    decoder.decode(tokens[150:153], 150)
    prefill.prefill(tokens[153:200], 153)
    assert max(row_errors(decoder, true, 153, 200)) < KV_ERROR
    assert error(decoder.decode(tokens[200:], 200, logits=True).logits, true.logits[200:]) < BF16_ERROR


def test_a_stretch_may_end_with_the_context_and_writes_no_row_of_seats_without_a_token(make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    decoder, prefill = pair(spec, make_source(spec), 16)
    marked = torch.full((spec.kv_heads, decoder.context, spec.head_dim), 3.0)
    decoder.seed_kv(0, marked, marked)
    prefill.prefill([1, 2, 3], 40)
    keys, values = decoder.read_kv(0, decoder.context)
    touched = ((keys != 3).any(dim=(0, 2)) | (values != 3).any(dim=(0, 2))).nonzero().flatten().tolist()
    assert touched == [40, 41, 42]
    prefill.prefill([1, 2, 3], decoder.context - 3)
    assert (decoder.read_kv(0, decoder.context)[0][:, -3:] != 3).any()


@pytest.mark.parametrize("knobs", [{"fusion": ("norm", "gate_up")}, {"page_allocation": "linear"}, {"sm_assignment": "contiguous"}])
def test_what_the_config_says_does_not_change_the_rows(knobs: dict[str, Any], make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16", qkv_bias=True)
    rows = []
    for changed in ({}, knobs):
        decoder, prefill = pair(spec, make_source(spec), 16, **changed)
        prefill.prefill(range(1, 41), 0)
        rows.append(decoder.read_kv(1, 40))
    assert torch.allclose(rows[0][0], rows[1][0], atol=0.05) and torch.allclose(rows[0][1], rows[1][1], atol=0.05)


def test_actors_in_adversarial_orders_agree_with_whole_tasks(make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16", layers=2, vocab=40)
    source, valid = make_source(spec), proven(program(spec, 8, sms=3))
    found = []
    for order in (None, adversarial(1), adversarial(2)):
        vm = ReferenceVM(valid, source, order=order)
        vm.prefill(range(1, 14), 0)
        found.append(vm.read_kv(1, 13))
    for keys, values in found[1:]:
        assert error(keys, found[0][0].double()) < 0.01 and error(values, found[0][1].double()) < 0.01


@pytest.mark.parametrize("knobs", [{}, {"sm_assignment": "contiguous"}, {"n_tile": 64}])
def test_the_stream_is_the_beginning_of_that_of_one_token(knobs: dict[str, Any], make_spec: Any) -> None:
    spec = make_spec("bf16", vocab=500, layers=3, qkv_bias=True, o_bias=True)
    whole = stream_of(program(spec, 1, 5, **knobs))
    for batch in (8, 16, 32, 64):
        part = stream_of(program(spec, batch, 5, **knobs))
        assert whole.begins_with(part) and not part.begins_with(whole)
    assert not whole.begins_with(stream_of(program(spec, 8, 4, **knobs)))


@pytest.mark.parametrize("hidden", [512, 2048])
def test_the_stream_is_cut_as_that_of_one_token_where_kept_inputs_leave_a_small_ring(hidden: int, make_spec: Any) -> None:
    spec = make_spec("bf16", hidden=hidden, vocab=5000, intermediate=4 * hidden)
    for batch in (8, 16, 32):
        assert stream_of(program(spec, 1)).begins_with(stream_of(program(spec, batch)))


def test_a_program_runs_from_its_packed_bytes(make_spec: Any) -> None:
    made = program(make_spec("bf16", vocab=300), 32)
    assert unpack_program(pack_program(made), made) == made


# ---- what must be found: mutants of the program by the proof, mutants of the meaning by the rows


def _first(queues: list[list[Any]], wanted: Any) -> tuple[int, int, Any]:
    return next((sm, i, task) for sm, queue in enumerate(queues) for i, task in enumerate(queue) if wanted(task))


CHANGES: dict[str, dict[str, int]] = {
    "seats of another task": {"seat0": 0},
    "head of another task": {"head": 0},
    "a seat within a block": {"seat0": 4},
    "a head that is not there": {"head": 99},
    "a window of its own": {"window": 20},
    "k rows past the value": {"k_start": 1 << 20},
    "v rows of the token before": {"v_tag": 1},
    "another layer": {"layer": 0},
    "another batch": {"batch": 8},
}


@pytest.mark.parametrize("change", CHANGES)
def test_mutants_are_rejected(change: str, make_spec: Any) -> None:
    made = program(make_spec("bf16"))
    queues = [list(queue) for queue in made.queues]
    sm, at, task = _first(queues, lambda t: isinstance(t, AttentionPrefill) and t.layer == 1 and t.head == 1 and t.seat0 == 8)
    queues[sm][at] = replace(task, **CHANGES[change])
    assert not isinstance(validate(replace(made, queues=tuple(map(tuple, queues)))), ValidProgram)


def test_instructions_of_other_machines_are_rejected(make_spec: Any) -> None:
    spec = make_spec("bf16")
    stretch, side_by_side = program(spec, 8), lower(spec, Config(), small_target(4), batch=8)
    for made, other, wanted in ((stretch, side_by_side, Attention), (side_by_side, stretch, AttentionPrefill)):
        queues = [list(queue) for queue in made.queues]
        queues[0].append(_first([list(q) for q in other.queues], lambda t, wanted=wanted: isinstance(t, wanted))[2])
        found = validate(replace(made, queues=tuple(map(tuple, queues))))
        assert not isinstance(found, ValidProgram) and any("has no place on a machine" in str(r) for r in found)
    assert not isinstance(validate(replace(stretch, machine=replace(stretch.machine, prefill=False))), ValidProgram)


def _late_rotation(self: AttentionPrefill, memory: Any, rows: Any, gain: int, places: list[int]) -> Any:
    return ROTATED(self, memory, rows, gain, [place + (place >= 16) for place in places])


def _stale_row(self: AttentionPrefill, memory: Any, k: Any, v: Any, position: int) -> None:
    APPEND(self, memory, np.roll(k, 1, axis=0), v, position)


ROTATED, APPEND = AttentionPrefill._rotated, AttentionPrefill._append
MEANINGS = {"rotation of the next position": ("_rotated", _late_rotation), "the row of the seat before": ("_append", _stale_row)}


@pytest.mark.parametrize("mutant", [*MEANINGS, "mask off by one"])
def test_wrong_meanings_are_seen_in_the_rows(mutant: str, make_spec: Any, make_source: Any, plain: Any, monkeypatch: Any) -> None:
    spec = make_spec("bf16", layers=3)
    source, tokens = make_source(spec), random.Random(5).choices(range(spec.vocab), k=40)
    decoder, prefill = pair(spec, source, 16)
    if mutant in MEANINGS:
        monkeypatch.setattr(AttentionPrefill, *MEANINGS[mutant])
    else:  # a window that hides the oldest row that each seat should see
        queues = tuple(tuple(_hidden(task) for task in queue) for queue in prefill.program.queues)
        prefill.program = replace(prefill.program, queues=queues)
    prefill.prefill(tokens, 0)
    assert max(row_errors(decoder, plain(spec, source, tokens), 0, 40)) > 2 * KV_ERROR


def _hidden(task: Instruction) -> Instruction:
    return replace(task, window=1) if isinstance(task, AttentionPrefill) else task


def test_unreasonable_requests_are_refused_in_one_sentence(make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    decoder, prefill = pair(spec, make_source(spec), 8)
    for tokens, position, message in (
        ([], 0, "at least one token"),
        ([spec.vocab], 0, "tokens must lie in"),
        ([1, 2], decoder.context - 1, "must stay in positions"),
        ([1], -1, "must stay in positions"),
    ):
        with pytest.raises(ValueError, match=message):
            prefill.prefill(tokens, position)
    with pytest.raises(ValueError, match="this one decodes"):
        decoder.prefill([1], 0)
    with pytest.raises(ValueError, match="is for prefill"):
        prefill.decode([1], 0)
    with pytest.raises(ValueError, match="is for prefill"):
        prefill.decode_batch([[1]], [0])
    with pytest.raises(LaunchFailed, match="the one beside it"):
        ReferenceVM(proven(program(spec, 8, sms=3)), make_source(spec), beside=decoder)
    with pytest.raises(ConfigRejected, match=r"batch: must be one of \(8, 16, 32, 64\), but got 1"):
        lower(spec, Config(), small_target(4), batch=1, prefill=True)


# ---- the device's index arithmetic, written out again from isa/attention_prefill.cuh


SPANS = [(0, 0, 0), (0, 24, 0), (37, 8, 0), (64, 56, 0), (100, 16, 33), (205, 40, 17), (16, 0, 1)]  # start, seat0, window


@pytest.mark.parametrize(("start", "seat0", "window"), SPANS)
def test_each_seat_sees_each_of_its_rows_once(start: int, seat0: int, window: int) -> None:
    """Blocks of the cache, then blocks of the stretch, dealt to the warps; a lane's mask for each row of a block and each column."""
    seat, rows, warps = start + seat0, seat0 + 8, 8
    first = min(start, max(0, seat - window + 1)) // KV_BLOCK_ROWS if window else 0
    old_blocks = -(-start // KV_BLOCK_ROWS) - first
    blocks = old_blocks + -(-rows // KV_BLOCK_ROWS)
    seen: list[list[tuple[str, int]]] = [[] for _ in range(8)]
    for warp in range(warps):
        for i in range(warp, blocks, warps):
            old = i < old_blocks
            row = ((first + i) if old else (i - old_blocks)) * KV_BLOCK_ROWS
            count, place = min(KV_BLOCK_ROWS, (start if old else rows) - row), row if old else start + row
            for lane in range(32):
                g, t = lane >> 2, lane & 3
                for col in range(2):
                    low_age = seat + 2 * t + col - (place + g)
                    for r, age in ((g, low_age), (g + 8, low_age - 8)):
                        if r < count and age >= 0 and (window == 0 or age < window):
                            seen[2 * t + col].append(("cache" if old else "stretch", place + r))
    for column, found in enumerate(seen):
        position = seat + column
        oldest = max(0, position - window + 1) if window else 0
        expected = [("cache" if row < start else "stretch", row) for row in range(oldest, position + 1)]
        assert sorted(found, key=lambda item: item[1]) == expected


def test_all_tasks_of_a_product_find_room_for_what_they_keep(make_spec: Any) -> None:
    made = program(make_spec("bf16", hidden=256, vocab=4000), 64)
    for task in (task for queue in made.queues for task in queue if isinstance(task, MatMul | AttentionPrefill)):
        assert task.shared_bytes(made.machine) <= made.scratch_bytes
