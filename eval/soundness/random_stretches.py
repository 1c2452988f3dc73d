"""Random small programs for prefill: a stretch of 8 seats through one or two layers on a few SMs, whose buffers are used again at random.

They follow the rules but where a buffer is taken too early: whether it was is what the checkers must find out.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from amk.isa.batch import SEAT_BLOCK
from amk.isa.instruction import Access, Instruction, Kind
from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, Machine, chunk_plan
from amk.isa.seat_norm import SeatNorm
from amk.isa.seat_qkv import SeatQkv
from amk.isa.stretch import BY_COLUMN, BY_HEAD, BY_SEAT, GROUP_ROWS, GROUP_TILES, runs, slot_bytes
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_glu import StretchGlu
from amk.isa.stretch_sums import StretchSums
from amk.schedule.program import Buffer, Constant, DeviceKnobs, KvCache, Matrix, MatVecShape, Program

COPY_PACKETS = 4
REUSED, CAREFUL = 0.6, 0.7  # buffers that lie where an older one does, and of those the ones whose older one is no longer read


@dataclass(frozen=True)
class Value:
    """A buffer and the tag of what was published to it, by a phase of which `counter` gets all `arrivals`."""

    buffer: int
    tag: int
    counter: int = 0
    arrivals: int = 0

    def words(self, name: str) -> dict[str, int]:
        return {f"{name}_buf": self.buffer, f"{name}_tag": self.tag}

    @property
    def gate(self) -> dict[str, int]:
        return {"wait_counter": self.counter, "wait_count": self.arrivals}


@dataclass
class Stretch:
    """A program as it grows, phase by phase. `last_read[b]` is the number of the last phase that reads buffer b."""

    random: Random
    machine: Machine
    tasks: list[Instruction] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    shapes: list[MatVecShape] = field(default_factory=list)
    packets: int = 0
    tags: int = 0
    phases: int = 0
    last_read: dict[int, int] = field(default_factory=dict)

    def value(self, kind: Kind, packets: int, residual: Value | None = None) -> Value:
        """A new value: where an older one of its kind and size lies, or in packets of its own; `residual` is what its writers read too."""
        self.tags += 1
        old = [
            i
            for i, b in enumerate(self.buffers)
            if (b.kind, b.packets) == (kind, packets) and (self.dead(b.offset, residual) or self.random.random() > CAREFUL)
        ]
        offset = self.buffers[self.random.choice(old)].offset if old and self.random.random() < REUSED else self.packets
        if offset == self.packets:
            self.packets += packets + -packets % COPY_PACKETS
        self.buffers.append(Buffer(f"b{len(self.buffers)}", kind, offset, packets))
        return Value(len(self.buffers) - 1, self.tags)

    def dead(self, offset: int, residual: Value | None) -> bool:
        """Whether all that lies at an offset has been read by phases before the last, or is what the next phase itself reads row by row."""
        held = [i for i, b in enumerate(self.buffers) if b.offset == offset]
        own = residual.buffer if residual else -1
        return all(self.last_read.get(i, self.phases) < self.phases - (i != own) for i in held)

    def phase(self, tasks: list[Instruction], *values: Value) -> tuple[Value, ...]:
        """Adds the tasks of a phase, all of which arrive at a counter of their own; the values that they publish."""
        self.tasks += [replace(task, done_counter=self.phases) for task in tasks]
        reads: list[Access] = [access for task in tasks for access in task.reads(self.machine, 0)]
        self.last_read |= {access.buffer: self.phases for access in reads}
        self.phases += 1
        return tuple(replace(value, counter=self.phases - 1, arrivals=len(tasks)) for value in values)

    def parts(self, count: int) -> list[tuple[int, int]]:
        """(first, number) of one to three neighbouring parts of `count`."""
        cuts = sorted(self.random.sample(range(1, count), min(count - 1, self.random.randint(0, 2))))
        return [(a, b - a) for a, b in zip([0, *cuts], [*cuts, count], strict=True)]


def random_stretch(random: Random) -> Program:
    """A program for prefill that follows the rules unless chance took a buffer too early."""
    build = Stretch(random, _machine(random))
    layers = random.choice((1, 1, 2))
    h, x = _norm(build, None, None, 0)
    for layer in range(layers - 1):
        sums, shares = _sums(build, x, BY_SEAT, _qkv_rows(build.machine), build.machine.hidden)
        attended = _attention(build, layer, *_heads(build, layer, sums, shares))
        h, x = _norm(build, h, *_sums(build, attended, BY_HEAD, build.machine.hidden, build.machine.heads * build.machine.head_dim))
        if random.random() < 0.5:
            inner = random.choice((8, 24, 72))
            h, x = _norm(build, h, *_sums(build, _glu(build, x, inner), BY_COLUMN, build.machine.hidden, inner))
    _heads(build, layers - 1, *_sums(build, x, BY_SEAT, _qkv_rows(build.machine), build.machine.hidden), last=True)
    return _placed(build, layers)


def _machine(random: Random) -> Machine:
    warps, stages = random.choice((1, 2)), random.randint(1, 4)
    machine = Machine(
        sms=random.randint(1, 3),
        consumer_warps=warps,
        stages=stages,
        stage_bytes=FRAGMENT_BYTES * warps,
        inflight=random.randint(1, stages),
        reduction_slots=1,
        kv_lag=17,
        dtype=random.choice(("bf16", "fp16")),
        hidden=random.choice((32, 80, 144)),
        vocab=16,
        heads=random.choice((1, 2, 4)),
        kv_heads=1,
        head_dim=16,
        rms_eps=1e-5,
        context=32,
        tags=0,
        batch=SEAT_BLOCK,
        prefill=True,
    )
    return replace(machine, slot=slot_bytes(machine, 1))


def _qkv_rows(machine: Machine) -> int:
    return (machine.heads + 2 * machine.kv_heads) * machine.head_dim


def _narrow(build: Stretch, columns: int) -> Value:
    return build.value("narrow", (columns + -columns % 16) * SEAT_BLOCK // build.machine.narrow)


def _norm(build: Stretch, residual: Value | None, sums: Value | None, shares: int) -> tuple[Value, Value]:
    """h and x of every seat."""
    machine = build.machine
    x = _narrow(build, machine.hidden)
    h = build.value("f32", machine.hidden * SEAT_BLOCK, residual)
    words: dict[str, Any] = {**h.words("h"), **x.words("x"), "shares": shares, "batch": SEAT_BLOCK, "gain": 0}
    if residual and sums:
        words |= {**residual.words("res"), **sums.words("sums"), **sums.gate}
    made = build.phase([SeatNorm(seat=seat, **words) for seat in range(SEAT_BLOCK)], h, x)
    return made[0], made[1]


def _product(build: Stretch, x: Value, order: int, rows: int, cols: int, layout: Any) -> dict[str, Any]:
    """The words that all tasks of a product of a new matrix share."""
    name = f"m{len(build.matrices)}"
    build.matrices.append(Matrix(name, (f"{name}.a", f"{name}.b") if layout == "interleave8" else (name,), layout, rows, cols))
    if MatVecShape(cols, 0) not in build.shapes:
        build.shapes.append(MatVecShape(cols, 0))
    words = {"weight": len(build.matrices) - 1, "shape": build.shapes.index(MatVecShape(cols, 0)), "x_order": order}
    return words | {**x.words("x"), **x.gate, "batch": SEAT_BLOCK, "rows": rows, "cols": cols}


def _groups(rows: int) -> list[dict[str, int]]:
    tiles = -(-rows // TILE_ROWS)
    return [{"tile0": first, "tiles": min(GROUP_TILES, tiles - first)} for first in range(0, tiles, GROUP_TILES)]


def _sums(build: Stretch, x: Value, order: int, rows: int, cols: int) -> tuple[Value, int]:
    """The sums of a product, and in how many shares of K; groups may cut K at different runs."""
    words, groups = _product(build, x, order, rows, cols, "stack"), _groups(rows)
    has = len(runs(chunk_plan(build.machine, cols)))
    parts = build.parts(has)
    out = build.value("f32", len(parts) * len(groups) * GROUP_ROWS * SEAT_BLOCK)
    tasks: list[Instruction] = [
        StretchSums(share=share, run0=first, runs=count, **out.words("out"), **group, **words)
        for group in groups
        for share, (first, count) in enumerate(parts)
    ]
    return build.phase(tasks, out)[0], len(parts)


def _glu(build: Stretch, x: Value, inner: int) -> Value:
    machine = build.machine
    rows = 2 * inner
    words = _product(build, x, BY_SEAT, rows, machine.hidden, "interleave8")
    out = _narrow(build, inner)
    words |= {**out.words("out"), "run0": 0, "runs": len(runs(chunk_plan(machine, machine.hidden)))}
    return build.phase([StretchGlu(**group, **words) for group in _groups(rows)], out)[0]


def _heads(build: Stretch, layer: int, sums: Value, shares: int, *, last: bool = False) -> tuple[Value, ...]:
    """q, and k with v, of every seat; nothing of the last layer."""
    machine = build.machine
    made = () if last else (_narrow(build, machine.heads * machine.head_dim), _narrow(build, 2 * machine.kv_heads * machine.head_dim))
    words: dict[str, Any] = {**sums.words("sums"), **sums.gate, "shares": shares, "layer": layer, "batch": SEAT_BLOCK}
    for name, value in zip(("q", "kv"), made, strict=False):
        words |= value.words(name)
    return build.phase([SeatQkv(seat=seat, **words) for seat in range(SEAT_BLOCK)], *made)


def _attention(build: Stretch, layer: int, q: Value, kv: Value) -> Value:
    out = _narrow(build, build.machine.heads * build.machine.head_dim)
    words: dict[str, Any] = {**q.words("q"), **kv.words("kv"), **out.words("out"), **kv.gate, "layer": layer, "batch": SEAT_BLOCK}
    tasks: list[Instruction] = [StretchAttention(kv_head=head, seat0=0, **words) for head in range(build.machine.kv_heads)]
    return build.phase(tasks, out)[0]


def _placed(build: Stretch, layers: int) -> Program:
    machine = replace(build.machine, tags=build.tags)
    queues: list[list[Instruction]] = [[] for _ in range(machine.sms)]
    for task in build.tasks:
        build.random.choice(queues).append(task)
    return Program(
        machine=machine,
        device=DeviceKnobs(cache_hint="none", sync="counter", poll_sleep_ns=0, release_early=0, weight_feed="bulk"),
        buffers=tuple(build.buffers),
        arena_packets=build.packets,
        matrices=tuple(build.matrices),
        shapes=tuple(build.shapes),
        constants=(Constant("gain", ("g",), "stack", 0, machine.hidden),),
        kv=KvCache(layers, machine.kv_heads, machine.context),
        counters=tuple(f"phase {i}" for i in range(build.phases)),
        queues=tuple(map(tuple, queues)),
        streams=tuple(tuple(i for i, task in enumerate(queue) if task.streamed) for queue in queues),
        scratch_bytes=max(task.shared_bytes(machine) for task in build.tasks),
    )
