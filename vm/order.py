"""One legal order of a program's tasks: readers after the writers of what they check, at every position."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import replace
from graphlib import TopologicalSorter
from itertools import groupby
from typing import TypeAlias

from amk.isa.abi import NONE
from amk.isa.attention import Attention
from amk.isa.instruction import Access, Instruction
from amk.isa.machine import KV_BLOCK_ROWS, Machine
from amk.isa.matvec import MatVec
from amk.schedule.program import Program

Span: TypeAlias = tuple[int, int, int]  # tag, first packet of the arena, end


def legal_order(program: Program) -> list[Instruction]:
    """Every task once, in levels: a task comes after all writers of the packets that it checks; one level's tasks are independent.

    Slices of one product that are independent are merged into one task. graphlib.CycleError if the tags are cyclic.
    """
    tasks = [task for queue in program.queues for task in queue]
    sorter = _dependencies(program, tasks)
    sorter.prepare()
    order: list[Instruction] = []
    while sorter.is_active():
        ready = sorter.get_ready()
        order += _merged(program.machine, [tasks[node] for node in ready if isinstance(node, int)])
        sorter.done(*ready)
    return order


def widest_positions(machine: Machine) -> range:
    """Positions whose footprints together cover those of every position.

    An access depends on the position through the KV blocks in the window; their number repeats every 16 rows and never falls before.
    """
    return range(max(0, machine.context - KV_BLOCK_ROWS), machine.context)


def _dependencies(program: Program, tasks: list[Instruction]) -> TopologicalSorter[int | Span]:
    """Task numbers and the spans of packets between them: a task needs spans, a span needs its writers."""
    sorter: TopologicalSorter[int | Span] = TopologicalSorter()
    offsets = [buffer.offset for buffer in program.buffers]
    writers: dict[int, list[tuple[int, int, int]]] = {}
    needed: set[Span] = set()
    for number, task in enumerate(tasks):
        reads, writes = _footprint(program.machine, task)
        spans = {_span(access, offsets) for access in reads if access.tag and not access.carried}
        sorter.add(number, *spans)
        needed |= spans
        for tag, start, stop in {_span(access, offsets) for access in writes}:
            writers.setdefault(tag, []).append((start, stop, number))
    for tag, group in groupby(sorted(needed), key=lambda span: span[0]):
        _add_writers(sorter, group, sorted(writers.get(tag, [])))
    return sorter


def _footprint(machine: Machine, task: Instruction) -> tuple[set[Access], set[Access]]:
    positions = widest_positions(machine)
    if not isinstance(task, Attention):  # its footprint has no position
        positions = positions[-1:]
    reads = {access for position in positions for access in task.reads(machine, position)}
    return reads, {access for position in positions for access in task.writes(machine, position)}


def _span(access: Access, offsets: list[int]) -> Span:
    offset = offsets[access.buffer]
    return access.tag, offset + access.start, offset + access.stop


def _add_writers(sorter: TopologicalSorter[int | Span], spans: Iterable[Span], writers: list[tuple[int, int, int]]) -> None:
    """Makes each span need the writers that it overlaps; writers of one tag are disjoint and sorted."""
    starts = [start for start, _, _ in writers]
    stops = [stop for _, stop, _ in writers]
    for span in spans:
        overlapping = writers[bisect_right(stops, span[1]) : bisect_left(starts, span[2])]
        sorter.add(span, *(number for _, _, number in overlapping))


def _merged(machine: Machine, tasks: list[Instruction]) -> Iterator[Instruction]:
    """The tasks of one level with neighbouring slices of one product joined, where the whole publishes just what its slices publish."""
    products: dict[Instruction, list[MatVec]] = {}
    for task in tasks:
        if isinstance(task, MatVec):
            product = replace(task, tile0=0, tiles=0, wait_counter=NONE, wait_count=0, done_counter=NONE)
            products.setdefault(product, []).append(task)
        else:
            yield task
    for slices in products.values():
        yield from _joined(machine, sorted(slices, key=lambda task: task.tile0))


def _joined(machine: Machine, slices: list[MatVec]) -> Iterator[MatVec]:
    """Runs of slices, each beginning where the one before ends, as one task each."""
    run: list[MatVec] = []
    for task in slices:
        if run and task.tile0 != run[-1].tile0 + run[-1].tiles:
            yield from _as_one(machine, run)
            run = []
        run.append(task)
    yield from _as_one(machine, run)


def _as_one(machine: Machine, run: list[MatVec]) -> list[MatVec]:
    whole = replace(run[0], tiles=sum(task.tiles for task in run))
    parts = [packets for task in run for packets in _packets(machine, task)]
    return [whole] if _packets(machine, whole) == parts else run


def _packets(machine: Machine, task: MatVec) -> list[tuple[int, int, int]]:
    return [(access.buffer, access.start, access.stop) for access in task.writes(machine, 0)]
