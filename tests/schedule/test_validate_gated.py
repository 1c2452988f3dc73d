"""The rules of values without tags, one by one: a program that breaks only that one is rejected, its last legal neighbour is proven."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from random import Random
from typing import Any

import pytest

from amk.eval.soundness.explorer import explore
from amk.eval.soundness.random_stretches import random_stretch
from amk.eval.soundness.trace import check_traces
from amk.isa.abi import NONE
from amk.isa.attention import Attention
from amk.isa.instruction import Instruction
from amk.isa.registry import instructions
from amk.isa.seat_norm import SeatNorm
from amk.isa.seat_qkv import SeatQkv
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_glu import StretchGlu
from amk.isa.stretch_matmul import StretchMatMul
from amk.isa.stretch_sums import StretchSums
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import Buffer, Program, TaskId
from amk.schedule.proof.report import Rejection
from amk.schedule.proven import ValidProgram
from amk.schedule.targets import small_target
from amk.schedule.validate import validate
from amk.tests.schedule.builder import changed, changed_all, find
from amk.tests.schedule.specs import TINY

SPEC = replace(TINY, layers=3, windows=())
BATCH = 32


@cache
def stretch(page_allocation: str = "linear") -> Program:
    """Three layers on 7 SMs, of which the last makes rows alone; K of the products has more than one share."""
    return lower(SPEC, Config(page_allocation=page_allocation), small_target(7), batch=BATCH, prefill=True)


def proven(program: Program) -> bool:
    """Whether it is proven; the trace checker must say the same."""
    verdict, found = isinstance(validate(program), ValidProgram), check_traces(program, Random(0), orders=4)
    assert verdict == (found is None), (validate(program), found)
    return verdict


def broken(program: Program, kind: str, *told: str) -> Rejection:
    """A rejection that says what is `told`, of a program that must have some, all of one kind; the trace checker finds something too."""
    verdict = validate(program)
    assert isinstance(verdict, tuple) and {rejection.kind for rejection in verdict} == {kind}, [str(r) for r in verdict][:4]
    assert check_traces(program, Random(0), orders=4) is not None
    found = next((rejection for rejection in verdict if all(part in rejection.message for part in told)), None)
    assert found is not None, [str(r) for r in verdict]
    return found


def named(program: Program, name: str) -> int:
    return next(i for i, buffer in enumerate(program.buffers) if buffer.name == name)


def moved(program: Program, name: str, to: str, by: int = 0) -> Program:
    """A buffer comes to lie where another one does, `by` packets further."""
    at, offset = named(program, name), program.buffers[named(program, to)].offset + by
    return with_buffer(program, at, offset=offset)


def with_buffer(program: Program, at: int, **changes: Any) -> Program:
    buffer: Buffer = replace(program.buffers[at], **changes)
    return replace(program, buffers=(*program.buffers[:at], buffer, *program.buffers[at + 1 :]))


def task_of(program: Program, at: TaskId) -> Any:
    return program.task(at)


def first(program: Program, cls: type[Instruction], **words: int) -> TaskId:
    return find(program, cls, **words)[0]


def test_lowerings_are_proven_and_share_k_and_slots() -> None:
    shared = stretch("graph_color")
    assert proven(stretch()) and proven(shared)
    assert any(task.share > 0 for task in map(shared.task, find(shared, StretchSums)) if isinstance(task, StretchSums))
    assert len({buffer.offset for buffer in shared.buffers}) < len(shared.buffers)


def test_accesses_of_gated_instructions_are_all_gated_and_of_others_none() -> None:
    program = stretch()
    for task in (task for queue in program.queues for task in queue):
        accesses = (*task.reads(program.machine, 0), *task.writes(program.machine, 0))
        assert task.gated and all(access.gated for access in accesses)
    stems = {stem for stem, cls in instructions().items() if cls.gated}
    assert stems == {"seat_norm", "seat_qkv", "stretch_sums", "stretch_glu", "stretch_attention"}


# ---- gated values alone


def test_a_task_with_tags_among_gated_ones_is_rejected_and_the_other_way_round() -> None:
    program, decoder = stretch(), lower(SPEC, Config(), small_target(7), batch=8)
    for host, guest in ((program, decoder.queues[0][0]), (decoder, program.queues[0][0])):
        mixed = replace(host, queues=((guest, *host.queues[0]), *host.queues[1:]))
        mixed = replace(mixed, streams=(tuple(i + 1 for i in host.streams[0]), *host.streams[1:]))
        verdict = validate(mixed)
        assert isinstance(verdict, tuple) and any("has no place on a machine" in str(reason) for reason in verdict)
        assert check_traces(mixed, Random(0), orders=1) is not None


# ---- gates


def gate(program: Program, at: TaskId, **words: int) -> Program:
    return changed(program, at, **words)


def arrivals(program: Program, counter: int) -> int:
    return sum(task.done_counter == counter for queue in program.queues for task in queue)


READERS: tuple[type[Instruction], ...] = (SeatNorm, SeatQkv, StretchSums, StretchGlu, StretchAttention)


def waiting(program: Program, cls: type[Instruction]) -> TaskId:
    """The last task of a class, which waits for something."""
    return next(at for at in reversed(find(program, cls)) if program.task(at).wait_counter != NONE)


@pytest.mark.parametrize("cls", READERS, ids=lambda cls: cls.stem)
def test_a_wait_for_one_arrival_fewer_orders_nothing(cls: type[Instruction]) -> None:
    program = stretch()
    at = waiting(program, cls)
    task = program.task(at)
    found = broken(gate(program, at, wait_count=task.wait_count - 1), "race", "has no tag, and nothing orders", f"{task.wait_count - 1} of")
    assert at in found.tasks and len(found.tasks) > 1 and found.regions


@pytest.mark.parametrize("cls", READERS, ids=lambda cls: cls.stem)
def test_a_reader_that_waits_for_no_counter_is_a_race(cls: type[Instruction]) -> None:
    program = stretch()
    at = waiting(program, cls)
    found = broken(gate(program, at, wait_counter=NONE, wait_count=0), "race", "who reads waits for none")
    assert at in found.tasks


@pytest.mark.parametrize("cls", READERS, ids=lambda cls: cls.stem)
def test_a_reader_behind_all_of_an_earlier_phase_is_a_race(cls: type[Instruction]) -> None:
    program = stretch()
    at = waiting(program, cls)
    broken(gate(program, at, wait_counter=0, wait_count=arrivals(program, 0)), "race", "which is not behind it")


def test_a_reader_may_be_behind_its_writers_through_other_tasks() -> None:
    """One product task has a counter of its own, for which alone seat_qkv waits: enough where that task waits for all the others."""
    program = replace(stretch(), counters=(*stretch().counters, "alone"))
    alone, seats = len(program.counters) - 1, find(program, SeatQkv, layer=0)
    products = find(program, StretchSums, weight=0)
    last = max(products)  # no other product is behind it in its queue
    behind = changed_all(program, {at: {"wait_counter": alone, "wait_count": 1} for at in seats} | {last: {"done_counter": alone}})
    found = broken(behind, "race", "who reads waits for alone, which is not behind it")
    assert set(found.tasks) <= {*seats, *products}
    counter = program.task(last).done_counter
    assert proven(changed(behind, last, wait_counter=counter, wait_count=len(products) - 1))


def test_a_writer_that_arrives_at_no_counter_is_a_race() -> None:
    program = stretch()
    at = first(program, StretchSums)
    counter = program.task(at).done_counter
    waiters = [(sm, i) for sm, q in enumerate(program.queues) for i, task in enumerate(q) if task.wait_counter == counter]
    quiet = changed_all(changed(program, at, done_counter=NONE), {w: {"wait_count": arrivals(program, counter) - 1} for w in waiters})
    found = broken(quiet, "race", "who writes arrives at no counter")
    assert at in found.tasks


def test_a_chain_of_gates_breaks_in_its_middle() -> None:
    """seat_norm reads the residual of two phases before; the product between waits for fewer, so nobody is behind that residual's phase."""
    program = stretch()
    norm = program.task(first(program, SeatNorm))
    products = [at for at in find(program, StretchSums) if program.task(at).wait_counter == norm.done_counter]
    loose = changed_all(program, {at: {"wait_count": BATCH - 1} for at in products})
    verdict = validate(loose)
    assert isinstance(verdict, tuple) and {reason.kind for reason in verdict} == {"race"}
    assert any("seat_norm" in str(reason).split(" and tasks ")[0] and ".h[" in str(reason) for reason in verdict)


# ---- buffers


def test_buffers_share_all_of_their_packets_or_none() -> None:
    program = stretch()
    x, later = "L0.input_norm", "L0.post_norm"
    assert proven(moved(program, later, x))  # its readers are all behind
    half = program.buffers[named(program, x)].packets // 2
    found = broken(moved(program, later, x, half), "kind", "share some packets")
    assert {region.name for region in found.regions} == {x, later}


def test_buffers_of_other_kinds_or_sizes_share_nothing() -> None:
    program = stretch()
    broken(moved(program, "L1.qkv", "L0.input_norm"), "kind", "share some packets")
    broken(moved(program, "L0.q", "L0.input_norm"), "kind", "share some packets")


def test_buffers_begin_where_copies_can() -> None:
    program = stretch()
    at = max(range(len(program.buffers)), key=lambda i: program.buffers[i].offset)
    end = replace(program, arena_packets=program.arena_packets + 16)
    offset = program.buffers[at].offset
    assert proven(with_buffer(end, at, offset=offset + 4))
    broken(with_buffer(end, at, offset=offset + 2), "bounds", "multiple of 4")


def test_what_is_read_in_an_order_of_its_own_is_a_whole_buffer() -> None:
    program = stretch()
    at = max(range(len(program.buffers)), key=lambda i: program.buffers[i].offset)
    last = program.buffers[at]
    longer = with_buffer(replace(program, arena_packets=program.arena_packets + 16), at, packets=last.packets + 16)
    found = broken(longer, "bounds", "which is all of a buffer")
    assert found.regions[0].name == last.name


# ---- orders


@pytest.mark.parametrize("cls", [StretchSums, StretchGlu])
def test_x_in_another_order_than_it_was_written_is_another_kind(cls: type[StretchMatMul]) -> None:
    program = stretch()
    at = find(program, cls)[-1]
    task: Any = program.task(at)
    wrong = changed(program, at, x_order=(task.x_order + 1) % 3)
    verdict = validate(wrong)
    assert isinstance(verdict, tuple) and {reason.kind for reason in verdict} == {"kind"}
    assert any("narrow (x by" in str(reason) for reason in verdict) and check_traces(wrong, Random(0), orders=1) is not None


def test_q_and_k_with_v_are_no_x_and_not_each_other() -> None:
    """Of two query heads and one KV head with padded rows all three values have as many packets."""
    spec = replace(SPEC, head_dim=16, hidden=32)
    program = lower(spec, Config(page_allocation="linear"), small_target(3), batch=BATCH, prefill=True)
    assert proven(program)
    attends, output = find(program, StretchAttention, layer=0), find(program, StretchSums, weight=1)
    task = task_of(program, attends[0])
    swapped = {"q_buf": task.kv_buf, "q_tag": task.kv_tag, "kv_buf": task.q_buf, "kv_tag": task.q_tag}
    verdict = validate(changed_all(program, dict.fromkeys(attends, swapped)))
    assert isinstance(verdict, tuple) and any("narrow (q) packets" in str(r) and "publishes narrow (kv)" in str(r) for r in verdict)
    assert check_traces(changed_all(program, dict.fromkeys(attends, swapped)), Random(0), orders=1) is not None
    for word in ("q", "kv"):
        taken = {"x_buf": getattr(task, f"{word}_buf"), "x_tag": getattr(task, f"{word}_tag")}
        broken(changed_all(program, dict.fromkeys(output, taken)), "kind", "narrow (x by head)", f"narrow ({word})")


# ---- overwrites


def test_a_value_that_others_still_read_is_not_written_over() -> None:
    """Attention of 8 seats would write over the q of the other seats, which their tasks read."""
    found = broken(moved(stretch(), "L0.attention", "L0.q"), "race")
    assert any(region.name in ("L0.q", "L0.attention") for region in found.regions)


def test_a_residual_row_is_written_over_by_its_own_seat_alone() -> None:
    program = moved(stretch(), "L0.post_norm.h", "L0.input_norm.h")
    assert proven(program)
    one, other = [at for at in find(program, SeatNorm) if task_of(program, at).h_buf == named(program, "L0.post_norm.h")][:2]
    seats = {one: {"seat": task_of(program, other).seat}, other: {"seat": task_of(program, one).seat}}
    assert proven(changed_all(program, seats))


def single() -> Program:
    """A program of 8 seats with one attention task a layer, whose output has as many packets as q."""
    programs = (random_stretch(Random(number)) for number in range(200))
    return next(p for p in programs if find(p, StretchAttention) and isinstance(validate(p), ValidProgram))


def test_the_only_reader_of_a_value_does_not_write_over_it_either() -> None:
    """Nobody else reads q, but a task's warps publish while others of it still read."""
    program = single()
    task = task_of(program, first(program, StretchAttention))
    over = with_buffer(program, task.out_buf, offset=program.buffers[task.q_buf].offset)
    verdict = validate(over)
    assert isinstance(verdict, tuple) and "while it still reads that" in str(verdict[0])
    assert explore(over) is not None and check_traces(over, Random(0), orders=2) is not None


# ---- deadlocks and the ring


def test_a_task_ahead_of_its_own_gate_is_a_deadlock() -> None:
    program = stretch()
    sm = next(sm for sm, queue in enumerate(program.queues) if len(queue) > 4)
    queue = program.queues[sm]
    turned = replace(program, queues=(*program.queues[:sm], queue[::-1], *program.queues[sm + 1 :]))
    streams = tuple(tuple(i for i, task in enumerate(q) if task.streamed) for q in turned.queues)
    broken(replace(turned, streams=streams), "deadlock", "wait for each other")


def test_weights_go_no_further_ahead_than_the_ring() -> None:
    program = stretch()
    stages = max(1, program.machine.inflight)
    assert proven(replace(program, machine=replace(program.machine, stages=stages, inflight=stages)))
    ahead = replace(program, machine=replace(program.machine, stages=1, inflight=2))
    verdict = validate(ahead)
    assert isinstance(verdict, tuple) and verdict[0].kind == "deadlock" and "inflight" in str(verdict[0])
    throttled = validate(replace(program, machine=replace(program.machine, stages=3, inflight=3, throttled=1, watermark=2)))
    assert isinstance(throttled, tuple) and throttled[0].kind == "deadlock" and "holds back" in str(throttled[0])
    assert any(task_of(program, at).runs > 1 for at in find(program, StretchGlu))
    found = check_traces(ahead, Random(0), orders=1), explore(ahead)
    assert all(problem is not None and problem.kind == "deadlock" for problem in found)


def test_a_stream_in_another_order_than_its_queue_and_a_slot_too_small_are_found() -> None:
    program = stretch()
    sm = next(sm for sm, stream in enumerate(program.streams) if len(stream) > 1)
    stream = program.streams[sm]
    turned = replace(program, streams=(*program.streams[:sm], (stream[1], stream[0], *stream[2:]), *program.streams[sm + 1 :]))
    broken(turned, "ring", f"the stream of SM {sm} must have its queue's order")
    broken(replace(program, machine=replace(program.machine, slot=program.machine.slot - 16)), "ring", "bytes of a ring slot")


def test_a_slot_of_its_own_size_is_for_prefill_alone() -> None:
    decoder = lower(SPEC, Config(), small_target(3))
    odd = replace(decoder, machine=replace(decoder.machine, slot=decoder.machine.stage_bytes // 2))
    broken(odd, "ring", "machine.slot must be 0")


# ---- everything once


def last_share(program: Program) -> TaskId:
    """A task of a share that is not the first."""
    return next(at for at in find(program, StretchSums) if task_of(program, at).share > 0)


COVERAGE: dict[str, tuple[Callable[[Program], tuple[TaskId, dict[str, int]]], str]] = {
    "a run less": (lambda p: (last_share(p), {"run0": task_of(p, last_share(p)).run0 - 1}), "all compute rows"),
    "a share twice": (lambda p: (last_share(p), {"share": 0}), "share"),
    "a share beyond": (lambda p: (last_share(p), {"share": task_of(p, last_share(p)).share + 7}), "share"),
    "a seat's norm twice": (lambda p: (first(p, SeatNorm, seat=3), {"seat": 4}), "seat 4"),
    "a seat's rows twice": (lambda p: (first(p, SeatQkv, seat=3, layer=1), {"seat": 4}), "seat 4"),
    "rows of another layer": (lambda p: (first(p, SeatQkv, seat=3, layer=1), {"layer": 2}), "seat 3"),
    "a head's seats twice": (lambda p: (first(p, StretchAttention, seat0=8, layer=1), {"seat0": 16}), "seat0 16"),
    "another window": (lambda p: (first(p, StretchAttention, seat0=8, layer=1), {"window": 5}), "differ in window"),
    "another gain": (lambda p: (first(p, SeatNorm, seat=3), {"gain": 8}), "differ in gain"),
    "fewer shares added": (lambda p: (first(p, SeatQkv, seat=3, layer=1), {"shares": 1}), "differ in shares"),
    "another layer's attention": (lambda p: (first(p, StretchAttention, seat0=8, layer=1), {"layer": 0}), "seat0 8"),
}


@pytest.mark.parametrize("case", COVERAGE)
def test_what_is_computed_twice_or_not_at_all_is_found(case: str) -> None:
    program = stretch()
    change, told = COVERAGE[case]
    at, words = change(program)
    wrong = changed(program, at, **words)
    verdict = validate(wrong)
    assert isinstance(verdict, tuple) and any(r.kind == "coverage" and told in str(r) for r in verdict), [str(r) for r in verdict]
    assert any(at in r.tasks for r in verdict) and check_traces(wrong, Random(0), orders=1) is not None


def test_who_adds_shares_adds_all_of_one_matrix() -> None:
    """All seats add too few, or the sums of a matrix of as many rows that is not theirs."""
    program = stretch()
    seats = find(program, SeatQkv, layer=1)
    fewer = changed_all(program, {at: {"shares": task_of(program, at).shares - 1} for at in seats})
    verdict = validate(fewer)
    assert isinstance(verdict, tuple) and check_traces(fewer, Random(0), orders=1) is not None
    other = task_of(program, find(program, SeatQkv, layer=0)[0])
    taken = changed_all(program, dict.fromkeys(seats, {"sums_buf": other.sums_buf, "sums_tag": other.sums_tag}))
    assert proven(taken)  # an odd model, but every value is what its reader takes it for
    norms = [at for at in find(program, SeatNorm) if task_of(program, at).res_buf != NONE]
    norm = task_of(program, norms[0])
    wrong = changed_all(program, dict.fromkeys(norms, {"sums_buf": other.sums_buf, "sums_tag": other.sums_tag, "shares": other.shares}))
    assert norm.sums_buf != other.sums_buf
    found = validate(wrong)
    assert isinstance(found, tuple) and any("sums of 64 rows" in str(reason) for reason in found), [str(r) for r in found]
    assert check_traces(wrong, Random(0), orders=1) is not None


def test_shares_may_change_places_and_groups_may_share_k_differently() -> None:
    program = stretch()
    at = last_share(program)
    task = task_of(program, at)
    other = first(program, StretchSums, weight=task.weight, tile0=task.tile0, share=0)
    assert proven(changed_all(program, {at: {"share": 0}, other: {"share": task.share}}))


def test_attention_of_a_layer_is_where_its_q_is_published() -> None:
    program = stretch()
    seats, attends = find(program, SeatQkv, layer=2), find(program, StretchAttention, layer=1)
    assert all(task_of(program, at).q_buf == NONE for at in seats)
    more = changed_all(program, dict.fromkeys(attends, {"layer": 2}))
    verdict = validate(more)
    assert isinstance(verdict, tuple) and any("of which no q is published" in str(reason) for reason in verdict)
    assert check_traces(more, Random(0), orders=1) is not None


def test_attention_takes_q_k_and_v_of_its_own_layer() -> None:
    program = stretch()
    attends, other = find(program, StretchAttention, layer=1), task_of(program, first(program, SeatQkv, layer=0))
    for words in ({"q_buf": other.q_buf, "q_tag": other.q_tag}, {"kv_buf": other.kv_buf, "kv_tag": other.kv_tag}):
        broken(changed_all(program, dict.fromkeys(attends, words)), "kind", "but is in another layer")


# ---- words

WORDS: tuple[tuple[type[Instruction], dict[str, int], str], ...] = (
    (SeatNorm, {"seat": BATCH}, "bounds"),
    (SeatNorm, {"batch": 64}, "kind"),
    (SeatNorm, {"gain": 1 << 20}, "bounds"),
    (SeatNorm, {"gain": 2}, "bounds"),
    (SeatNorm, {"gain": -1}, "bounds"),
    (SeatNorm, {"bias": 1 << 20}, "bounds"),
    (SeatQkv, {"seat": BATCH}, "bounds"),
    (SeatQkv, {"layer": 3}, "bounds"),
    (SeatQkv, {"shares": 0}, "bounds"),
    (SeatQkv, {"shares": 9}, "bounds"),
    (SeatQkv, {"q_gain": 1 << 20}, "bounds"),
    (SeatQkv, {"bias": 6}, "bounds"),
    (StretchAttention, {"seat0": 4}, "bounds"),
    (StretchAttention, {"seat0": BATCH}, "bounds"),
    (StretchAttention, {"kv_head": 1}, "bounds"),
    (StretchAttention, {"layer": 3}, "bounds"),
    (StretchAttention, {"window": -1}, "bounds"),
    (StretchSums, {"weight": 99}, "bounds"),
    (StretchSums, {"rows": 48}, "kind"),
    (StretchSums, {"tile0": 4}, "bounds"),
    (StretchSums, {"tiles": 1}, "bounds"),
    (StretchSums, {"run0": 99}, "bounds"),
    (StretchSums, {"runs": 0}, "bounds"),
    (StretchSums, {"runs": 99}, "bounds"),
    (StretchSums, {"x_order": 3}, "kind"),
    (StretchSums, {"shape": 99}, "bounds"),
    (StretchGlu, {"bias": 1 << 20}, "bounds"),
    (StretchGlu, {"weight": 0}, "kind"),
)


@pytest.mark.parametrize(("cls", "words", "kind"), WORDS, ids=lambda value: getattr(value, "stem", str(value)))
def test_words_out_of_range_are_rejected(cls: type[Instruction], words: dict[str, int], kind: str) -> None:
    program = stretch()
    at = find(program, cls)[-1]
    wrong = changed(program, at, **words)
    verdict = validate(wrong)
    assert isinstance(verdict, tuple) and any(reason.kind == kind and at in reason.tasks for reason in verdict), [str(r) for r in verdict]
    assert check_traces(wrong, Random(0), orders=1) is not None


@pytest.mark.parametrize("name", ["q_gain", "k_gain"])
@pytest.mark.parametrize("cls", [SeatQkv, Attention], ids=lambda cls: cls.stem)
def test_a_machine_that_norms_heads_has_a_gain_for_them(cls: type[Instruction], name: str) -> None:
    """The device norms every head of such a machine: without a gain it would take what lies before the constants."""
    sizes: dict[str, Any] = {"batch": BATCH, "prefill": True} if cls is SeatQkv else {}
    program = lower(replace(SPEC, qk_norm=True), Config(), small_target(7), **sizes)
    assert isinstance(validate(program), ValidProgram)
    broken(changed_all(program, dict.fromkeys(find(program, cls), {name: -1})), "bounds", f"as its {name}")
    unclear = validate(replace(program, machine=replace(program.machine, qk_norm=None)))  # type: ignore[arg-type]
    assert isinstance(unclear, tuple) and "qk_norm must be True or False" in str(unclear[0])


def test_rows_of_a_stretch_are_whole_fragments() -> None:
    program = stretch()
    for sizes in ({"hidden": 72}, {"heads": 3, "kv_heads": 3}, {"head_dim": 6}):
        wrong = replace(program, machine=replace(program.machine, **sizes))  # type: ignore[arg-type]
        verdict = validate(wrong)
        assert isinstance(verdict, tuple) and any("a machine for prefill must have" in str(reason) for reason in verdict)
        assert check_traces(wrong, Random(0), orders=1) is not None
