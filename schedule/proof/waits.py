"""The waits of one token as a graph, run to its end: what cannot happen is a deadlock, what happens gives an order.

Events of an SM: the watcher's release of a task, the consumers' part of a task (of a tile, where tiles differ), the storer's. The W
consumers are one actor here: nothing leaves the SM before all of them have arrived. The feeder is left out: with the stream in queue
order (ring.py), at least one stage and kv_lag >= 1, a chunk waits only for slots that the consumers free before they ask for it, and for
earlier tokens. Of a stretch the feeder also waits, before a task's chunks, for the very arrivals that the watcher waits for before it
releases the task. When the consumers may begin a task, all gates of the stream up to its own are therefore open, and every chunk before
its own is taken: the feeder comes to its chunks, so this wait adds no cycle either.
Every wait is for this token or an earlier one, so a token that always ends lets every later one end: from the second token on, a counter
needs at most as many new arrivals as in the first.

Running an event never takes another's chance away, so one greedy run finds a deadlock if there is one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from amk.isa.abi import NONE
from amk.schedule.proof.packets import Matching
from amk.schedule.proof.report import Report
from amk.schedule.proof.subject import Flags, Ints, Subject


@dataclass(frozen=True)
class Nodes:
    """Data nodes: one a task, or one a tile where a stored task reads tile by tile.

    A node's publishes come after its reads and those of its task's earlier nodes. `first[task]` and `count[task]` give a task's nodes,
    `task[node]` the way back. `publisher[w]` is the node of publish w, `reader[r]` that of read r of the matching's groups.
    """

    first: Ints
    count: Ints
    task: Ints
    publisher: Ints
    reader: Ints
    stored: Flags

    def __len__(self) -> int:
        return len(self.task)


@dataclass(frozen=True)
class Order:
    """`at[node]` is when a data node ran; `sources` are pairs (publishing node, group), `sinks` pairs (group, reading node), each once."""

    at: Ints
    sources: Ints
    sinks: Ints


def take_nodes(subject: Subject, m: Matching) -> Nodes:
    """The data nodes of a program."""
    reads, writes = m.groups.reads, m.writes
    stored = np.array([task.stored for task in subject.tasks], dtype=bool)
    by_tile = np.zeros(len(stored), dtype=bool)
    by_tile[reads.task[reads.storer | (reads.tile > 0)]] = True
    by_tile &= stored
    count = np.ones(len(stored), dtype=np.int64)
    for accesses in (reads, writes):
        np.maximum.at(count, accesses.task, np.where(by_tile[accesses.task], accesses.tile + 1, 1))
    first = np.cumsum(count) - count
    publisher = first[writes.task] + np.where(by_tile[writes.task], writes.tile, 0)
    reader = first[reads.task] + np.where(by_tile[reads.task], reads.tile, 0)
    return Nodes(first, count, np.repeat(np.arange(len(stored), dtype=np.int64), count), publisher, reader, stored)


def find_order(subject: Subject, m: Matching, nodes: Nodes, report: Report) -> Order | None:
    """Runs one token; None (reported) if it cannot end."""
    waits = _Waits(subject, m, nodes)
    sources, sinks = _data_edges(m, nodes)
    waits.add_data(sources, sinks)
    waits.add_actors()
    waits.add_reduction_slots()
    waits.add_watchers(report)
    when = waits.run()
    stuck = np.flatnonzero(when < 0)
    if len(stuck):
        waits.report_cycle(stuck, report)
        return None
    return Order(when[: len(nodes)], sources, sinks)


def _data_edges(m: Matching, nodes: Nodes) -> tuple[Ints, Ints]:
    known = m.source >= 0
    owners = m.written.owner[m.source[known]] if known.any() else np.zeros(0, np.int64)
    groups = len(m.groups) + 1
    sources = np.unique(nodes.publisher[owners] * groups + m.read.owner[known])
    sinks = np.unique(m.groups.of * (len(nodes) + 1) + nodes.reader)
    return np.stack(np.divmod(sources, groups)), np.stack(np.divmod(sinks, len(nodes) + 1))


class _Waits:
    """The graph while it is built: data nodes, then the consumers' nodes, then groups, then watcher releases."""

    def __init__(self, subject: Subject, m: Matching, nodes: Nodes) -> None:
        self.subject, self.m, self.nodes = subject, m, nodes
        self.from_: list[Ints] = []
        self.to: list[Ints] = []
        n = len(nodes)
        ids = np.arange(n, dtype=np.int64)
        self.consumer = np.where(nodes.stored[nodes.task], n + ids, ids)
        self.group0 = 2 * n
        self.watch0 = self.group0 + len(m.groups)
        self.sm = subject.sm[nodes.task]
        self.thresholds: dict[int, list[tuple[int, int]]] = {}
        self.watching = np.zeros(0, dtype=np.int64)
        self.active = np.zeros(len(subject.tasks), dtype=bool)
        self.active[m.groups.reads.task] = True
        self.active[m.writes.task] = True

    def _edges(self, a: Ints, b: Ints) -> None:
        self.from_.append(a)
        self.to.append(b)

    def add_data(self, sources: Ints, sinks: Ints) -> None:
        """Publishes before groups, groups before those who read them. Carried reads wait for the token before, which has ended."""
        now = ~self.m.groups.carried
        keep = now[sources[1]]
        self._edges(sources[0][keep], self.group0 + sources[1][keep])
        reads, reader = self.m.groups.reads, self.nodes.reader
        keep = now[self.m.groups.of]
        target = np.where(reads.storer & self.nodes.stored[reads.task], reader, self.consumer[reader])
        pairs = np.unique(np.stack([self.m.groups.of[keep], target[keep]]), axis=1) if keep.any() else np.zeros((2, 0), np.int64)
        self._edges(self.group0 + pairs[0], pairs[1])

    def add_actors(self) -> None:
        """Each actor in queue order, and a tile's sums before the storer takes them."""
        every = np.arange(len(self.nodes), dtype=np.int64)
        same = self.sm[1:] == self.sm[:-1]
        self._edges(self.consumer[every[:-1][same]], self.consumer[every[1:][same]])
        stored = np.flatnonzero(self.nodes.stored[self.nodes.task])
        self._edges(self.consumer[stored], stored)
        same = self.sm[stored[1:]] == self.sm[stored[:-1]]
        self._edges(stored[:-1][same], stored[1:][same])

    def add_reduction_slots(self) -> None:
        """Tile n of an SM needs the slot of tile n - reduction_slots.

        A node of many tiles frees its own tiles as it goes, so it waits only for nodes before it.
        """
        slots = self.subject.program.machine.reduction_slots
        stored = np.flatnonzero(self.nodes.stored[self.nodes.task])
        if not len(stored):
            return
        tiles = self._tiles(stored)
        stop = np.cumsum(tiles)
        sm_start = np.zeros(self.subject.program.machine.sms + 1, dtype=np.int64)
        np.add.at(sm_start, self.sm[stored] + 1, tiles)
        sm_start = np.cumsum(sm_start)
        needed = np.minimum(stop - 1 - slots, stop - tiles - 1)
        waits = needed >= sm_start[self.sm[stored]]
        owner = np.searchsorted(stop, needed[waits], side="right")
        self._edges(stored[owner], self.consumer[stored[waits]])

    def _tiles(self, stored: Ints) -> Ints:
        """Tiles that each stored node stands for: all of its task's, or one."""
        task = self.nodes.task[stored]
        tiles = np.array([getattr(self.subject.tasks[t], "tiles", 1) for t in task.tolist()], dtype=np.int64)
        return np.where(self.nodes.count[task] > 1, 1, tiles)

    def add_watchers(self, report: Report) -> None:
        """The watcher in queue order; a task that touches something begins after its release. Carried waits look at the token before."""
        tasks = self.subject.tasks
        counter = np.array([task.wait_counter for task in tasks], dtype=np.int64)
        needs = np.array([task.wait_count for task in tasks], dtype=np.int64)
        carried = np.array([task.carried for task in tasks], dtype=bool)
        arrivals = self._arrivals()
        reachable = (counter == NONE) | (needs <= arrivals[np.minimum(counter, len(arrivals) - 1)])
        for task in np.flatnonzero(~reachable).tolist():
            self._report_unreachable(task, int(arrivals[counter[task]]), report)
        self.watching = np.flatnonzero((counter != NONE) & (needs > 0) & ~carried & reachable)
        node = self.watch0 + np.arange(len(self.watching), dtype=np.int64)
        for i, task in enumerate(self.watching.tolist()):
            self.thresholds.setdefault(int(counter[task]), []).append((int(needs[task]), self.watch0 + i))
        sm = self.subject.sm
        same = sm[self.watching[1:]] == sm[self.watching[:-1]]
        self._edges(node[:-1][same], node[1:][same])
        last = np.searchsorted(self.watching, np.arange(len(tasks)), side="right") - 1
        begins = np.flatnonzero(self.active & (last >= 0))
        begins = begins[sm[self.watching[last[begins]]] == sm[begins]] if len(self.watching) else begins[:0]
        self._edges(node[last[begins]] if len(begins) else begins, self.consumer[self.nodes.first[begins]])

    def _arrivals(self) -> Ints:
        """Arrivals at each counter in a token. A task that touches nothing at a position still arrives."""
        machine = self.subject.program.machine
        arrivals = np.zeros(len(self.subject.program.counters) + 1, dtype=np.int64)
        for task in self.subject.tasks:
            if task.done_counter != NONE:
                arrivals[task.done_counter] += task.arrivals(machine)
        return arrivals

    def _report_unreachable(self, task: int, arrivals: int, report: Report) -> None:
        found = self.subject.tasks[task]
        name = self.subject.program.counters[found.wait_counter]
        said = f"waits for {found.wait_count} arrivals a token at counter {name}, which gets {arrivals}"
        report.add("deadlock", f"{self.subject.names([task])} {said}", self.subject.ids([task]))

    def run(self) -> Ints:
        """When each node ran, -1 where it never could."""
        total = self.watch0 + len(self.watching)
        a, b = np.concatenate(self.from_), np.concatenate(self.to)
        missing_array = np.bincount(b, minlength=total)
        for waiting in self.thresholds.values():
            for _, node in waiting:
                missing_array[node] += 1
            waiting.sort(reverse=True)
        order = np.argsort(a, kind="stable")
        after: list[int] = b[order].tolist()
        offset: list[int] = np.searchsorted(a[order], np.arange(total + 1)).tolist()
        missing: list[int] = missing_array.tolist()
        return np.array(self._greedy(missing, after, offset, self._done(total)), dtype=np.int64)

    def _done(self, total: int) -> list[int]:
        """The task whose last event a node is and that arrives at a counter somebody waits for, or -1."""
        done = np.full(total, -1, dtype=np.int64)
        awaited = np.array([t.done_counter in self.thresholds for t in self.subject.tasks], dtype=bool)
        tasks = np.flatnonzero(awaited)
        done[self.nodes.first[tasks] + self.nodes.count[tasks] - 1] = tasks
        return done.tolist()

    def _greedy(self, missing: list[int], after: list[int], offset: list[int], done: list[int]) -> list[int]:
        machine, tasks = self.subject.program.machine, self.subject.tasks
        ready = deque(node for node, n in enumerate(missing) if not n)
        when, clock = [-1] * len(missing), 0
        counts = dict.fromkeys(self.thresholds, 0)
        while ready:
            node = ready.popleft()
            when[node] = clock
            clock += 1
            for later in after[offset[node] : offset[node + 1]]:
                missing[later] -= 1
                if not missing[later]:
                    ready.append(later)
            if done[node] >= 0:
                task = tasks[done[node]]
                counts[task.done_counter] += task.arrivals(machine)
                self._release(task.done_counter, counts[task.done_counter], missing, ready)
        return when

    def _release(self, counter: int, count: int, missing: list[int], ready: deque[int]) -> None:
        waiting = self.thresholds[counter]
        while waiting and waiting[-1][0] <= count:
            node = waiting.pop()[1]
            missing[node] -= 1
            if not missing[node]:
                ready.append(node)

    def report_cycle(self, stuck: Ints, report: Report) -> None:
        """Follows from a stuck node what it waits for until a node comes again: the tasks on that cycle."""
        blocked = set(stuck.tolist())
        before: dict[int, int] = {}
        for a, b in zip(np.concatenate(self.from_).tolist(), np.concatenate(self.to).tolist(), strict=True):
            if a in blocked and b in blocked:
                before.setdefault(b, a)
        for counter, waiting in self.thresholds.items():
            arrives = next((n for n in (self._last(t) for t in self._arriving(counter)) if n in blocked), None)
            before |= {node: arrives for _, node in waiting if arrives is not None and node not in before}
        cycle = _cycle(before, int(stuck[0]))
        tasks = list(dict.fromkeys(task for node in cycle for task in self._tasks(node)))
        stopped = len(np.unique(self.nodes.task[stuck[stuck < len(self.nodes)]]))
        verb = "wait for each other" if len(tasks) > 1 else "waits for itself"
        said = f"{self.subject.names(tasks)} {verb}, so {stopped} of {len(self.subject.tasks)} tasks never end"
        report.add("deadlock", said, self.subject.ids(tasks))

    def _arriving(self, counter: int) -> list[int]:
        return [i for i, task in enumerate(self.subject.tasks) if task.done_counter == counter]

    def _last(self, task: int) -> int:
        return int(self.nodes.first[task] + self.nodes.count[task] - 1)

    def _tasks(self, node: int) -> list[int]:
        if node < self.group0:
            return [int(self.nodes.task[node % len(self.nodes)])]
        return [int(self.watching[node - self.watch0])] if node >= self.watch0 else []


def _cycle(before: dict[int, int], start: int) -> list[int]:
    path: dict[int, int] = {}
    node = start
    while node not in path and node in before:
        path[node] = len(path)
        node = before[node]
    walked = list(path)
    return walked[path[node] :][::-1] if node in path else walked[::-1]
