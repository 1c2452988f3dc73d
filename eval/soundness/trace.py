"""Runs a launch actor by actor under a chosen order, with symbolic values, and checks that what the run did was ordered.

The actors are written as docs/machine.md tells them. A value is a hash of what it was made from, so that "different bits" means different
hashes. `happens_before` then looks at one run: an overwrite must come after every read of the old value through publishes and their checks.
Tasks of a stretch check nothing: what orders them are counters with all their arrivals, and a read must find what it expects.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from random import Random
from typing import TypeAlias

from amk.eval.soundness.findings import Unsafe
from amk.eval.soundness.footprint import (
    Positions,
    Step,
    Token,
    Touch,
    all_touches,
    appends_rows,
    cut_points,
    fed_chunks,
    launches,
    steps_at,
)
from amk.eval.soundness.static_rules import static_problem
from amk.isa.abi import NONE
from amk.isa.attention import Attention
from amk.isa.instruction import Instruction
from amk.schedule.program import Program

Key: TypeAlias = tuple[str, int] | tuple[str, int, int]  # what an actor waits for
Actor: TypeAlias = Iterator[Key]
TaskRun: TypeAlias = tuple[int, int, int]  # token, SM, queue index
Words: TypeAlias = tuple[tuple[range, int], ...]  # atoms and the tag word that they must carry


def check_traces(program: Program, random: Random, tokens: int = 2, orders: int = 64) -> Unsafe | None:
    """What is wrong with the program: a static rule, a deadlock, a race of one run, or an adversarial order that hangs or differs."""
    problem = static_problem(program)
    if problem is not None:
        return problem
    plans = [Plan(program, positions) for positions in launches(program, tokens)]
    firsts = []
    for plan in plans:
        run = Run(plan, Order())
        problem = run.finish() or happens_before(run)
        if problem is not None:
            return problem
        firsts.append(run)
    for number in range(orders):
        plan, first = plans[number % len(plans)], firsts[number % len(plans)]
        run = Run(plan, Order(random, plan.tasks))
        problem = run.finish()
        if problem is None and run.results != first.results:
            problem = Unsafe("race", f"order {number} gives other values")
        if problem is not None:
            return problem
    return None


class Order:
    """Who goes first: publishes, then actors, as they come; or at random, one task's publishes kept back till nothing else can go on."""

    def __init__(self, random: Random | None = None, tasks: tuple[tuple[int, int], ...] = ()) -> None:
        self.random = random
        self.late = random.choice(tasks) if random is not None and tasks else None
        self.slow = random.random() if random is not None else 0.0
        self.actors: dict[int, float] = {}

    def actor(self, number: int) -> float:
        if self.random is None:
            return 1.0
        if number not in self.actors or self.random.random() < 0.02:
            self.actors[number] = self.random.random()
        return self.actors[number]

    def publish(self, sm: int, index: int) -> float:
        if self.random is None:
            return 0.0
        return 3.0 if (sm, index) == self.late else self.random.random() + self.slow


class Plan:
    """What every run of one launch shares: its steps, with packets cut into atoms, and the tag words of reads and publishes."""

    def __init__(self, program: Program, positions: list[Positions]) -> None:
        self.program, self.machine = program, program.machine
        self.tokens: list[Token] = [steps_at(program, at) for at in positions]
        self.cuts = cut_points([touch for token in self.tokens for touch in all_touches(token)])
        self.tasks = tuple((sm, index) for sm, queue in enumerate(program.queues) for index in range(len(queue)))
        self.appending = [sm for sm in range(len(program.queues)) if appends_rows(program, sm)]
        self.words: dict[tuple[TaskRun, str, int], Words] = {}
        self.arrivals = [0] * len(program.counters)  # of a token, by tasks of a stretch
        for task in (task for queue in program.queues for task in queue if task.gated and task.done_counter != NONE):
            self.arrivals[task.done_counter] += 1
        for t, token in enumerate(self.tokens):
            for step in (step for queue in token for step in queue):
                self._step(t, step)

    def _step(self, t: int, step: Step) -> None:
        at = (t, step.sm, step.index)
        kinds = (("warp", step.warp_reads), ("tile", step.tile_reads), ("fed", (step.fed_reads,)), ("write", step.publishes))
        for name, groups in kinds:
            for number, touches in enumerate(groups):
                self.words[at, name, number] = tuple(
                    (self.atoms(touch), self.word(t, touch)) for touch in touches if touch.lo < touch.hi and t >= touch.carried
                )

    def atoms(self, touch: Touch) -> range:
        return range(bisect_left(self.cuts, touch.lo), bisect_left(self.cuts, touch.hi))

    def word(self, t: int, touch: Touch) -> int:
        """The tag word in epoch t + 1; 0 means not checked."""
        return (t + 1 - touch.carried) * self.machine.tags + touch.tag if touch.tag else 0


@dataclass(frozen=True, slots=True)
class Publish:
    """One publish on its way: `after` are the publishes that it comes after, as a bit set."""

    number: int
    task: TaskRun
    tile: int
    words: Words
    value: int
    after: int


@dataclass(slots=True)
class Reading:
    """What a task has read so far: values by reader, and the publishes that its own come after."""

    values: dict[tuple[int, str, int], int] = field(default_factory=dict)
    after: int = 0


@dataclass(slots=True)
class Shared:
    """What the actors of one SM hand to each other."""

    released: int = 0
    fed: list[tuple[int, int, int]] = field(default_factory=list)  # token, task and chunk in every slot filled so far
    taken: list[int] = field(default_factory=list)  # chunks released, by each consumer
    reduced: list[int] = field(default_factory=list)  # tiles reduced, by each consumer
    met: list[int] = field(default_factory=list)
    freed: int = 0
    ended: dict[int, int] = field(default_factory=lambda: defaultdict(int))  # token: actors that have finished it


class Run:
    """One execution of a launch."""

    def __init__(self, plan: Plan, order: Order) -> None:
        self.plan, self.order, self.machine = plan, order, plan.machine
        atoms = len(plan.cuts)
        self.tags, self.values, self.writer = [0] * atoms, [0] * atoms, [-1] * atoms
        self.counters = [0] * len(plan.program.counters)
        self.shared = [Shared(taken=[0] * self.warps, reduced=[0] * self.warps, met=[0] * self.warps) for _ in plan.program.queues]
        self.readings: dict[TaskRun, Reading] = defaultdict(Reading)
        self.publishes: list[Publish] = []
        self.results: dict[tuple[TaskRun, int], int] = {}
        self.reads: dict[tuple[int, int], set[tuple[TaskRun, int]]] = defaultdict(set)  # (publish, atom): tasks and tile (-1: before all)
        self.writes: dict[int, list[int]] = defaultdict(list)  # atom: publishes in the order in which they became visible
        self.problem: Unsafe | None = None
        self.heap: list[tuple[float, int, int, Publish | None]] = []
        self.turns = 0
        self.waiting: dict[Key, list[int]] = defaultdict(list)
        self.queued: dict[tuple[int, int, int], deque[Publish]] = defaultdict(deque)
        self.reached = [0] * len(plan.program.counters)  # of a stretch: the publishes that come before the arrivals at a counter, so far
        self.unseen: dict[TaskRun, int] = defaultdict(int)  # publishes on their way
        self.names: list[str] = []
        self.actors: list[Actor] = []
        for sm in range(len(plan.program.queues)):
            self._start(sm)

    @property
    def warps(self) -> int:
        return self.machine.consumer_warps

    # ---- the run

    def _start(self, sm: int) -> None:
        actors = [("watcher", self._watcher(sm)), ("feeder", self._feeder(sm)), ("storer", self._storer(sm))]
        actors += [(f"consumer {warp}", self._consumer(sm, warp)) for warp in range(self.warps)]
        for name, actor in actors:
            self.names.append(f"{name} of SM {sm}")
            self.actors.append(actor)
            self._ready(len(self.actors) - 1)

    def _ready(self, actor: int) -> None:
        self.turns += 1
        heappush(self.heap, (self.order.actor(actor), self.turns, actor, None))

    def notify(self, key: Key) -> None:
        for actor in self.waiting.pop(key, ()):
            self._ready(actor)

    def finish(self) -> Unsafe | None:
        """Runs until nobody can move: None if every actor has come to its end."""
        ended = 0
        while self.heap and self.problem is None:
            _, _, number, publish = heappop(self.heap)
            if publish is not None:
                self._show(publish)
                continue
            key = next(self.actors[number], None)
            if key is None:
                ended += 1
            else:
                self.waiting[key].append(number)
        if self.problem is None and ended < len(self.actors):
            stuck = [f"{self.names[actor]} for {key}" for key, actors in self.waiting.items() for actor in actors]
            self.problem = Unsafe("deadlock", f"{len(stuck)} actors wait for ever, among them the {'; '.join(stuck[:3])}")
        return self.problem or self._left_over()

    def _left_over(self) -> Unsafe | None:
        """A launch of one step may end with chunks that a next token would have taken for its own."""
        for sm, shared in enumerate(self.shared):
            if len(shared.fed) > min(shared.taken):
                return Unsafe("ring", f"nobody takes chunk {shared.fed[min(shared.taken)]} of SM {sm}")
        return None

    def _show(self, publish: Publish) -> None:
        """A publish becomes visible."""
        for atoms, word in publish.words:
            for atom in atoms:
                self.tags[atom], self.values[atom], self.writer[atom] = word, hash((publish.value, atom)), publish.number
                self.writes[atom].append(publish.number)
                self.notify(("atom", atom))
        self.unseen[publish.task] -= 1
        self.notify(("shown", *publish.task[1:]))
        thread = (*publish.task[1:], publish.tile)
        self.queued[thread].popleft()
        if self.queued[thread]:
            self._send(self.queued[thread][0])

    def _send(self, publish: Publish) -> None:
        self.turns += 1
        heappush(self.heap, (self.order.publish(*publish.task[1:]), self.turns, 0, publish))

    # ---- packets

    def _read(self, at: TaskRun, name: str, number: int, tile: int = -1) -> Actor:
        """Waits until all packets of a group of reads carry their tag, and takes what they hold; publishes from `tile` on come after."""
        reading = self.readings[at]
        task = self.plan.program.queues[at[1]][at[2]]
        opened = self._opened(task) if task.gated else None
        reading.after |= opened or 0
        seen: list[int] = []
        for atoms, word in self.plan.words[at, name, number]:
            for atom in atoms:
                while word and self.tags[atom] != word and opened is None:
                    yield ("atom", atom)
                writer = self.writer[atom]
                if opened is not None:
                    self._check_gated(at, atom, word, opened)
                seen.append(self.values[atom])
                self.reads[writer, atom].add((at, tile))
                if writer >= 0:
                    reading.after |= self.publishes[writer].after | 1 << writer
        reading.values[tile, name, number] = hash(tuple(seen))

    def _opened(self, task: Instruction) -> int:
        """The publishes that a task of a stretch comes after, having waited for all arrivals at its counter; a wait for fewer says none."""
        counter = task.wait_counter
        return self.reached[counter] if counter != NONE and task.wait_count == self.plan.arrivals[counter] else 0

    def _check_gated(self, at: TaskRun, atom: int, word: int, opened: int) -> None:
        if self.problem is None and (self.tags[atom] != word or not opened >> self.writer[atom] & 1):
            why = "holds another value than it expects" if self.tags[atom] != word else "nothing says is there"
            self.problem = Unsafe("race", f"task {at} reads packet {self.plan.cuts[atom]}, which {why}")

    def _publish(self, at: TaskRun, tile: int) -> None:
        words = self.plan.words[at, "write", tile]
        reading = self.readings[at]
        sources = tuple(value for (kind, _, _), value in sorted(reading.values.items()) if kind in (-1, tile))
        value = self.results[at, tile] = hash((at, tile, sources))
        if not words:
            return
        publish = Publish(len(self.publishes), at, tile, words, value, reading.after)
        self.publishes.append(publish)
        self.unseen[at] += 1
        thread = (*at[1:], tile)
        self.queued[thread].append(publish)
        if len(self.queued[thread]) == 1:
            self._send(publish)

    def _arrive(self, counter: int) -> None:
        if counter != NONE:
            self.counters[counter] += 1
            self.notify(("counter", counter))

    def _release(self, at: TaskRun, step: Step) -> Actor:
        """The one arrival of a task of a stretch, when all that it has published is visible."""
        while self.unseen[at]:
            yield ("shown", *at[1:])
        if step.task.done_counter != NONE:
            own = sum(1 << publish.number for publish in self.publishes if publish.task == at)
            self.reached[step.task.done_counter] |= own | self._opened(step.task)
            self._arrive(step.task.done_counter)

    # ---- actors

    def _watcher(self, sm: int) -> Actor:
        for t, token in enumerate(self.plan.tokens):
            for step in token[sm]:
                task = step.task
                yield from self._gate(task, t)
                self.shared[sm].released += 1
                self.notify(("released", sm))

    def _gate(self, task: Instruction, t: int) -> Actor:
        while not self._is_open(task, t):
            yield ("counter", task.wait_counter)

    def _is_open(self, task: Instruction, t: int) -> bool:
        return task.wait_counter == NONE or self.counters[task.wait_counter] >= task.wait_count * (t if task.carried else t + 1)

    def _feeder(self, sm: int) -> Actor:
        shared = self.shared[sm]
        for t, token in enumerate(self.plan.tokens):
            waited = False
            for index, chunk in fed_chunks(self.plan.program, token, sm):
                task = token[sm][index].task
                if task.gated:
                    if chunk == 0:
                        yield from self._feed_gated(t, token[sm][index])
                    continue
                if isinstance(task, Attention) and not waited:
                    waited = True
                    yield from self._token_end(t - self.machine.kv_lag)
                while len(shared.fed) - min(shared.taken) >= self.machine.stages:
                    yield ("taken", sm)
                shared.fed.append((t, index, chunk))
                self.notify(("fed", sm))

    def _feed_gated(self, t: int, step: Step) -> Actor:
        """Weights go up to `inflight` chunks ahead of x; the gate is looked at before each, and waited for when they are so far."""
        shared, begun, is_open = self.shared[step.sm], 0, False  # chunks whose weights have been asked for; whether x has been, too
        first = len(shared.fed)
        while begun < step.chunks or not is_open:
            if not is_open and (begun in (self.machine.inflight, step.chunks) or self._is_open(step.task, t)):
                yield from self._gate(step.task, t)
                yield from self._read((t, step.sm, step.index), "fed", 0)
                is_open = True
                self._fill(t, step, range(begun))
            if begun < step.chunks:
                while first + begun - min(shared.taken) >= self.machine.stages:
                    yield ("taken", step.sm)
                self._fill(t, step, range(begun, begun + is_open))
                begun += 1

    def _fill(self, t: int, step: Step, chunks: range) -> None:
        self.shared[step.sm].fed += [(t, step.index, chunk) for chunk in chunks]
        self.notify(("fed", step.sm))

    def _token_end(self, t: int) -> Actor:
        """Waits for the end of a token of this launch on every SM that appends KV rows."""
        for sm in self.plan.appending if t >= 0 else ():
            while self.shared[sm].ended[t] < self.warps + 1:
                yield ("ended", sm, t)

    def _end(self, sm: int, t: int) -> None:
        self.shared[sm].ended[t] += 1
        self.notify(("ended", sm, t))

    def _consumer(self, sm: int, warp: int) -> Actor:
        shared, begun = self.shared[sm], 0
        for t, token in enumerate(self.plan.tokens):
            for step in token[sm]:
                begun += 1
                at = (t, sm, step.index)
                if not step.skipped:
                    while shared.released < begun:
                        yield ("released", sm)
                    yield from self._read(at, "warp", warp)
                    yield from self._reduce(at, step, warp) if step.task.stored else self._compute(at, step, warp)
                if step.task.gated:
                    if warp == 0:
                        yield from self._release(at, step)
                elif not step.task.stored:
                    self._arrive(step.task.done_counter)
            self._end(sm, t)

    def _take(self, at: TaskRun, warp: int, chunk: int) -> Actor:
        """Takes the next slot of the ring and releases it."""
        t, sm, index = at
        shared = self.shared[sm]
        while len(shared.fed) <= shared.taken[warp]:
            yield ("fed", sm)
        found = shared.fed[shared.taken[warp]]
        if found != (t, index, chunk) and self.problem is None:
            self.problem = Unsafe("ring", f"task {(sm, index)} takes chunk {found}, but expects {(t, index, chunk)}")
        shared.taken[warp] += 1
        self.notify(("taken", sm))

    def _reduce(self, at: TaskRun, step: Step, warp: int) -> Actor:
        shared, tiles = self.shared[step.sm], len(step.publishes)
        for tile in range(tiles):
            if tile and step.rereads:
                yield from self._read(at, "warp", warp, tile)
            for chunk in range(tile * step.chunks // tiles, (tile + 1) * step.chunks // tiles):
                yield from self._take(at, warp, chunk)
            while shared.reduced[warp] - shared.freed >= self.machine.reduction_slots:
                yield ("freed", step.sm)
            shared.reduced[warp] += 1
            self.notify(("reduced", step.sm))

    def _compute(self, at: TaskRun, step: Step, warp: int) -> Actor:
        shared = self.shared[step.sm]
        for chunk in range(step.chunks):
            yield from self._take(at, warp, chunk)
        shared.met[warp] += 1
        self.notify(("met", step.sm))
        while min(shared.met) < shared.met[warp]:
            yield ("met", step.sm)
        if warp == 0:
            for tile in range(len(step.publishes)):
                self._publish(at, tile)

    def _storer(self, sm: int) -> Actor:
        shared = self.shared[sm]
        for t, token in enumerate(self.plan.tokens):
            for step in (step for step in token[sm] if step.task.stored and not step.skipped):
                for tile in range(len(step.publishes)):
                    yield from self._read((t, sm, step.index), "tile", tile, tile)
                    while min(shared.reduced) <= shared.freed:
                        yield ("reduced", sm)
                    shared.freed += 1
                    self.notify(("freed", sm))
                    self._publish((t, sm, step.index), tile)
                self._arrive(step.task.done_counter)
            self._end(sm, t)


def happens_before(run: Run) -> Unsafe | None:
    """The first overwrite of a finished run that nothing orders after the old write and its reads, or a packet published twice."""
    own: dict[TaskRun, list[Publish]] = defaultdict(list)
    for publish in run.publishes:
        own[publish.task].append(publish)
    for atom, writes in run.writes.items():
        words = [word for number in writes for atoms, word in run.publishes[number].words if atom in atoms]
        if len(set(words)) < len(words):
            return Unsafe("coverage", f"packet {run.plan.cuts[atom]} is published twice with one tag")
        for old, new in zip(writes, writes[1:], strict=False):
            problem = _overwrite(run, own, atom, run.publishes[old], run.publishes[new])
            if problem is not None:
                return problem
    return None


def _overwrite(run: Run, own: dict[TaskRun, list[Publish]], atom: int, old: Publish, new: Publish) -> Unsafe | None:
    same_thread = (*old.task[1:], old.tile) == (*new.task[1:], new.tile)
    readers = run.reads.get((old.number, atom), set())
    if not same_thread and not (readers and new.after >> old.number & 1):  # that another packet was seen tells nothing about this one
        return Unsafe("race", f"nothing orders the writes of packet {run.plan.cuts[atom]} by tasks {old.task} and {new.task}")
    for reader, tile in readers:
        ends = [publish.number for publish in own[reader] if publish.tile >= tile]
        if not any(number == new.number or new.after >> number & 1 for number in ends):
            return Unsafe("race", f"task {new.task} overwrites packet {run.plan.cuts[atom]}, which task {reader} may still read")
    return None
