"""Every interleaving of a small program, under the memory model of docs/machine.md.

Every step of an actor but one only waits for something that stays true and makes nothing false: such steps commute with all others
and are taken at once. The exception is a publish becoming visible, because it overwrites. The explorer visits every order in which
issued publishes can become visible (any order, but for one task's publishes of one tile, which one thread makes). A read is in
progress until a publish that depends on it is visible. A state is the set of visible publishes: it determines where every actor stands.

It does so twice. First the actors take their steps in program order: this finds deadlocks. Then every publish is on its own and waits
for nothing but the packets that its task checks, since relaxed loads and stores of different tasks are in no order: this finds races.

Tasks of a stretch check nothing and wait for counters alone, so the second part is another one for them (eval/soundness/gates.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from amk.eval.soundness.findings import TooLarge, Unsafe
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
from amk.eval.soundness.gates import GatedTask, early_problem
from amk.eval.soundness.static_rules import static_problem
from amk.isa.abi import NONE
from amk.isa.attention import Attention
from amk.schedule.program import Program

VISIBLE, AFTER, COUNTED, PUBLISH, ARRIVE = range(5)  # operations of an actor's script
Op = tuple[int, int, int]


def explore(program: Program, tokens: int = 2, max_states: int = 20_000) -> Unsafe | None:
    """What can go wrong in launches of `tokens` tokens, or None; TooLarge if more than `max_states` states must be visited."""
    problem = static_problem(program)
    if problem is not None:
        return problem
    for positions in launches(program, tokens):
        try:
            launch = _Launch(program, positions)
            found = launch.explore(max_states)
        except _Found as error:
            found = error.problem
        if found is not None:
            return found
    return None


class _Found(Exception):
    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.problem = Unsafe(kind, text)


@dataclass
class _Script:
    """The operations of one actor. `marks` name the place right after an operation that others wait for."""

    actor: int
    ops: list[Op] = field(default_factory=list)
    marks: dict[tuple[str, int], int] = field(default_factory=dict)
    awaited: list[tuple[int, _Script, tuple[str, int]]] = field(default_factory=list)  # places to fill in when all marks are known

    def wait(self, other: _Script, mark: tuple[str, int]) -> None:
        self.awaited.append((len(self.ops), other, mark))
        self.ops.append((AFTER, other.actor, 0))

    def mark(self, name: str, number: int) -> None:
        self.marks[name, number] = len(self.ops)

    def link(self) -> None:
        """Fills in the places that waits refer to; a mark that never comes is a place beyond the end."""
        for at, other, mark in self.awaited:
            self.ops[at] = (AFTER, other.actor, other.marks.get(mark, len(other.ops) + 1))


class _Launch:
    """One launch, compiled to scripts over bit sets of publishes."""

    def __init__(self, program: Program, positions: list[Positions]) -> None:
        self.program, self.machine = program, program.machine
        self.tokens = [steps_at(program, at) for at in positions]
        self.cuts = cut_points([touch for token in self.tokens for touch in all_touches(token)])
        self.bits: list[tuple[int, Step, int]] = []  # token, step and tile of every publish that is not empty
        self.bit_of: dict[tuple[int, int, int, int], int] = {}
        self.atoms: list[list[int]] = []  # what each publish writes
        self.producer: dict[tuple[int, int, int], int] = {}  # (token, atom, tag)
        self.readers: dict[tuple[int, int], list[int]] = defaultdict(list)  # (publish, atom): for each reader, the publishes that end it
        self.depends: dict[int, int] = {}  # publish: those that its task checks before it
        self.gated: list[GatedTask] = []
        self._number_publishes()
        self.scripts = self._scripts()

    # ---- what is published, and who reads it

    def _range(self, touch: Touch) -> range:
        return range(bisect_left(self.cuts, touch.lo), bisect_left(self.cuts, touch.hi))

    def _number_publishes(self) -> None:
        for t, token in enumerate(self.tokens):
            for step in (step for queue in token for step in queue):
                for tile, touches in enumerate(step.publishes):
                    if touches:
                        self._add_publish(t, step, tile, touches)

    def _add_publish(self, t: int, step: Step, tile: int, touches: tuple[Touch, ...]) -> None:
        bit = len(self.bits)
        self.bits.append((t, step, tile))
        self.bit_of[t, step.sm, step.index, tile] = bit
        self.atoms.append([atom for touch in touches for atom in self._range(touch)])
        if len(set(self.atoms[bit])) < len(self.atoms[bit]):
            raise _Found("coverage", f"{step.name} publishes packets twice with one tile")
        for atom, tag in ((atom, touch.tag) for touch in touches for atom in self._range(touch)):
            if self.producer.setdefault((t, atom, tag), bit) != bit:
                raise _Found("coverage", f"{step.name} publishes packets that another publishes with the same tag")

    def _needed(self, t: int, step: Step, touches: tuple[Touch, ...], tile: int) -> int:
        """The publishes that a check of `touches` waits for; registers the reader (`tile` -1: a consumer, before any publish)."""
        ends = 0
        for later in range(max(tile, 0), len(step.publishes)):
            bit = self.bit_of.get((t, step.sm, step.index, later))
            ends |= 0 if bit is None else 1 << bit
        need = 0
        for touch in touches:
            source = t - touch.carried
            for atom in self._range(touch) if source >= 0 else ():
                bit = self.producer.get((source, atom, touch.tag))
                if bit is None:
                    raise _Found("coverage", f"{step.name} reads packet {self.cuts[atom]}, which nobody publishes with tag {touch.tag}")
                need |= 1 << bit
                if ends not in self.readers[bit, atom]:
                    self.readers[bit, atom].append(ends)
        for bit in _bits_of(ends):
            self.depends[bit] = self.depends.get(bit, 0) | need
        return need

    # ---- scripts

    def _scripts(self) -> list[_Script]:
        scripts: list[_Script] = []

        def new() -> _Script:
            scripts.append(_Script(len(scripts)))
            return scripts[-1]

        sms = [_Sm(sm, new(), new(), new(), [new() for _ in range(self.machine.consumer_warps)]) for sm in range(len(self.program.queues))]
        for sm in sms:
            self._fill(sm, sms)
        for script in scripts:
            script.link()
        return scripts

    def _fill(self, sm: _Sm, sms: list[_Sm]) -> None:
        for t, token in enumerate(self.tokens):
            self._feed(sm, sms, t, token)
            for step in token[sm.number]:
                self._watch(sm, t, step)
                for warp, script in enumerate(sm.consumers):
                    self._consume(sm, t, step, warp, script)
                if step.task.stored and not step.skipped:
                    self._store(sm, t, step)
                sm.begun += 1
            for script in (sm.storer, *sm.consumers):
                script.mark("end", t)

    def _feed(self, sm: _Sm, sms: list[_Sm], t: int, token: Token) -> None:
        expected = [(s.index, chunk) for s in token[sm.number] for chunk in range(s.chunks)]
        if fed_chunks(self.program, token, sm.number) != expected:
            raise _Found("ring", f"SM {sm.number} streams other chunks than its consumers take")
        waited = False
        for index, chunk in expected:
            step = token[sm.number][index]
            if step.task.gated:
                if chunk == 0:
                    self._feed_gated(sm, t, step)
                continue
            if isinstance(step.task, Attention) and not waited:
                waited = True
                self._wait_token_end(sm, sms, t - self.machine.kv_lag)
            self._wait_slot(sm, sm.fed)
            sm.feeder.ops.append((VISIBLE, 0, 0))
            sm.feeder.mark("fed", sm.fed)
            sm.fed += 1

    def _wait_slot(self, sm: _Sm, chunk: int) -> None:
        for consumer in sm.consumers if chunk >= self.machine.stages else ():
            sm.feeder.wait(consumer, ("taken", chunk - self.machine.stages))

    def _feed_gated(self, sm: _Sm, t: int, step: Step) -> None:
        """Weights may be `inflight` chunks ahead of x, which comes behind the gate: at worst they are as far as that."""
        ahead = min(step.chunks, self.machine.inflight)
        for chunk in range(sm.fed, sm.fed + ahead):
            self._wait_slot(sm, chunk)
        sm.feeder.ops.append(self._gate(t, step))
        for chunk in range(sm.fed, sm.fed + step.chunks):
            if chunk >= sm.fed + ahead:
                self._wait_slot(sm, chunk)
                sm.feeder.ops.append((VISIBLE, 0, 0))
            sm.feeder.mark("fed", chunk)
        sm.fed += step.chunks

    def _wait_token_end(self, sm: _Sm, sms: list[_Sm], t: int) -> None:
        for other in sms:
            if t >= 0 and appends_rows(self.program, other.number):
                for script in (other.storer, *other.consumers):
                    sm.feeder.wait(script, ("end", t))

    def _watch(self, sm: _Sm, t: int, step: Step) -> None:
        sm.watcher.ops.append(self._gate(t, step))
        sm.watcher.mark("released", sm.begun)

    def _gate(self, t: int, step: Step) -> Op:
        task = step.task
        threshold = task.wait_count * (t if task.carried else t + 1)
        return (COUNTED, task.wait_counter, threshold) if task.wait_counter != NONE else (VISIBLE, 0, 0)

    def _consume(self, sm: _Sm, t: int, step: Step, warp: int, script: _Script) -> None:
        if not step.skipped:
            script.wait(sm.watcher, ("released", sm.begun))
            if not step.task.gated:
                script.ops.append((VISIBLE, self._needed(t, step, step.warp_reads[warp], -1), 0))
            if step.task.stored:
                self._reduce(sm, t, step, warp, script)
                return
            self._take(sm, step.chunks, warp, script)
            script.mark("met", sm.begun)
            for other in sm.consumers:
                script.wait(other, ("met", sm.begun))
            script.ops.append((PUBLISH, self._bits(t, step, range(len(step.publishes))), 0))
        if step.task.gated:
            self._release(t, step, warp, script)
        elif step.task.done_counter != NONE and not step.task.stored:
            script.ops.append((ARRIVE, step.task.done_counter, 1))

    def _release(self, t: int, step: Step, warp: int, script: _Script) -> None:
        """The consumers' one arrival, when all that they have published is visible."""
        if warp > 0:
            return
        task, published = step.task, self._bits(t, step, range(len(step.publishes)))
        needed = self._needed(t, step, (*step.warp_reads[warp], *step.fed_reads), -1)
        count = 0 if task.wait_counter == NONE else task.wait_count
        self.gated.append(GatedTask(step.name, task.wait_counter, count, task.done_counter, needed, published))
        if task.done_counter != NONE:
            script.ops += [(VISIBLE, published, 0), (ARRIVE, task.done_counter, 1)]

    def _bits(self, t: int, step: Step, tiles: range) -> int:
        found = (self.bit_of.get((t, step.sm, step.index, tile)) for tile in tiles)
        return sum(1 << bit for bit in found if bit is not None)

    def _take(self, sm: _Sm, chunks: int, warp: int, script: _Script) -> None:
        for _ in range(chunks):
            script.wait(sm.feeder, ("fed", sm.taken[warp]))
            script.mark("taken", sm.taken[warp])
            sm.taken[warp] += 1

    def _reduce(self, sm: _Sm, t: int, step: Step, warp: int, script: _Script) -> None:
        tiles = len(step.publishes)
        for tile in range(tiles):
            if tile and step.rereads:
                script.ops.append((VISIBLE, self._needed(t, step, step.warp_reads[warp], tile), 0))
            self._take(sm, step.chunks // tiles, warp, script)
            number = sm.reduced[warp]
            if number >= self.machine.reduction_slots:
                script.wait(sm.storer, ("freed", number - self.machine.reduction_slots))
            script.mark("reduced", number)
            sm.reduced[warp] += 1

    def _store(self, sm: _Sm, t: int, step: Step) -> None:
        for tile, touches in enumerate(step.tile_reads):
            sm.storer.ops.append((VISIBLE, self._needed(t, step, touches, tile), 0))
            for consumer in sm.consumers:
                sm.storer.wait(consumer, ("reduced", sm.stored))
            sm.storer.mark("freed", sm.stored)
            sm.storer.ops.append((PUBLISH, self._bits(t, step, range(tile, tile + 1)), 0))
            sm.stored += 1
        if step.task.done_counter != NONE:
            sm.storer.ops.append((ARRIVE, step.task.done_counter, 1))

    # ---- exploration

    def explore(self, max_states: int) -> Unsafe | None:
        ops = [script.ops for script in self.scripts]
        start = self._start(ops)
        first = start.copy()
        order = list(self._first_run(first, ops))
        if not first.ended(ops):
            return self._stuck(first, ops)
        hazards = self._hazards(order)
        if self.gated:
            return self._early(hazards)
        found = self._visit(start, ops, hazards, max_states)
        if found is not None:
            return found
        alone = [[(VISIBLE, self.depends.get(bit, 0), 0), (PUBLISH, 1 << bit, 0)] for bit in range(len(self.bits))]
        return self._visit(self._start(alone), alone, hazards, max_states)

    def _early(self, hazards: list[_Hazard]) -> Unsafe | None:
        """Reads and overwrites that a stretch's counters allow too early."""
        befores = [(bit, 1 << other) for bit, hazard in enumerate(hazards) for other in _bits_of(hazard.before | hazard.same_thread)]
        ends = [(bit, ends) for bit, hazard in enumerate(hazards) for ends in hazard.readers]
        return early_problem(self.gated, befores + ends, self._name)

    def _start(self, ops: list[list[Op]]) -> _State:
        state = _State(0, 0, [0] * len(ops), [0] * len(self.program.counters))
        state.advance(ops)
        return state

    def _visit(self, start: _State, ops: list[list[Op]], hazards: list[_Hazard], max_states: int) -> Unsafe | None:
        seen: set[int] = set()
        stack = [start]
        while stack:
            state = stack.pop()
            found = self._settle(state, ops, hazards)
            if found is not None:
                return found
            if state.visible in seen:
                continue
            seen.add(state.visible)
            if len(seen) > max_states:
                raise TooLarge(f"more than {max_states} states")
            pending = state.issued & ~state.visible
            if not pending and not state.ended(ops):
                return self._stuck(state, ops)
            stack.extend(self._successors(state, pending, ops, hazards))
        return None

    def _first_run(self, state: _State, ops: list[list[Op]]) -> Iterator[int]:
        """The order in which publishes become visible in one execution, which fixes the order of each packet's values."""
        while pending := state.issued & ~state.visible:
            bit = (pending & -pending).bit_length() - 1
            state.visible |= 1 << bit
            state.advance(ops)
            yield bit

    def _hazards(self, order: list[int]) -> list[_Hazard]:
        last: dict[int, int] = {}  # atom: the publish that wrote it last
        hazards = [_Hazard() for _ in self.bits]
        for bit in order:
            for atom in self.atoms[bit]:
                if atom in last:
                    self._add_hazard(hazards[bit], bit, last[atom], self.readers.get((last[atom], atom), []))
                last[atom] = bit
        for bit, hazard in enumerate(hazards):
            for other in _bits_of(hazard.before | hazard.same_thread) | {b for ends in hazard.readers for b in _bits_of(ends)}:
                hazards[other].guards |= 1 << bit
        return hazards

    def _add_hazard(self, hazard: _Hazard, bit: int, before: int, readers: list[int]) -> None:
        t, step, tile = self.bits[bit]
        _, old, old_tile = self.bits[before]
        if (old.sm, old.index, old_tile) == (step.sm, step.index, tile):
            hazard.same_thread |= 1 << before
        elif readers:
            hazard.before |= 1 << before
        else:  # another packet of the same publish tells nothing about this one
            raise _Found("race", f"{self._name(bit)} overwrites packets of {self._name(before)} that nobody reads: they may come later")
        hazard.readers |= {ends for ends in readers if not ends >> bit & 1}

    def _settle(self, state: _State, ops: list[list[Op]], hazards: list[_Hazard]) -> Unsafe | None:
        """Looks at every publish that may become visible now; those that nobody's safety hangs on do so at once."""
        while True:
            eager = 0
            pending = state.issued & ~state.visible
            while pending:
                low = pending & -pending
                pending ^= low
                bit = low.bit_length() - 1
                hazard = hazards[bit]
                if hazard.same_thread & ~state.visible:
                    continue
                if hazard.before & ~state.visible or any(not ends & state.visible for ends in hazard.readers):
                    return self._overwrite(bit, state.visible, hazard)
                if not hazard.guards & ~state.visible:
                    eager |= low
            if not eager:
                return None
            state.visible |= eager
            state.advance(ops)

    def _successors(self, state: _State, pending: int, ops: list[list[Op]], hazards: list[_Hazard]) -> Iterator[_State]:
        for bit in _bits_of(pending):
            if not hazards[bit].same_thread & ~state.visible:
                after = state.copy()
                after.visible |= 1 << bit
                after.advance(ops)
                yield after

    def _overwrite(self, bit: int, visible: int, hazard: _Hazard) -> Unsafe:
        if hazard.before & ~visible:
            other = min(_bits_of(hazard.before & ~visible))
            return Unsafe("race", f"nothing orders {self._name(other)} before {self._name(bit)}, which write the same packets")
        ends = min(ends for ends in hazard.readers if not ends & visible)
        reader = self._name(min(_bits_of(ends))) if ends else "a task that publishes nothing"
        return Unsafe("race", f"{self._name(bit)} may overwrite what {reader} still reads")

    def _name(self, bit: int) -> str:
        t, step, tile = self.bits[bit]
        return f"task {step.name} tile {tile} of token {t}"

    def _stuck(self, state: _State, ops: list[list[Op]]) -> Unsafe:
        waiting = [i for i, (pc, script) in enumerate(zip(state.pcs, ops, strict=True)) if pc < len(script)]
        return Unsafe("deadlock", f"actors {waiting[:6]} wait for each other (numbers count watcher, feeder, storer, consumers of each SM)")


@dataclass
class _Sm:
    """The scripts of one SM's actors and how far they have been written."""

    number: int
    watcher: _Script
    feeder: _Script
    storer: _Script
    consumers: list[_Script]
    begun: int = 0
    fed: int = 0
    stored: int = 0
    taken: list[int] = field(default_factory=lambda: [0] * 64)
    reduced: list[int] = field(default_factory=lambda: [0] * 64)


@dataclass
class _Hazard:
    """When a publish may become visible: after `same_thread` (it will), `before` (else a race) and one publish of each reader."""

    same_thread: int = 0
    before: int = 0
    readers: set[int] = field(default_factory=set)
    guards: int = 0  # publishes whose hazard names this one


@dataclass
class _State:
    visible: int
    issued: int
    pcs: list[int]
    counters: list[int]

    def copy(self) -> _State:
        return _State(self.visible, self.issued, self.pcs[:], self.counters[:])

    def ended(self, scripts: list[list[Op]]) -> bool:
        return all(pc == len(script) for pc, script in zip(self.pcs, scripts, strict=True))

    def advance(self, scripts: list[list[Op]]) -> None:
        """Takes every step that commutes, until no actor can move."""
        pcs, visible, counters = self.pcs, self.visible, self.counters
        moved = True
        while moved:
            moved = False
            for actor, script in enumerate(scripts):
                pc = start = pcs[actor]
                end = len(script)
                while pc < end:
                    kind, a, b = script[pc]
                    if kind == AFTER:
                        if (pc if a == actor else pcs[a]) < b:
                            break
                    elif kind == VISIBLE:
                        if a & ~visible:
                            break
                    elif kind == COUNTED:
                        if counters[a] < b:
                            break
                    elif kind == PUBLISH:
                        self.issued |= a
                    else:
                        counters[a] += b
                    pc += 1
                if pc != start:
                    pcs[actor] = pc
                    moved = True


def _bits_of(mask: int) -> set[int]:
    return {bit for bit in range(mask.bit_length()) if mask >> bit & 1}
