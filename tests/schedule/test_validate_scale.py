"""The validator on large programs: nothing missed in 20,000 tasks, and 100,000 tasks in seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from random import Random
from time import perf_counter

import pytest

from amk.isa.abi import NONE
from amk.isa.instruction import Instruction
from amk.schedule.program import Program, TaskId
from amk.schedule.proof.ancestors import find_ancestors
from amk.schedule.proof.footprint import take_footprint
from amk.schedule.proof.limits import Limits
from amk.schedule.proof.packets import match
from amk.schedule.proof.positions import fullest_positions
from amk.schedule.proof.report import Rejection, Report
from amk.schedule.proof.subject import take_subject
from amk.schedule.proof.waits import find_order, take_nodes
from amk.schedule.validate import validate
from amk.tests.schedule.builder import MACHINE, Sizes, changed, changed_all, decoder

READ_TAGS = ("x_tag", "res_tag", "q_tag", "k_tag", "v_tag", "in_tag", "token_tag")
LARGE = replace(
    MACHINE,
    sms=132,
    consumer_warps=8,
    stages=8,
    stage_bytes=16384,
    inflight=4,
    reduction_slots=4,
    hidden=2048,
    vocab=32003,
    heads=32,
    kv_heads=8,
    head_dim=64,
    context=4096,
)
SITES = 200


@cache
def large(layers: int) -> Program:
    return decoder(Sizes(LARGE, layers=layers, intermediate=8192, splits=16, unit_rows=64))


def rejected(program: Program) -> tuple[Rejection, ...]:
    verdict = validate(program, Limits(reports=100_000))
    return verdict if isinstance(verdict, tuple) else ()


def read_sites(program: Program) -> list[tuple[TaskId, str]]:
    """Every checked read of the program: task and the word that holds its tag."""
    queues = enumerate(program.queues)
    return [((sm, index), word) for sm, queue in queues for index, task in enumerate(queue) for word in READ_TAGS if checks(task, word)]


def checks(task: Instruction, word: str) -> bool:
    """Whether the task reads with the tag in this word: no residual without a buffer, new rows in the tail alone."""
    if word == "res_tag":
        return getattr(task, "res_buf", NONE) != NONE
    return getattr(task, word, 0) > 0 and not (word in ("k_tag", "v_tag") and getattr(task, "split", 0) > 0)


def test_a_program_of_20000_tasks_is_proven() -> None:
    program = large(12)
    assert program.task_count >= 20_000 and rejected(program) == ()


def test_each_of_200_missing_checks_in_20000_tasks_is_found() -> None:
    program = large(12)
    sites = Random(2).sample(read_sites(program), SITES)
    changes: dict[TaskId, dict[str, int]] = {}
    for at, word in sites:
        changes.setdefault(at, {})[word] = 0
    found = [r for r in rejected(changed_all(program, changes)) if "without checking a tag" in r.message]
    assert {r.kind for r in found} == {"race"}
    assert {r.tasks[0] for r in found} == {at for at, _ in sites} and len(found) >= len(sites)


def test_each_of_200_thresholds_too_high_in_20000_tasks_is_found() -> None:
    program = large(12)
    waiting = [(sm, i) for sm, queue in enumerate(program.queues) for i, task in enumerate(queue) if task.wait_counter != NONE]
    sites = Random(3).sample(waiting, SITES)
    found = rejected(changed_all(program, {at: {"wait_count": program.task(at).wait_count + 1} for at in sites}))
    assert {r.kind for r in found} == {"deadlock"} and {r.tasks[0] for r in found} == set(sites)


@pytest.mark.parametrize("seed", range(6))
def test_one_wrong_tag_in_20000_tasks_is_found(seed: int) -> None:
    program = large(12)
    at, word = Random(seed).choice(read_sites(program))
    tag = getattr(program.task(at), word)
    found = rejected(changed(program, at, **{word: 0 if seed % 2 else (tag % program.machine.tags) + 1}))
    assert found and any(at in r.tasks for r in found)


def test_the_work_for_100000_tasks_grows_with_the_tasks_and_not_with_their_pairs() -> None:
    program = large(62)
    assert program.task_count >= 100_000
    began = perf_counter()
    assert not isinstance(validate(program), tuple)
    print(f"{program.task_count} tasks proven in {perf_counter() - began:.2f} s")
    pieces, edges, bits = work(program)
    assert pieces <= 8 * program.task_count
    assert edges <= 8 * program.task_count
    assert bits <= 2048 * program.task_count


def work(program: Program) -> tuple[int, int, int]:
    """Pieces of packets that are matched, data edges, and bits of all ancestor sets."""
    report = Report(1)
    subject = take_subject(program, Limits(), report)
    assert subject is not None
    footprint = take_footprint(subject, fullest_positions(subject), report)
    assert footprint is not None
    matching = match(subject, footprint, Limits(), report)
    assert matching is not None
    nodes = take_nodes(subject, matching)
    order = find_order(subject, matching, nodes, report)
    assert order is not None
    ancestors = find_ancestors(matching, nodes, order)
    assert ancestors is not None
    sets = {id(s): s.bits.bit_length() for s in (*ancestors.before, *ancestors.after_group.values())}
    pieces = len(matching.written.owner) + len(matching.read.owner)
    return pieces, order.sources.shape[1] + order.sinks.shape[1], sum(sets.values())
