"""Prefill: stretches of one sequence's positions, whose KV rows decoding goes on from."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from amk.isa import seat_qkv
from amk.isa.abi import NONE
from amk.isa.attention import rotate_heads
from amk.isa.instruction import Instruction
from amk.isa.seat_qkv import SeatQkv
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_glu import StretchGlu
from amk.isa.stretch_sums import StretchSums
from amk.schedule.compile import ConfigRejected, lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.settings import STRETCHES
from amk.schedule.stream import stream_of
from amk.schedule.targets import small_target
from amk.tests.schedule.test_stretch_lowering import config_of, spec_of
from amk.tests.vm.test_reference import BF16_ERROR, SHAPES, error
from amk.vm.image import pack_program, unpack_program
from amk.vm.interface import LaunchFailed
from amk.vm.reference import UnprovenVM
from amk.vm.scheduler import ORDERS, Order, adversarial

KV_ERROR = 0.02  # relative, of many tokens' KV rows: as BF16_ERROR, without the head
TOKEN_ERROR = 0.04  # of one token's
MORE_SHAPES: dict[str, dict[str, Any]] = {
    "groups of 1, heads of 24": {"heads": 2, "kv_heads": 2, "head_dim": 24},
    "groups of 3, heads that share fragments": {"heads": 6, "kv_heads": 2, "head_dim": 8, "windows": (None, 70)},
    "all biases, more groups of tiles than SMs": {
        "hidden": 144, "intermediate": 604, "qkv_bias": True, "o_bias": True, "mlp_bias": True, "layers": 3,
    },
    "one layer": {"layers": 1},
}  # fmt: skip
EVERY_SHAPE = SHAPES | MORE_SHAPES


def program(spec: Any, batch: int = 32, sms: int = 4, **knobs: Any) -> Program:
    return lower(spec, Config(**knobs), small_target(sms), batch=batch, prefill=batch > 1)


def pair(spec: Any, source: Any, batch: int, **knobs: Any) -> tuple[UnprovenVM, UnprovenVM]:
    """The machine that decodes and the one for prefill beside it."""
    decoder = UnprovenVM(program(spec, 1, **knobs), source)
    return decoder, UnprovenVM(program(spec, batch, **knobs), source, beside=decoder)


def row_errors(vm: UnprovenVM, plain: Any, first: int, stop: int) -> list[float]:
    found = [vm.read_kv(layer, stop) for layer in range(len(plain.keys))]
    return [
        error(rows[:, first:], true[:, first:stop])
        for (keys, values), true_keys, true_values in zip(found, plain.keys, plain.values, strict=True)
        for rows, true in ((keys, true_keys), (values, true_values))
    ]


@pytest.mark.parametrize("batch", [32, 64, 128])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_rows_and_what_is_decoded_from_them_are_the_plain_decoders(
    shape: str, batch: int, make_spec: Any, make_source: Any, plain: Any
) -> None:
    """A whole stretch and a part of one, a token alone, a stretch that begins within a block of KV rows; then tokens one by one."""
    spec = make_spec("bf16", max_context=512, **EVERY_SHAPE[shape])
    source = make_source(spec)
    ends = [batch + 5, batch + 6, 2 * batch + 9]
    tokens = random.Random(batch).choices(range(spec.vocab), k=ends[-1] + 12)
    true = plain(spec, source, tokens)
    decoder, prefill = pair(spec, source, batch, kv_block=16, kv_splits=2)
    for start, stop in zip([0, *ends[:-1]], ends, strict=True):
        prefill.prefill(tokens[start:stop], start)
        assert max(row_errors(decoder, true, start, stop)) < (KV_ERROR if stop - start > 1 else TOKEN_ERROR)
    decoded = decoder.decode(tokens[ends[-1] :], ends[-1], logits=True)
    assert typical_error(decoded.logits, true.logits[ends[-1] :]) < BF16_ERROR


def typical_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The median token's: where two attention scores nearly tie, rounding of x may move one token's logits by several times that."""
    return float(np.median([error(a, b) for a, b in zip(found, expected, strict=True)]))


@pytest.mark.parametrize("seed", range(9))
def test_rows_are_as_near_to_the_plain_decoders_as_decoded_ones(seed: int, make_source: Any, plain: Any) -> None:
    """Random models, configs and cards, the prompt in two parts: with the same rounding rows differ from the plain decoder's by as much."""
    spec = replace(spec_of(seed), max_context=220)
    source, tokens = make_source(spec, seed), random.Random(seed).choices(range(spec.vocab), k=190)
    target, batch, cut = small_target(1 + seed % 7), STRETCHES[seed % 3], random.Random(seed).randrange(1, 189)
    one, other = (UnprovenVM(lower(spec, config_of(seed), target), source) for _ in range(2))
    prefill = UnprovenVM(lower(spec, config_of(seed), target, batch=batch, prefill=True), source, beside=other)
    one.decode(tokens, 0)
    prefill.prefill(tokens[:cut], 0)
    prefill.prefill(tokens[cut:], cut)
    true = plain(spec, source, tokens)
    decoded, prefilled = (np.median([row_errors(vm, true, i, i + 1) for i in range(190)], axis=0) for vm in (one, other))
    assert (prefilled < 1.25 * decoded).all()


def test_late_stretches_see_the_rows_that_decoding_left(make_spec: Any, make_source: Any, plain: Any) -> None:
    spec = make_spec("bf16", windows=(40, None))
    source, tokens = make_source(spec), random.Random(3).choices(range(spec.vocab), k=220)
    true = plain(spec, source, tokens)
    decoder, prefill = pair(spec, source, 32)
    for layer, (keys, values) in enumerate(zip(true.keys, true.values, strict=True)):
        decoder.seed_kv(layer, keys[:, :150], values[:, :150])
    decoder.decode(tokens[150:153], 150)
    prefill.prefill(tokens[153:200], 153)
    assert max(row_errors(decoder, true, 153, 200)) < KV_ERROR
    assert error(decoder.decode(tokens[200:], 200, logits=True).logits, true.logits[200:]) < BF16_ERROR


def test_a_stretch_may_end_with_the_context_and_writes_no_row_of_seats_without_a_token(make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    decoder, prefill = pair(spec, make_source(spec), 32)
    marked = torch.full((spec.kv_heads, decoder.context, spec.head_dim), 3.0)
    for layer in range(spec.layers):
        decoder.seed_kv(layer, marked, marked)
    prefill.prefill([1, 2, 3], 40)
    for layer in range(spec.layers):
        keys, values = decoder.read_kv(layer, decoder.context)
        touched = ((keys != 3).any(dim=(0, 2)) | (values != 3).any(dim=(0, 2))).nonzero().flatten().tolist()
        assert touched == [40, 41, 42]
    prefill.prefill([1, 2, 3], decoder.context - 3)
    assert (decoder.read_kv(0, decoder.context)[0][:, -3:] != 3).any()


@pytest.mark.parametrize(
    "knobs",
    [{"fusion": ("qkv", "gate_up")}, {"page_allocation": "linear"}, {"sm_assignment": "contiguous"}, {"sync": "tags"}, {"n_tile": 64}],
)
def test_what_the_config_says_does_not_change_the_rows(knobs: dict[str, Any], make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16", qkv_bias=True)
    rows = []
    for changed in ({}, knobs):
        decoder, prefill = pair(spec, make_source(spec), 32, **changed)
        prefill.prefill(range(1, 61), 0)
        rows.append(decoder.read_kv(1, 60))
    assert torch.equal(rows[0][0], rows[1][0]) and torch.equal(rows[0][1], rows[1][1])


# ---- actor by actor


@pytest.fixture(scope="module")
def stretch(make_spec: Any, make_source: Any) -> Callable[..., tuple[Any, Any]]:
    """stretch(order, spoil): KV rows of the last layer after two stretches on three SMs, of a program that `spoil` has changed."""
    spec = make_spec("bf16", layers=2, vocab=40, hidden=144, qkv_bias=True, mlp_bias=True)
    source, made = make_source(spec), program(spec, sms=3, threads_per_block=128)

    def run(order: Order | None, spoil: Callable[[Program], Program] = lambda program: program) -> tuple[Any, Any]:
        vm = UnprovenVM(spoil(made), source, order=order)
        vm.prefill(range(1, 39), 0)
        return vm.read_kv(1, 38)

    return run


@pytest.mark.parametrize("seed", range(1, len(ORDERS) + 3))
def test_every_order_of_actors_gives_the_rows_of_whole_tasks(seed: int, stretch: Callable[..., tuple[Any, Any]]) -> None:
    for found, whole in zip(stretch(adversarial(seed)), stretch(None), strict=True):
        assert torch.equal(found, whole)


def _with_tasks(change: Callable[[Instruction], Instruction]) -> Callable[[Program], Program]:
    return lambda made: replace(made, queues=tuple(tuple(map(change, queue)) for queue in made.queues))


SPOILT: dict[str, Callable[[Instruction], Instruction]] = {
    "does not wait": lambda task: replace(task, wait_counter=NONE) if isinstance(task, StretchAttention) else task,
    "waits for all but one": lambda task: replace(task, wait_count=task.wait_count - 1) if isinstance(task, StretchSums) else task,
    "waits for an earlier phase": lambda task: replace(task, wait_counter=0, wait_count=32) if isinstance(task, StretchGlu) else task,
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_task_that_does_not_wait_for_all_that_it_reads_is_found(what: str, stretch: Callable[..., tuple[Any, Any]]) -> None:
    found = set()
    for seed in range(len(ORDERS)):
        try:
            stretch(adversarial(seed), _with_tasks(SPOILT[what]))
        except LaunchFailed as failure:
            found.add((failure.kind, str(failure).partition(":")[0]))
    assert found == {("crash", "nothing orders a task behind what it reads")}


def test_a_task_waits_for_ever_where_too_few_arrive(stretch: Callable[..., tuple[Any, Any]]) -> None:
    def more(task: Instruction) -> Instruction:
        return replace(task, wait_count=task.wait_count + 1) if isinstance(task, SeatQkv) else task

    with pytest.raises(LaunchFailed, match="to reach"):
        stretch(Order("shuffled", 1), _with_tasks(more))


# ---- the weights beside


@pytest.mark.parametrize("knobs", [{}, {"sm_assignment": "contiguous"}, {"n_tile": 64}, {"fusion": ("qkv", "gate_up")}])
def test_all_that_a_stretch_reads_is_in_the_stream_of_one_token(knobs: dict[str, Any], make_spec: Any) -> None:
    spec = make_spec("bf16", vocab=500, layers=3, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    whole = stream_of(program(spec, 1, 5, **knobs))
    for batch in (32, 64, 128):
        part = stream_of(program(spec, batch, 5, **knobs))
        assert whole.begins_with(part) and not part.begins_with(whole)
        assert not replace(whole, tiles=whole.tiles[1:]).begins_with(part)
        assert not replace(whole, constants=whole.constants[1:]).begins_with(part)
    assert not whole.begins_with(stream_of(program(spec, 32, 5, threads_per_block=128, **knobs)))
    assert not whole.begins_with(stream_of(program(replace(spec, o_bias=False), 32, 5, **knobs)))


@pytest.mark.parametrize("hidden", [512, 2048])
def test_weights_are_cut_as_those_of_one_token_where_wide_stretches_leave_few_stages(hidden: int, make_spec: Any) -> None:
    spec = make_spec("bf16", hidden=hidden, vocab=5000, intermediate=4 * hidden)
    for batch in (32, 64, 128):
        assert stream_of(program(spec, 1)).begins_with(stream_of(program(spec, batch)))


def test_a_program_runs_from_its_packed_bytes(make_spec: Any) -> None:
    made = program(make_spec("bf16", vocab=300), 128)
    assert unpack_program(pack_program(made), made) == made


# ---- mutants of the meaning are found by the rows


def _late_rotation(memory: Any, heads: Any, gain: int, place: int) -> Any:
    return rotate_heads(memory, heads, gain, place + (place >= 16))


def _stale_row(self: SeatQkv, memory: Any, position: int) -> Any:
    return RUN(replace(self, seat=max(0, self.seat - 1)), memory, position)


def _hidden(task: Instruction) -> Instruction:
    return replace(task, window=1) if isinstance(task, StretchAttention) else task


def _without_the_last_run(task: Instruction) -> Instruction:
    return replace(task, runs=task.runs - 1) if isinstance(task, StretchSums) and task.runs > 1 else task


RUN = SeatQkv.run
MEANINGS = {
    "rotation of the next position": (seat_qkv, "rotate_heads", _late_rotation),
    "the row of the seat before": (SeatQkv, "run", _stale_row),
}
TASKS = {"a window that hides old rows": _hidden, "a run of K left out": _without_the_last_run}


@pytest.mark.parametrize("mutant", [*MEANINGS, *TASKS])
def test_wrong_meanings_are_seen_in_the_rows(mutant: str, make_spec: Any, make_source: Any, plain: Any, monkeypatch: Any) -> None:
    spec = make_spec("bf16", layers=3, hidden=144)
    source, tokens = make_source(spec), random.Random(5).choices(range(spec.vocab), k=70)
    decoder, prefill = pair(spec, source, 32)
    if mutant in MEANINGS:
        monkeypatch.setattr(*MEANINGS[mutant])
    else:
        prefill.program = _with_tasks(TASKS[mutant])(prefill.program)
    try:
        prefill.prefill(tokens, 0)
    except LaunchFailed:
        return
    assert max(row_errors(decoder, plain(spec, source, tokens), 0, 70)) > 2 * KV_ERROR


def test_unreasonable_requests_are_refused_in_one_sentence(make_spec: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    decoder, prefill = pair(spec, make_source(spec), 32)
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
        UnprovenVM(program(replace(spec, o_bias=True), 32), make_source(spec), beside=decoder)


@pytest.mark.parametrize(
    ("batch", "sizes", "knobs", "message"),
    [
        (1, {}, {}, r"batch: must be one of \(32, 64, 128\), but got 1"),
        (8, {}, {}, r"batch: must be one of \(32, 64, 128\), but got 8"),
        (32, {"heads": 3, "kv_heads": 3, "head_dim": 8}, {}, "model.heads: must be such that they have whole runs of 16 columns"),
        (32, {}, {"fusion": ("norm", "gate_up")}, "fusion_grouping: must be qkv and gate_up among them for prefill"),
        (32, {}, {"fusion": ("norm", "qkv")}, "fusion_grouping: must be qkv and gate_up among them for prefill"),
        (128, {}, {"smem_bytes_per_block": 8191 + 1, "stage_bytes": 8192, "n_tile": 16}, None),
    ],
)
def test_what_has_no_program_for_prefill_says_why(
    batch: int, sizes: dict[str, Any], knobs: dict[str, Any], message: str | None, make_spec: Any
) -> None:
    spec = make_spec("bf16", **sizes)
    if message is None:
        assert lower(spec, Config(**knobs), small_target(4), batch=batch, prefill=True).machine.stages == 1
        return
    with pytest.raises(ConfigRejected, match=message):
        lower(spec, Config(**knobs), small_target(4), batch=batch, prefill=True)
