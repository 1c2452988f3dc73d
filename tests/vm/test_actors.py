"""The machine actor by actor: one answer in every order, and each broken rule found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from amk.isa.attention import Attention
from amk.isa.matvec import MatVec
from amk.schedule.program import Program
from amk.vm.actors import Sm
from amk.vm.interface import Decoded, LaunchFailed
from amk.vm.reference import UnprovenVM
from amk.vm.scheduler import ORDERS, Order, adversarial

START = 46  # old rows are streamed from here on, and rows of the launch itself 18 tokens later


@pytest.fixture(scope="module")
def spec(make_spec: Any) -> Any:
    return make_spec("bf16", layers=2, windows=(None, 40))


@pytest.fixture(scope="module")
def program(spec: Any, make_program: Any) -> Program:
    built: Program = make_program(spec, sms=3, kv_block=16, kv_splits=2, threads_per_block=128)
    return built


@pytest.fixture(scope="module")
def decode(spec: Any, make_source: Any) -> Callable[..., Decoded]:
    """decode(program, order, steps=...): from position START on rows that are known."""
    source = make_source(spec)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randn(2, spec.kv_heads, START, spec.head_dim, generator=generator) for _ in range(spec.layers)]

    def run(program: Program, order: Order | None, steps: int = 24, **options: Any) -> Decoded:
        vm = UnprovenVM(program, source, order=order, **options)
        for layer, (keys, values) in enumerate(rows):
            vm.seed_kv(layer, keys, values)
        return vm.decode([5, 6], START, steps=steps, logits=True)

    return run


@pytest.fixture(scope="module")
def answer(program: Program, decode: Callable[..., Decoded]) -> Decoded:
    return decode(program, Order("sequential"))


@pytest.mark.parametrize("seed", range(1, 2 * len(ORDERS)))
def test_every_order_gives_the_same_bits(seed: int, program: Program, decode: Callable[..., Decoded], answer: Decoded) -> None:
    decoded = decode(program, adversarial(seed))
    assert decoded.tokens == answer.tokens
    assert torch.equal(decoded.logits, answer.logits)


def test_actors_and_whole_tasks_agree_within_rounding(program: Program, decode: Callable[..., Decoded], answer: Decoded) -> None:
    whole = decode(program, None)
    assert (whole.logits[:2] - answer.logits[:2]).abs().max() < 0.04 * answer.logits.std()


def test_actors_agree_with_whole_tasks_in_fp32_with_every_epilogue(make_spec: Any, make_program: Any, make_source: Any) -> None:
    spec = make_spec(qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True)
    source = make_source(spec)
    for fusion in ((), ("norm", "qkv", "gate_up")):
        program = make_program(spec, sms=3, fusion=fusion, n_tile=32)
        whole = UnprovenVM(program, source).decode([1, 2, 3], 0, logits=True)
        actors = UnprovenVM(program, source, order=Order("shuffled", 1)).decode([1, 2, 3], 0, logits=True)
        assert (whole.logits - actors.logits).abs().max() < 1e-5 * whole.logits.std()


@pytest.mark.parametrize("before", [3, 4, 5])
def test_counters_and_tags_near_the_wrap_change_nothing(
    before: int, program: Program, decode: Callable[..., Decoded], answer: Decoded
) -> None:
    last_epoch = (2**32 - 1) // program.machine.tags
    decoded = decode(program, adversarial(before), steps=4, first_epoch=last_epoch - before)
    assert torch.equal(decoded.logits, answer.logits[:4])


def edited(program: Program, edit: Callable[[list[list[Any]], list[list[int]]], None]) -> Program:
    queues, streams = [list(queue) for queue in program.queues], [list(stream) for stream in program.streams]
    edit(queues, streams)
    return replace(program, queues=tuple(map(tuple, queues)), streams=tuple(map(tuple, streams)))


def test_a_reader_queued_before_its_writer_is_a_deadlock_that_names_who_waits(program: Program, decode: Callable[..., Decoded]) -> None:
    def reverse(queues: list[list[Any]], streams: list[list[int]]) -> None:
        queues[0].reverse()
        streams[0] = sorted(len(queues[0]) - 1 - index for index in streams[0])

    with pytest.raises(LaunchFailed, match="no actor can step: SM 0 watcher waits for counter .* to reach") as failure:
        decode(edited(program, reverse), Order("random", 1), steps=2)
    assert failure.value.kind == "timeout"


def test_a_tag_off_by_one_is_a_hang(program: Program, decode: Callable[..., Decoded]) -> None:
    def retag(queues: list[list[Any]], streams: list[list[int]]) -> None:
        index = next(i for i, task in enumerate(queues[1]) if isinstance(task, MatVec))
        queues[1][index] = replace(queues[1][index], x_tag=queues[1][index].x_tag + 1)

    with pytest.raises(LaunchFailed, match="to carry tag"):
        decode(edited(program, retag), Order("random", 1), steps=2)


def test_a_stream_in_another_order_than_the_queue_is_found(program: Program, decode: Callable[..., Decoded]) -> None:
    def swap(queues: list[list[Any]], streams: list[list[int]]) -> None:
        streams[0][:2] = reversed(streams[0][:2])

    with pytest.raises(LaunchFailed, match="must find chunk 0 of task"):
        decode(edited(program, swap), Order("sequential"), steps=2)


def test_a_threshold_that_is_never_reached_is_a_hang(program: Program, decode: Callable[..., Decoded]) -> None:
    def raise_count(queues: list[list[Any]], streams: list[list[int]]) -> None:
        sm, index = next((s, i) for s, q in enumerate(queues) for i, t in enumerate(q) if t.wait_counter != 0xFFFF and not t.carried)
        queues[sm][index] = replace(queues[sm][index], wait_count=queues[sm][index].wait_count + 1)

    with pytest.raises(LaunchFailed, match="counter"):
        decode(edited(program, raise_count), Order("sequential"), steps=2)


def test_rows_streamed_before_they_are_visible_change_the_answer(program: Program, decode: Callable[..., Decoded], answer: Decoded) -> None:
    deep = replace(program.machine, stages=1000, inflight=1000)  # lets a feeder be 20 tokens ahead
    eager, late, early = Order("eager_feeder", 1), replace(program, machine=deep), replace(program, machine=replace(deep, kv_lag=60))
    assert torch.equal(decode(late, eager).logits, answer.logits)
    assert not torch.equal(decode(early, eager).logits, answer.logits)


def test_a_ring_of_two_stages_and_one_reduction_slot_still_gives_the_answer(
    program: Program, decode: Callable[..., Decoded], answer: Decoded
) -> None:
    narrow = replace(program, machine=replace(program.machine, stages=2, inflight=1, reduction_slots=1))
    assert torch.equal(decode(narrow, adversarial(3), steps=6).logits, answer.logits[:6])


@pytest.mark.parametrize(("stages", "throttled", "watermark"), [(2, 1, 1), (4, 1, 1), (4, 1, 3), (5, 2, 3)])
def test_a_throttled_feeder_holds_back_and_gives_the_answer(
    stages: int, throttled: int, watermark: int, program: Program, decode: Callable[..., Decoded], answer: Decoded, monkeypatch: Any
) -> None:
    """By every order that lets one actor run ahead: never more copies under way than may be, as many where the ring runs low."""
    most = {True: 0, False: 0}  # copies under way after one has begun, by whether the ring was well filled before

    def may_copy(sm: Any, original: Any = Sm._may_copy) -> bool:
        held, copying, allowed = sm.started - min(sm.taken), len(sm.under_way), original(sm)
        if allowed:
            most[held >= watermark] = max(most[held >= watermark], copying + 1)
        return allowed

    monkeypatch.setattr(Sm, "_may_copy", may_copy)
    machine = replace(program.machine, stages=stages, inflight=stages, throttled=throttled, watermark=watermark)
    for order in (Order("sequential"), Order("eager_feeder", 1), adversarial(3)):
        assert torch.equal(decode(replace(program, machine=machine), order, steps=4).logits, answer.logits[:4])
    assert 1 <= most[True] <= throttled
    assert most[False] <= watermark and (most[False] > throttled or watermark <= throttled)


def test_splits_without_rows_are_skipped_and_still_arrive(
    program: Program, decode: Callable[..., Decoded], spec: Any, make_source: Any
) -> None:
    assert any(isinstance(task, Attention) and not task.active(0) for queue in program.queues for task in queue)
    vm = UnprovenVM(program, make_source(spec), order=Order("lazy_publishes", 2))
    assert len(vm.decode([1], 0, steps=3).tokens) == 3


def test_an_unknown_order_is_refused() -> None:
    with pytest.raises(ValueError, match="order: must be one of sequential, .*, but got fastest"):
        Order("fastest")


def test_an_unchecked_read_of_a_packet_never_published_is_found(program: Program, decode: Callable[..., Decoded]) -> None:
    def uncheck(queues: list[list[Any]], streams: list[list[int]]) -> None:
        sm, index = next((s, i) for s, q in enumerate(queues) for i, t in enumerate(q) if isinstance(t, MatVec))
        queues[sm][index] = replace(queues[sm][index], x_tag=0, wait_counter=0xFFFF)

    with pytest.raises(LaunchFailed, match="must be published before its unchecked read"):
        decode(edited(program, uncheck), Order("lazy_publishes", 1), steps=2)
