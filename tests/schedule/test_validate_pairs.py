"""Where the device takes packets two at a time they lie at an even one: an access of 16 bytes at an odd packet would be misaligned. So do
gains that it takes two or four at a time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from amk.eval.soundness.static_rules import static_problem
from amk.isa.attention import Attention
from amk.isa.gemv import Gemv
from amk.isa.matvec import X_NARROW, X_NORM, MatVec
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import Buffer, MatVecShape, Program
from amk.schedule.proven import ValidProgram
from amk.schedule.targets import small_target
from amk.schedule.validate import validate
from amk.tests.schedule.builder import changed_all, find, reshaped
from amk.tests.schedule.specs import SMALL

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "draw": {"chooser": "draw"},
    "filter": {"chooser": "filter"},
    "batch": {"batch": 8},
}


def program(kind: str) -> Program:
    # Few KV heads and long units: attention is split, so that its parts are merged.
    return lower(
        replace(SMALL[0], dtype="bf16", layers=2, windows=(), max_context=512),
        Config(kv_block=64, page_allocation="linear"),
        small_target(8),
        **KINDS[kind],
    )


def moved(program: Program, packets: int) -> Program:
    """Every buffer, and so every value, `packets` further on."""
    buffers = tuple(replace(b, offset=b.offset + packets) if b.space == "arena" else b for b in program.buffers)
    return replace(program, buffers=buffers, arena_packets=program.arena_packets + packets)


def overlapping(program: Program, at: int) -> list[Buffer]:
    """Buffer `at` and those that share packets with it."""
    own = program.buffers[at]
    return [b for b in program.buffers if b.offset < own.offset + own.packets and own.offset < b.offset + b.packets]


@pytest.mark.parametrize("kind", KINDS)
def test_an_arena_at_odd_packets_is_rejected(kind: str) -> None:
    whole = program(kind)
    assert isinstance(validate(whole), ValidProgram) and static_problem(whole) is None
    assert isinstance(validate(moved(whole, 2)), ValidProgram) and static_problem(moved(whole, 2)) is None
    verdict, found = validate(moved(whole, 1)), static_problem(moved(whole, 1))
    assert isinstance(verdict, tuple) and {reason.kind for reason in verdict} == {"bounds"}
    assert "must be even" in verdict[0].message
    assert found is not None and found.kind == "bounds"


@pytest.mark.parametrize("kind", KINDS)
def test_of_each_buffer_alone_validator_and_measurement_agree(kind: str) -> None:
    """Moved behind all others, at an odd packet: refused by both where something takes it in pairs, and by neither else."""
    whole = program(kind)
    end = whole.arena_packets + whole.arena_packets % 2
    kinds = set()
    for at, buffer in enumerate(whole.buffers):
        if any("@" in other.name for other in overlapping(whole, at)):
            continue  # a value by seat, of which each seat's part is a buffer too
        apart = replace(buffer, offset=end + 1)
        changed = replace(whole, buffers=(*whole.buffers[:at], apart, *whole.buffers[at + 1 :]), arena_packets=end + 1 + buffer.packets)
        verdict, found = validate(changed), static_problem(changed)
        assert isinstance(verdict, ValidProgram) == (found is None), (buffer.name, verdict, found)
        kinds.add(found is None)
    assert False in kinds


def test_partial_results_that_no_position_has_may_lie_anywhere() -> None:
    """At a context too short for a second split nobody writes or merges a partial result, so where they would lie touches no packet."""
    whole = program("greedy")
    tasks = [task for queue in whole.queues for task in queue if isinstance(task, Attention)]
    assert max(task.splits for task in tasks) > 1
    odd = {task.part_buf for task in tasks}
    buffers = tuple(replace(b, offset=b.offset + (i in odd)) for i, b in enumerate(whole.buffers))
    shifted = replace(whole, buffers=buffers, arena_packets=whole.arena_packets + 1)
    assert isinstance(validate(shifted), tuple) and static_problem(shifted) is not None
    short = replace(shifted, machine=replace(shifted.machine, context=32), kv=replace(shifted.kv, rows=32))
    assert isinstance(validate(short), ValidProgram), validate(short)
    assert static_problem(short) is None


@pytest.mark.parametrize(("batch", "by"), [(1, 1), (1, 3), (8, 1), (8, 2)])
def test_gains_at_elements_from_which_no_vector_is_loaded_are_rejected(batch: int, by: int) -> None:
    """All constants further on by a few elements: every task finds its own, but not where two can be loaded at a time, of a batch four."""
    whole = lower(replace(SMALL[0], dtype="bf16", layers=1, windows=()), Config(), small_target(4), batch=batch, context=64)
    normed = {at: {"gain": whole.task(at).gain + by} for at in find(whole, MatVec) if whole.task(at).flags & X_NORM}  # type: ignore[attr-defined]
    shifted = replace(changed_all(whole, normed), constants=tuple(replace(c, start=c.start + by) for c in whole.constants))
    verdict, found = validate(shifted), static_problem(shifted)
    assert isinstance(verdict, tuple) and {reason.kind for reason in verdict} == {"bounds"} and "gain in vectors" in str(verdict[0])
    assert found is not None and found.kind == "bounds" and "vectors" in found.text


def resized(program: Program, name: str, cols: int, flags: int = 0) -> Program:
    """The products of every matrix `name` with other columns and more flags."""
    changes = {}
    for at in find(program, MatVec):
        task = program.task(at)
        assert isinstance(task, MatVec)
        if program.matrices[task.weight].name.endswith(name):
            changes[at] = MatVecShape(cols, task.flags | flags)
    assert changes
    matrices = tuple(replace(m, cols=cols) if m.name.endswith(name) else m for m in program.matrices)
    gains = {at: {"gain": 0} for at in changes if flags & X_NORM}
    return replace(changed_all(reshaped(program, changes), gains), matrices=matrices)


@pytest.mark.parametrize(
    ("name", "less", "holds"), [("down", 4, True), ("down", 2, False), ("down", 1, False), ("gate_up", 2, True), ("gate_up", 1, False)]
)
def test_columns_fill_pairs_of_packets(name: str, less: int, holds: bool) -> None:
    """Down reads narrow packets, of two elements; gate and up read the residual stream, of one."""
    whole = program("greedy")
    cols = next(m.cols for m in whole.matrices if m.name.endswith(name))
    changed = resized(whole, name, cols - less)
    verdict, found = validate(changed), static_problem(changed)
    if holds:
        assert isinstance(verdict, ValidProgram) and found is None
    else:
        assert isinstance(verdict, tuple) and verdict[0].kind == "kind" and "pairs of packets" in str(verdict[0])
        assert found is not None and found.kind == "kind"


def test_products_of_one_token_do_not_normalise_narrow_packets() -> None:
    """The device adds up no squares of them."""
    whole = program("greedy")
    down = next(whole.task(at) for at in find(whole, Gemv) if whole.matrices[whole.task(at).weight].name.endswith("down"))
    assert isinstance(down, Gemv) and down.flags & X_NARROW
    changed = resized(whole, "down", down.cols, X_NORM)
    verdict, found = validate(changed), static_problem(changed)
    assert isinstance(verdict, tuple) and verdict[0].kind == "kind" and "narrow" in str(verdict[0])
    assert found is not None and found.kind == "kind"


def test_a_batch_has_no_more_seats_than_products_have_sums_for() -> None:
    whole = program("batch")
    wider = replace(whole, machine=replace(whole.machine, batch=40))
    verdict, found = validate(wider), static_problem(wider)
    assert isinstance(verdict, tuple) and "at most 32" in str(verdict[0])
    assert found is not None and found.kind == "kind"
