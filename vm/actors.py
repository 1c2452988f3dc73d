"""The machine actor by actor, as docs/machine.md has it: who waits for what, and what each step does, with real numbers.

Publishes leave an SM in any order and any time before its end of token; KV rows reach other actors' copies only at the end of token
of the SM that wrote them. So each order that a Scheduler picks is one that the device may take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from amk.isa.abi import NONE
from amk.isa.attention import Attention
from amk.isa.instruction import F32, Access, Instruction
from amk.isa.machine import KV_BLOCK_ROWS
from amk.isa.matvec import MatVec
from amk.schedule.program import Program
from amk.vm.arena import WORD, Arena
from amk.vm.interface import LaunchFailed
from amk.vm.kv import KvRows
from amk.vm.memory import LaunchInputs, StepMemory, Weights
from amk.vm.scheduler import Actor, Scheduler, Steps, Wait

Values = npt.NDArray[Any]
Sums = tuple[F32, Any]  # row sums of a tile and sums of squares, of one vector or of each seat's


class Counters:
    """Arrivals at each counter since the arena was zeroed, modulo 2^32."""

    def __init__(self, program: Program, epoch: int) -> None:
        """As they stand before the token of `epoch` begins."""
        a_token = [0] * len(program.counters)
        for queue in program.queues:
            for task in queue:
                if task.done_counter != NONE:
                    a_token[task.done_counter] += task.arrivals(program.machine)
        self._arrived = [arrivals * (epoch - 1) % WORD for arrivals in a_token]

    def arrive(self, counter: int) -> None:
        if counter != NONE:
            self._arrived[counter] = (self._arrived[counter] + 1) % WORD

    def reached(self, counter: int, threshold: int) -> bool:
        return (self._arrived[counter] - threshold) % WORD < WORD // 2


@dataclass(frozen=True)
class Chunk:
    """What one copy brings: the chunk's place in the token, and the KV rows (by block) as they were when the copy began."""

    step: int
    index: int
    number: int
    rows: dict[int, tuple[F32, F32]] = field(default_factory=dict, compare=False)

    def __str__(self) -> str:
        return f"chunk {self.number} of task {self.index} of token {self.step}"


@dataclass(frozen=True)
class Publish:
    """Packets on their way to the arena."""

    step: int
    access: Access
    values: Values
    packets: slice


@dataclass(frozen=True)
class Arrival:
    """An arrival that leaves when all that was published before has arrived."""

    step: int
    counter: int


def unordered(missing: str) -> LaunchFailed:
    """What becomes of a gated read that does not find its value: the device would take whatever is there."""
    return LaunchFailed("crash", f"nothing orders a task behind what it reads: it needs {missing}")


@dataclass
class Launch:
    """What the SMs of a launch share."""

    program: Program
    weights: Weights
    kv: KvRows
    arena: Arena
    inputs: LaunchInputs
    epoch: int
    scheduler: Scheduler

    def __post_init__(self) -> None:
        self.counters = Counters(self.program, self.epoch)
        self.ended = [0] * len(self.program.queues)  # tokens whose end each SM has released
        self.kv_writers = [sm for sm, queue in enumerate(self.program.queues) if any(_appends(task) for task in queue)]

    def run(self) -> None:
        """LaunchFailed where an order of steps ends in a deadlock, or an actor finds what a proven program rules out."""
        sms = [Sm(self, number) for number in range(len(self.program.queues))]
        try:
            self.scheduler.run([actor for sm in sms for actor in sm.actors()])
        except LaunchFailed:
            ended = self.inputs.results.ended
            if ended is None or any(min(sm.finished) < ended for sm in sms):
                raise  # waits are left only by actors that have finished the last token

    def rows_visible(self, step: int) -> bool:
        """Whether copies of token `step` may read KV rows: the token `kv_lag` before it has ended wherever rows are written."""
        return all(self.ended[sm] > step - self.program.machine.kv_lag for sm in self.kv_writers)


def _appends(task: Instruction) -> bool:
    return isinstance(task, Attention) and task.split == 0


class TaskMemory(StepMemory):
    """What one task sees: the inputs its actors have read, the KV rows in its chunks, and its SM's own rows, seen by others or not."""

    def __init__(self, sm: Sm, step: int, inputs: dict[Access, Values], chunks: list[Chunk], sums: Sums | None = None) -> None:
        launch = sm.launch
        super().__init__(launch.program, launch.weights, launch.kv, launch.inputs, step)
        self._sm = sm
        self._inputs = inputs
        self._streamed = {block: rows for chunk in chunks for block, rows in chunk.rows.items()}
        self._sums = sums

    def read(self, access: Access) -> Values:
        return self._inputs[replace(access, tile=0)]

    def reduced_sums(self) -> Sums | None:
        return self._sums

    def kv_rows(self, layer: int, head: int, start: int, stop: int) -> tuple[F32, F32]:
        k, v = (rows.copy() for rows in super().kv_rows(layer, head, start, stop))
        for block, (block_k, block_v) in self._streamed.items():
            at = block * KV_BLOCK_ROWS
            a, b = max(start, at), min(stop, at + KV_BLOCK_ROWS)
            if a < b:
                k[a - start : b - start], v[a - start : b - start] = block_k[a - at : b - at], block_v[a - at : b - at]
        for _, place, row, row_k, row_v in self._sm.own_rows:
            if place == (layer, head) and start <= row < stop:
                k[row - start], v[row - start] = row_k, row_v
        return k, v

    def write_kv(self, layer: int, head: int, row: int, k: F32, v: F32) -> None:
        self._sm.own_rows.append((self._step, (layer, head), row, k, v))


class Sm:
    """One SM: its ring, reduction slots and handshakes, and the steps of its actors."""

    def __init__(self, launch: Launch, number: int) -> None:
        self.launch = launch
        self.number = number
        self.machine = launch.program.machine
        self.queue = launch.program.queues[number]
        self.stream = launch.program.streams[number]
        warps, slots = self.machine.consumer_warps, self.machine.reduction_slots
        self.released = 0  # tasks released by the watcher since the launch began
        self.ring: list[Chunk | None] = [None] * self.machine.stages  # what has landed in each slot
        self.started = 0  # chunks whose copies have begun
        self.under_way: list[tuple[int, Chunk]] = []
        self.taken = [0] * warps  # chunks that each consumer has released
        self.partials: list[list[Sums | None]] = [[None] * warps for _ in range(slots)]
        self.filled = [0] * warps  # reduction slots that each consumer has filled
        self.reduced = 0  # reduction slots that the storer has freed
        self.met = [0] * warps  # barriers that each consumer has reached
        self.inputs: dict[tuple[int, int], dict[Access, Values]] = {}  # of joint tasks under way, by token and task
        self.outbox: list[Publish | Arrival] = []
        self.own_rows: list[tuple[int, tuple[int, int], int, F32, F32]] = []  # KV rows that other SMs and copies need not see yet
        self.finished = [0] * (warps + 1)  # tokens that each consumer and the storer have finished

    def actors(self) -> Iterator[Actor]:
        yield Actor(self.number, "watcher", 0, self._watch())
        yield Actor(self.number, "feeder", 0, self._feed())
        yield Actor(self.number, "copies", 0, self._land(), service=True)
        for warp in range(self.machine.consumer_warps):
            yield Actor(self.number, "consumer", warp, self._consume(warp))
        yield Actor(self.number, "storer", 0, self._store())
        yield Actor(self.number, "publishes", 0, self._deliver(), service=True)
        yield Actor(self.number, "end", 0, self._end())

    def _tokens(self) -> range:
        return range(self.launch.inputs.steps)

    def _position(self, step: int, task: Instruction) -> int:
        return self.launch.inputs.position(self.launch.program, task, step)

    # ---- watcher

    def _watch(self) -> Steps:
        for step in self._tokens():
            for task in self.queue:
                yield from self._counted(step, task)
                self.released += 1

    def _counted(self, step: int, task: Instruction) -> Steps:
        """Waits for the arrivals that a task of token `step` asks for."""
        if task.wait_counter != NONE and not (task.carried and step == 0):
            threshold = task.wait_count * (self.launch.epoch + step - task.carried)
            yield Wait(self.launch.counters.reached, (task.wait_counter, threshold), "counter {0} to reach {1}".format, remote=True)

    def _is_released(self, sequence: int) -> bool:
        return self.released >= sequence

    # ---- feeder and its copies

    def _feed(self) -> Steps:
        for step in self._tokens():
            rows_waited = False
            for index in self.stream:
                task = self.queue[index]
                if task.gated:
                    yield from self._counted(step, task)
                elif not task.stored and not rows_waited:
                    yield Wait(self.launch.rows_visible, (step,), "the KV rows that token {0} may stream".format, remote=True)
                    rows_waited = True
                for number in range(len(task.chunk_bytes(self.machine, self._position(step, task)))):
                    yield Wait(self._may_copy, (), "a free ring slot and fewer copies under way".format)
                    if task.gated:  # x comes with the weights
                        self._require_reads(step, task)
                    self.under_way.append((self.started, Chunk(step, index, number, self._rows_of(task, step, number))))
                    self.started += 1

    def _may_copy(self) -> bool:
        m, held = self.machine, self.started - min(self.taken)
        return held < m.stages and len(self.under_way) < (m.throttled if m.watermark and held >= m.watermark else m.inflight)

    def _rows_of(self, task: Instruction, step: int, number: int) -> dict[int, tuple[F32, F32]]:
        """The KV rows of a task's chunk, by block, as they are now."""
        if not isinstance(task, Attention):
            return {}
        kv, layer, head, size = self.launch.kv, task.layer, task.kv_head, self.machine.kv_blocks_per_chunk
        ranges = task.streamed_blocks(self._position(step, task))
        start, stop = [(at, min(at + size, stop)) for start, stop in ranges for at in range(start, stop, size)][number]
        blocks = {block: kv.rows(layer, head, block * KV_BLOCK_ROWS, (block + 1) * KV_BLOCK_ROWS) for block in range(start, stop)}
        return {block: (k.copy(), v.copy()) for block, (k, v) in blocks.items()}

    def _land(self) -> Steps:
        while True:
            yield Wait(self._any_under_way, (), "a copy".format)
            number, chunk = self.under_way.pop(self.launch.scheduler.choose(len(self.under_way)))
            self.ring[number % self.machine.stages] = chunk

    def _any_under_way(self) -> bool:
        return bool(self.under_way)

    def _landed(self, number: int) -> bool:
        return number < self.started and all(number != under_way for under_way, _ in self.under_way)

    def _take(self, warp: int, index: int, step: int, number: int) -> Chunk:
        """Reads the next ring slot and releases it; LaunchFailed if it holds another chunk than the task expects."""
        chunk, expected = self.ring[self.taken[warp] % self.machine.stages], Chunk(step, index, number)
        if chunk != expected:
            raise LaunchFailed("crash", f"SM {self.number} consumer {warp} must find {expected} in the ring, but it holds {chunk}")
        self.taken[warp] += 1
        assert chunk is not None
        return chunk

    # ---- reads

    def _expect(self, access: Access, step: int) -> Steps:
        """Waits until a read of token `step` finds its tags. A gated one must find them."""
        arena, epoch = self.launch.arena, self.launch.epoch + step
        if access.gated:
            self._require(access, step)
        elif not (access.carried and step == 0):
            yield Wait(arena.holds, (access, epoch), arena.describe, remote=True)

    def _require(self, access: Access, step: int) -> None:
        arena, epoch = self.launch.arena, self.launch.epoch + step
        if not arena.holds(access, epoch):
            raise unordered(arena.describe(access, epoch))

    def _require_reads(self, step: int, task: Instruction) -> None:
        for access in task.reads(self.machine, self._position(step, task)):
            self._require(access, step)

    # ---- consumers

    def _consume(self, warp: int) -> Steps:
        for step in self._tokens():
            for index, task in enumerate(self.queue):
                if isinstance(task, MatVec):
                    yield from self._multiply(warp, step, index, task)
                elif task.gated or task.writes(self.machine, self._position(step, task)):
                    yield from self._join(warp, step, index, task)
                if not (task.stored or task.gated):
                    self.launch.counters.arrive(task.done_counter)
            self.finished[warp] += 1

    def _begin(self, step: int, index: int) -> Wait:
        return Wait(self._is_released, (step * len(self.queue) + index + 1,), "the watcher to release task number {0} of the launch".format)

    def _multiply(self, warp: int, step: int, index: int, task: MatVec) -> Steps:
        """One warp's K slice of every tile of a product."""
        yield self._begin(step, index)
        plan = task.plan(self.machine)
        own = plan.columns_of(warp)
        reads = task.slice_reads(self.machine, own)
        for access in reads:
            yield from self._expect(access, step)
        memory = TaskMemory(self, step, {}, [])
        y, squares = task.slice_sums(memory, task.slice_of([self.launch.arena.load(access) for access in reads], own), own)
        again = reads if task.rereads(self.machine) else []
        for tile, rows in enumerate(task.tile_slices()):
            for access in again if tile else ():
                yield from self._expect(access, step)
            for chunk in range(plan.chunks):
                yield Wait(self._landed, (self.taken[warp],), "chunk {0} of the launch to land".format)
                self._take(warp, index, step, tile * plan.chunks + chunk)
            yield Wait(self._slot_free, (self.filled[warp],), "a reduction slot for tile {0} of the launch".format)
            self.partials[self.filled[warp] % self.machine.reduction_slots][warp] = (y[rows], squares)
            self.filled[warp] += 1

    def _slot_free(self, tile: int) -> bool:
        return tile - self.reduced < self.machine.reduction_slots

    def _join(self, warp: int, step: int, index: int, task: Instruction) -> Steps:
        """A task that the consumers do together: all read, meet, and publish; a gated one arrives behind what it has published."""
        yield self._begin(step, index)
        key, position, chunks = (step, index), self._position(step, task), []
        inputs = self.inputs.setdefault(key, {})
        for access in task.reads(self.machine, position):
            yield from self._expect(access, step)
            inputs[access] = self.launch.arena.load(access)
        for number in range(len(task.chunk_bytes(self.machine, position))):
            yield Wait(self._landed, (self.taken[warp],), "chunk {0} of the launch to land".format)
            chunks.append(self._take(warp, index, step, number))
        self.met[warp] += 1
        yield Wait(self._all_met, (self.met[warp],), "the other consumers at barrier {0} of the launch".format)
        if key in self.inputs:  # the first to leave the barrier publishes for all
            memory = TaskMemory(self, step, self.inputs.pop(key), chunks)
            for access, values in task.run(memory, position):
                self._publish(step, access, values)
            if task.gated:
                self.outbox.append(Arrival(step, task.done_counter))

    def _all_met(self, barrier: int) -> bool:
        return min(self.met) >= barrier

    # ---- storer

    def _store(self) -> Steps:
        for step in self._tokens():
            for task in self.queue:
                if isinstance(task, MatVec):
                    yield from self._store_tiles(step, task)
                    self.launch.counters.arrive(task.done_counter)
            self.finished[-1] += 1

    def _store_tiles(self, step: int, task: MatVec) -> Steps:
        position, arena = self._position(step, task), self.launch.arena
        reads, writes = task.reads(self.machine, position), task.writes(self.machine, position)
        inputs: dict[Access, Values] = {}
        sums: list[F32] = []  # of the tiles since the last publish
        for tile in range(task.tiles):
            for access in (access for access in reads if access.actor == "storer" and access.tile == tile):
                yield from self._expect(access, step)
                inputs[replace(access, tile=0)] = arena.load(access)
            yield Wait(self._slot_full, (self.reduced,), "all partial sums of tile {0} of the launch".format)
            tile_sums, squares = self._reduce()
            sums.append(tile_sums)
            published = [access for access in writes if access.tile == tile and access.start < access.stop]
            if published:
                part = replace(task, tile0=task.tile0 + tile + 1 - len(sums), tiles=len(sums))
                memory = TaskMemory(self, step, inputs, [], (np.concatenate(sums), squares))
                for access, (_, values) in zip(published, part.run(memory, position)[-len(published) :], strict=True):
                    self._publish(step, access, values)
                sums = []

    def _slot_full(self, tile: int) -> bool:
        return min(self.filled) > tile

    def _reduce(self) -> Sums:
        """Adds the oldest tile's partial sums in warp order and frees its slot."""
        slot = self.partials[self.reduced % self.machine.reduction_slots]
        self.partials[self.reduced % self.machine.reduction_slots] = [None] * len(slot)
        self.reduced += 1
        first, *rest = (partial for partial in slot if partial is not None)
        rows, squares = first
        for other, other_squares in rest:
            rows, squares = rows + other, squares + other_squares
        return rows, squares

    # ---- publishes

    def _publish(self, step: int, access: Access, values: Values) -> None:
        ended = self.launch.inputs.results.ended
        if ended is not None and step >= ended:
            raise LaunchFailed("crash", f"no task may publish in token {step}, but SM {self.number} does: the launch ended after {ended}")
        self.outbox.append(Publish(step, access, values, self.launch.arena.packets(access)))

    def _deliver(self) -> Steps:
        while True:
            yield Wait(self._any_outgoing, (), "a publish".format)
            free = [i for i, sent in enumerate(self.outbox) if _may_leave(sent, self.outbox[:i])]
            sent = self.outbox.pop(free[self.launch.scheduler.choose(len(free))])
            if isinstance(sent, Arrival):
                self.launch.counters.arrive(sent.counter)
            else:
                self.launch.arena.store(sent.access, sent.values, self.launch.epoch + sent.step)

    def _any_outgoing(self) -> bool:
        return bool(self.outbox)

    # ---- end of token

    def _end(self) -> Steps:
        for step in self._tokens():
            yield Wait(self._token_done, (step,), "all actors and publishes of token {0}".format)
            for _, (layer, head), row, k, v in (own for own in self.own_rows if own[0] <= step):
                self.launch.kv.write(layer, head, row, k, v)
            self.own_rows = [own for own in self.own_rows if own[0] > step]
            self.launch.ended[self.number] += 1

    def _token_done(self, step: int) -> bool:
        return min(self.finished) > step and all(sent.step > step for sent in self.outbox)


def _may_leave(sent: Publish | Arrival, earlier: list[Publish | Arrival]) -> bool:
    """Whether nothing sent before must leave first: of an arrival all of it, of a publish what has a packet of its own."""
    if isinstance(sent, Arrival):
        return not earlier
    return not any(isinstance(other, Publish) and _overlap(sent.packets, other.packets) for other in earlier)


def _overlap(a: slice, b: slice) -> bool:
    """Whether two runs of packets share one: stores to one address keep their order."""
    return bool(a.start < b.stop and b.start < a.stop)
