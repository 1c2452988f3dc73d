"""Every gated read comes after the publishes that it takes: docs/machine.md, "Values without tags".

A counter with all its arrivals of a token orders: whoever has waited for them comes after all that the arriving tasks published, and after
what they themselves had waited for. A wait for fewer may be over before any given task has arrived, so it orders nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

from amk.isa.abi import NONE
from amk.isa.instruction import Instruction
from amk.schedule.proof.footprint import INTERLEAVED, Footprint
from amk.schedule.proof.packets import Matching, named
from amk.schedule.proof.report import Report
from amk.schedule.proof.subject import SHOWN, Ints, Subject

Gate: TypeAlias = tuple[int, int]  # a task's counter and how many arrivals it waits for


def check_gates(subject: Subject, m: Matching, report: Report) -> None:
    """Reports gated reads whose task's wait does not order them after what they read. Asked where one token is known to end.

    First those whose own wait orders nothing: others may only be behind them.
    """
    if not any(task.gated for task in subject.tasks):
        return
    gates = _Gates(subject)
    readers = _readers(subject, m)
    found: list[tuple[bool, list[int], Ints]] = []
    for group, done, published in _written(subject, m):
        for gate, tasks in readers.get(group, {}).items():
            if not gates.ordered(gate, done):
                found.append((gates.in_full(gate), tasks, published))
    for _, tasks, published in sorted(found, key=lambda loose: loose[0]):
        _tell(subject, m, gates, tasks, published, report)


def check_in_place(subject: Subject, footprint: Footprint, report: Report) -> None:
    """A gated task writes over nothing that it reads, but a row element by element: its warps publish while others still read."""
    gated = np.array([task.gated for task in subject.tasks], dtype=bool)
    reads, writes = footprint.reads.take(gated[footprint.reads.task]), footprint.writes.take(gated[footprint.writes.task])
    first, stop = np.searchsorted(reads.task, writes.task, "left"), np.searchsorted(reads.task, writes.task, "right")
    for ahead in range(int((stop - first).max(initial=0))):  # the writes' tasks' first reads, then their second ones
        w = np.flatnonzero(first + ahead < stop)
        r = first[w] + ahead
        meets = (reads.start[r] < writes.stop[w]) & (writes.start[w] < reads.stop[r])
        row = (reads.start[r] == writes.start[w]) & (reads.stop[r] == writes.stop[w]) & (reads.kind[r] < INTERLEAVED)
        same = row & (reads.kind[r] == writes.kind[w])
        for i in np.flatnonzero(meets & ~same).tolist():
            task, read, write = int(writes.task[w[i]]), int(r[i]), int(w[i])
            regions = [named(subject, int(a.buffer[n]), int(a.start[n]), int(a.stop[n])) for a, n in ((reads, read), (writes, write))]
            said = f"{subject.names([task])} publishes {regions[1]} over {regions[0]} while it still reads that"
            report.add("race", said, subject.ids([task]), regions)


class _Gates:
    """Which counters' arrivals a task comes after, as a bit set of counters."""

    def __init__(self, subject: Subject) -> None:
        machine, tasks = subject.program.machine, subject.tasks
        self.arrivals = [0] * len(subject.program.counters)
        self.before: list[set[int]] = [set() for _ in self.arrivals]  # counters that tasks which arrive at one have waited for in full
        for task in tasks:
            if task.done_counter != NONE:
                self.arrivals[task.done_counter] += task.arrivals(machine)
        for task in tasks:
            if task.done_counter != NONE and self.in_full(gate_of(task)):
                self.before[task.done_counter].add(task.wait_counter)
        self.closures: dict[int, int] = {}

    def in_full(self, gate: Gate) -> bool:
        """Whether it opens after all arrivals of a counter, which has some."""
        counter, count = gate
        return counter != NONE and count == self.arrivals[counter] > 0

    def closure(self, counter: int) -> int:
        """The counters that are full when `counter` is. No counter comes before itself, or its token would not end."""
        stack = [counter]
        while stack:
            top = stack[-1]
            missing = [c for c in self.before[top] if c not in self.closures]
            if missing:
                stack += missing
                continue
            stack.pop()
            held = 1 << top
            for c in self.before[top]:
                held |= self.closures[c]
            self.closures[top] = held
        return self.closures[counter]

    def ordered(self, gate: Gate, done: int) -> bool:
        """Whether the gate opens after every arrival at a counter."""
        return done != NONE and self.in_full(gate) and bool(self.closure(gate[0]) >> done & 1)


def gate_of(task: Instruction) -> Gate:
    return task.wait_counter, task.wait_count


def _readers(subject: Subject, m: Matching) -> dict[int, dict[Gate, list[int]]]:
    """The gated tasks that read each group, by their gates."""
    found: dict[int, dict[Gate, list[int]]] = defaultdict(lambda: defaultdict(list))
    for group, number in np.unique(np.stack([m.groups.of, m.groups.reads.task]), axis=1).T.tolist():
        task = subject.tasks[number]
        if task.gated:
            found[group][gate_of(task)].append(number)
    return found


def _written(subject: Subject, m: Matching) -> Iterator[tuple[int, int, Ints]]:
    """Each group of reads, each counter at which writers of it arrive, and which pieces of `m.read` these have written."""
    known = np.flatnonzero(m.source >= 0)
    done = np.array([task.done_counter for task in subject.tasks], dtype=np.int64)
    group, counter = m.read.owner[known], done[m.writes.task[m.written.owner[m.source[known]]]] if len(known) else known
    order = np.lexsort((known, counter, group))
    known, group, counter = known[order], group[order], counter[order]
    breaks = np.flatnonzero((np.diff(group) != 0) | (np.diff(counter) != 0)) + 1
    for part in np.split(np.arange(len(known)), breaks):
        if len(part):
            yield int(group[part[0]]), int(counter[part[0]]), known[part]


def _tell(subject: Subject, m: Matching, gates: _Gates, loose: list[int], published: Ints, report: Report) -> None:
    if report.full("race"):
        report.count("race", 1)
        return
    writers = np.unique(m.writes.task[m.written.owner[m.source[published]]])
    read = int(np.flatnonzero(m.groups.of == m.read.owner[published[0]])[0])
    region = m.region(subject, m.groups.reads, read, int(m.read.piece[published[0]]), int(m.read.piece[published[-1]]))
    done = subject.tasks[int(writers[0])].done_counter
    arrival = "at no counter" if done == NONE else f"at counter {subject.program.counters[done]}"
    said = f"{subject.names(loose)} and {subject.names(writers)} touch {region}, which has no tag, and nothing orders them: "
    why = f"who writes arrives {arrival}, who reads waits for {_waited(subject, gates, gate_of(subject.tasks[loose[0]]))}"
    report.add("race", said + why, subject.ids([*loose[:SHOWN], *writers[:SHOWN]]), [region])


def _waited(subject: Subject, gates: _Gates, gate: Gate) -> str:
    counter, count = gate
    if counter == NONE:
        return "none"
    name, arrivals = subject.program.counters[counter], gates.arrivals[counter]
    return f"{name}, which is not behind it" if gates.in_full(gate) else f"{count} of {arrivals} arrivals at {name}"
