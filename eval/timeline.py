"""The timeline of one token, from what a traced build wrote down: each actor's tasks in microseconds, and what it did in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import Any

import numpy as np

from amk.isa.attention import Attention
from amk.isa.instruction import Instruction
from amk.isa.matvec import MatVec
from amk.isa.stretch_matmul import StretchMatMul
from amk.schedule.program import Program
from amk.vm.abort import WAITS, WaitKind
from amk.vm.trace import TASK_BEGINS

MEMORY_WAIT = WaitKind.FULL  # for a chunk: the one wait that is for memory
PHASES = ("wait", "load", "compute", "publish")
# What an actor does in a task when it does not wait. A watcher only waits; the moment between is its release of the task.
BUSY = {"feeder": "load", "consumer": "compute", "storer": "publish", "watcher": "publish"}
Events = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Wait:
    """Microseconds since the token's first task began, and the kind (vm.abort.WaitKind) of a wait."""

    begin_us: float
    end_us: float
    kind: int

    @property
    def phase(self) -> str:
        return "load" if self.kind == MEMORY_WAIT else "wait"


@dataclass(frozen=True)
class Span:
    """One actor at one task of its SM's queue, from its beginning to that of the actor's next; `warp` counts within the role."""

    sm: int
    role: str
    warp: int
    task: int
    begin_us: float
    end_us: float
    waits: tuple[Wait, ...]

    def phases_us(self) -> dict[str, float]:
        """How long each phase took; what is no wait is the role's own work."""
        times = dict.fromkeys(PHASES, 0.0)
        for wait in self.waits:
            times[wait.phase] += wait.end_us - wait.begin_us
        times[BUSY[self.role]] += self.end_us - self.begin_us - sum(times.values())
        return times


def timeline(events: Events, consumer_warps: int, token: int) -> list[Span]:
    """The spans of one token of a launch, in the order of SM, warp and time; `events` [SMs, warps, room] as vm.trace.record gives them."""
    stamps = events["value"][events["kind"] == TASK_BEGINS]
    spans = [span for sm, warps in enumerate(events) for span in _sm_spans(sm, warps, consumer_warps, token, stamps[:1])]
    first = min((span.begin_us for span in spans), default=0.0)
    return [_shifted(span, -first) for span in spans]


def _sm_spans(sm: int, warps: Events, consumer_warps: int, token: int, stamp: Events) -> Iterator[Span]:
    """An SM's spans in microseconds of the card's clock since `stamp`, a moment of the launch."""
    written = [warp[warp["kind"] != 0] for warp in warps]
    begins = np.concatenate([warp[warp["kind"] == TASK_BEGINS] for warp in written])
    if not len(begins):
        return
    clock = Clock(begins, stamp)
    for number, warp in enumerate(written):
        role, place = role_of(number, consumer_warps)
        for begin, end, task, waits in _tasks(np.sort(warp, order="clock", kind="stable"), token):
            us = (Wait(clock.us(w_begin), clock.us(w_end), kind) for w_begin, w_end, kind in waits)
            yield Span(sm, role, place, task, clock.us(begin), clock.us(end), tuple(us))


def role_of(warp: int, consumer_warps: int) -> tuple[str, int]:
    """What a warp of the block is, and its number among its like: consumers, then feeder, storer and watcher."""
    if warp < consumer_warps:
        return "consumer", warp
    return ("feeder", "storer", "watcher")[warp - consumer_warps], 0


class Clock:
    """Turns an SM's cycles into microseconds of the card's clock: a line through the moments at which tasks began and both were read.

    Cycles count finely but not alike on all SMs; the card's nanoseconds are the same everywhere but come in coarse steps. Their low word
    wraps: its difference to `stamp`, a moment of the same launch, is right as a signed number.
    """

    def __init__(self, begins: Events, stamp: Events) -> None:
        self._first = int(begins["clock"].min())
        cycles = (begins["clock"] - np.uint64(self._first)).astype(np.float64)
        ns = (begins["value"] - stamp).astype(np.int32).astype(np.float64)
        slope = float(np.polyfit(cycles, ns, 1)[0]) if np.ptp(cycles) > 0 and np.ptp(ns) > 0 else 1.0
        self._us_per_cycle = slope / 1e3
        self._origin_us = float(np.mean(ns - slope * cycles)) / 1e3

    def us(self, clock: int) -> float:
        return self._origin_us + (clock - self._first) * self._us_per_cycle


def _tasks(events: Events, token: int) -> Iterator[tuple[int, int, int, list[tuple[int, int, int]]]]:
    """Begin and end in cycles, number and waits of each task of one token, of a warp's events sorted by time.

    A task ends where the next begins; the warp's last one of all, which has no next, where its last wait does. Waits of lanes that were
    apart may overlap: the later one counts from the end of the earlier.
    """
    starts = np.flatnonzero(events["kind"] == TASK_BEGINS)
    for at, stop in pairwise([*starts, len(events)]):
        if int(events["token"][at]) != token:
            continue
        begin = int(events["clock"][at])
        end = int(events["clock"][stop]) if stop < len(events) else None
        waits: list[tuple[int, int, int]] = []
        reached = begin
        for clock, cycles, _, kind, _ in events[at + 1 : stop].tolist():
            w_begin, w_end = max(reached, clock), clock + cycles if end is None else min(end, clock + cycles)
            if w_end > w_begin:
                waits.append((w_begin, w_end, kind))
                reached = w_end
        yield begin, reached if end is None else end, int(events["task"][at]), waits


def _shifted(span: Span, by_us: float) -> Span:
    waits = tuple(Wait(w.begin_us + by_us, w.end_us + by_us, w.kind) for w in span.waits)
    return Span(span.sm, span.role, span.warp, span.task, span.begin_us + by_us, span.end_us + by_us, waits)


def by_actor(spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Microseconds of the token that an average actor of each role spent in each phase."""
    return [{"actor": role, **times} for (role,), times in _means(spans, lambda span: (span.role,)).items()]


def by_task(spans: Iterable[Span], program: Program) -> list[dict[str, Any]]:
    """The same for each class of tasks and role, in the order of the program: tasks of all layers together."""
    classes = [[task_class(program, task) for task in queue] for queue in program.queues]
    means = _means(spans, lambda span: (classes[span.sm][span.task], span.role))
    order = list(dict.fromkeys(task for tasks in zip_longest(*classes) for task in tasks))
    ranked = sorted(means.items(), key=lambda item: (order.index(item[0][0]), item[0][1]))
    return [{"task": task, "actor": role, **times} for (task, role), times in ranked]


def _means(spans: Iterable[Span], key: Any) -> dict[tuple[str, ...], dict[str, float]]:
    """Sums of phases by `key`, whose last part is the role, over the number of actors that have this role."""
    actors: defaultdict[str, set[tuple[int, int]]] = defaultdict(set)
    sums: defaultdict[tuple[str, ...], dict[str, float]] = defaultdict(lambda: dict.fromkeys(PHASES, 0.0))
    for span in spans:
        actors[span.role].add((span.sm, span.warp))
        for phase, us in span.phases_us().items():
            sums[key(span)][phase] += us
    return {k: {f"{phase}_us": us / len(actors[k[-1]]) for phase, us in times.items()} for k, times in sums.items()}


def task_class(program: Program, task: Instruction) -> str:
    """What a task is, whatever its layer: `gemv down`, `attention`."""
    if not isinstance(task, MatVec | StretchMatMul):
        return task.stem
    return f"{task.stem} {program.matrices[task.weight].name.rpartition('.')[2]}"


def task_name(program: Program, task: Instruction) -> str:
    """What a task is and where: `gemv L3.down`, `attention L3 head 2 split 0`."""
    if isinstance(task, MatVec | StretchMatMul):
        return f"{task.stem} {program.matrices[task.weight].name}"
    if isinstance(task, Attention):
        return f"{task.stem} L{task.layer} head {task.kv_head} split {task.split}"
    return task.stem


def chrome_events(spans: Sequence[Span], program: Program) -> Iterator[dict[str, Any]]:
    """Events of the Chrome trace format: a process for each SM, a thread for each actor, tasks with their waits inside.

    Of an SM's consumers only the first is shown: all do the same tasks, and it has a part in each.
    """
    threads = {"feeder": 0, "consumer": 1, "storer": 2, "watcher": 3}
    for sm in sorted({span.sm for span in spans}):
        yield {"ph": "M", "name": "process_name", "pid": sm, "args": {"name": f"SM {sm}"}}
        yield {"ph": "M", "name": "process_sort_index", "pid": sm, "args": {"sort_index": sm}}
        for role, thread in threads.items():
            yield {"ph": "M", "name": "thread_name", "pid": sm, "tid": thread, "args": {"name": role}}
    for span in (span for span in spans if span.warp == 0):
        place = {"ph": "X", "pid": span.sm, "tid": threads[span.role]}
        task = program.queues[span.sm][span.task]
        phases = {f"{phase}_us": round(us, 3) for phase, us in span.phases_us().items() if us > 0}
        args = {"task": span.task, **phases}
        yield {**place, "name": task_name(program, task), "cat": BUSY[span.role], **_extent(span), "args": args}
        for wait in span.waits:
            yield {**place, "name": WAITS[wait.kind] or "waiting", "cat": wait.phase, **_extent(wait)}


def _extent(part: Span | Wait) -> dict[str, float]:
    return {"ts": round(part.begin_us, 3), "dur": round(part.end_us - part.begin_us, 3)}
