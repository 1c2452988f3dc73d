"""Programs built by hand, so that the validator is tested without the compiler: a decoder of any size, and small pieces of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any

from amk.isa.abi import NONE
from amk.isa.attention import PARTIAL_HEAD, Attention
from amk.isa.embed import Embed
from amk.isa.gemv import Gemv
from amk.isa.gemv_glu import GemvGlu
from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Instruction, Kind
from amk.isa.machine import TILE_ROWS, Machine
from amk.isa.matvec import X_NARROW, X_NORM
from amk.isa.sample import Sample
from amk.schedule.program import Buffer, Constant, DeviceKnobs, KvCache, Matrix, MatVecShape, Program, TaskId

MACHINE = Machine(
    sms=2,
    consumer_warps=2,
    stages=3,
    stage_bytes=4096,
    inflight=2,
    reduction_slots=2,
    kv_lag=17,
    dtype="bf16",
    hidden=32,
    vocab=40,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rms_eps=1e-5,
    context=96,
    tags=1,
)


@dataclass(frozen=True)
class Value:
    """One version of a buffer's packets: where, and with which tag."""

    buffer: int
    tag: int


@dataclass
class Builder:
    """Collects tables and tasks; `program` puts them together. Tasks go to SMs in turn unless told."""

    machine: Machine = MACHINE
    scratch_bytes: int = 8192
    buffers: list[Buffer] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    shapes: list[MatVecShape] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)
    counters: list[str] = field(default_factory=list)
    queues: list[list[Instruction]] = field(default_factory=list)
    tags: int = 0

    def __post_init__(self) -> None:
        self.queues = [[] for _ in range(self.machine.sms)]

    def buffer(self, name: str, kind: Kind, packets: int, **changes: Any) -> int:
        """A buffer behind all others, unless `changes` says otherwise."""
        end = max((b.offset + b.packets for b in self.buffers), default=0)
        self.buffers.append(replace(Buffer(name, kind, end + -end % 16, packets), **changes))
        return len(self.buffers) - 1

    def version(self, buffer: int) -> Value:
        """A new value of a buffer."""
        self.tags += 1
        return Value(buffer, self.tags)

    def value(self, name: str, kind: Kind, packets: int, **changes: Any) -> Value:
        return self.version(self.buffer(name, kind, packets, **changes))

    def matrix(self, name: str, rows: int, cols: int, layout: Any = "stack") -> int:
        self.matrices.append(Matrix(name, (name,), layout, rows, cols))
        return len(self.matrices) - 1

    def constant(self, name: str, elements: int) -> int:
        start = max((c.start + c.count for c in self.constants), default=0)
        self.constants.append(Constant(name, (name,), "stack", start, elements))
        return start

    def shape(self, cols: int, flags: int) -> int:
        shape = MatVecShape(cols, flags)
        if shape not in self.shapes:
            self.shapes.append(shape)
        return self.shapes.index(shape)

    def counter(self, name: str) -> int:
        self.counters.append(name)
        return len(self.counters) - 1

    def add(self, sm: int, task: Instruction) -> TaskId:
        self.queues[sm].append(task)
        return sm, len(self.queues[sm]) - 1

    def product(
        self, cls: type[Any], weight: int, x: Value, out: Value, tiles: int, sm: Callable[[int], int], *, flags: int = 0, **words: Any
    ) -> list[TaskId]:
        """All tiles of a matrix in tasks of `tiles` tiles; task i goes to `sm(i)`."""
        matrix = self.matrices[weight]
        total = -(-matrix.rows // TILE_ROWS)
        shape = self.shape(matrix.cols, flags)
        common = {
            "shape": shape,
            "flags": flags,
            "weight": weight,
            "x_buf": x.buffer,
            "x_tag": x.tag,
            "out_buf": out.buffer,
            "out_tag": out.tag,
        }
        common |= {"cols": matrix.cols, "rows": matrix.rows} | words
        placed = []
        for i, first in enumerate(range(0, total, tiles)):
            start = {"out_start": 2 * i} if cls is GemvHead else {}
            placed.append(self.add(sm(i), cls(tile0=first, tiles=min(tiles, total - first), **common, **start)))
        return placed

    def program(self, **changes: Any) -> Program:
        made = Program(
            machine=replace(self.machine, tags=max(1, self.tags)),
            device=DeviceKnobs("none", "counter", 0, 1, "bulk"),
            buffers=tuple(self.buffers),
            arena_packets=max((b.offset + b.packets for b in self.buffers), default=0),
            matrices=tuple(self.matrices),
            shapes=tuple(self.shapes),
            constants=tuple(self.constants),
            kv=KvCache(0, self.machine.kv_heads, 0),
            counters=tuple(self.counters),
            queues=tuple(map(tuple, self.queues)),
            streams=tuple(tuple(i for i, task in enumerate(queue) if task.streamed) for queue in self.queues),
            scratch_bytes=self.scratch_bytes,
        )
        return replace(made, **changes)


@dataclass(frozen=True)
class Sizes:
    """A decoder: `tiles` a product task, `splits` an attention group of KV heads, `unit_rows` as in Attention."""

    machine: Machine = MACHINE
    layers: int = 2
    intermediate: int = 64
    tiles: int = 1
    splits: int = 2
    unit_rows: int = 16
    window: int = 0
    counters: bool = True


def decoder(sizes: Sizes) -> Program:
    """embed, layers of (qkv, attention, o + x, gate/up, down + x), head, sample; x alternates between two buffers."""
    return _Decoder(sizes).program


class _Decoder:
    def __init__(self, sizes: Sizes) -> None:
        self.sizes, self.machine = sizes, sizes.machine
        m = self.machine
        self.b = Builder(m, scratch_bytes=1 << 15)
        self.turn = count()
        self.token = self.b.value("token", "u32", 1)
        self.x = [self.b.buffer("x0", "f32", m.hidden), self.b.buffer("x1", "f32", m.hidden)]
        self.qkv = self.b.buffer("qkv", "f32", (m.heads + 2 * m.kv_heads) * m.head_dim)
        group = m.heads // m.kv_heads
        self.part = self.b.buffer("partials", "f32", max(1, m.heads * (sizes.splits - 1) * (m.head_dim + PARTIAL_HEAD)))
        self.group = group
        self.attended = self.b.buffer("attended", "narrow", m.heads * m.head_dim // m.narrow)
        self.active = self.b.buffer("active", "narrow", sizes.intermediate // m.narrow)
        self.gain = self.b.constant("gain", m.hidden)
        self.waited = (NONE, 0)
        x = self._embed()
        for layer in range(sizes.layers):
            x = self._layer(layer, x)
        self._head(x)
        self.program = self.b.program(kv=KvCache(sizes.layers, m.kv_heads, m.context + -m.context % 16))

    def _sm(self, _: int) -> int:
        return next(self.turn) % self.machine.sms

    def _wait(self) -> dict[str, int]:
        return {"wait_counter": self.waited[0], "wait_count": self.waited[1]} if self.sizes.counters else {}

    def _done(self, name: str, placed: Callable[[dict[str, int]], list[TaskId]]) -> None:
        """Places the tasks of an op: they wait for the op before it and arrive at a counter of their own, for the next op."""
        if not self.sizes.counters:
            placed({})
            return
        counter = self.b.counter(name)
        ids = placed(self._wait() | {"done_counter": counter})
        each = self.b.queues[ids[0][0]][ids[0][1]].arrivals(self.machine)
        self.waited = (counter, each * len(ids))

    def _embed(self) -> Value:
        x = self.b.version(self.x[0])
        half = self.machine.hidden // 2

        def place(words: dict[str, int]) -> list[TaskId]:
            token = {"token_buf": self.token.buffer, "token_tag": self.token.tag, "out_buf": x.buffer, "out_tag": x.tag, "cols": half}
            return [self.b.add(self._sm(0), Embed(col0=c, **token, **words)) for c in (0, half)]

        self._done("embed", place)
        return x

    def _layer(self, layer: int, x: Value) -> Value:
        m, b, t = self.machine, self.b, self.sizes.tiles
        name = f"L{layer}."
        qkv, attended, active = b.version(self.qkv), b.version(self.attended), b.version(self.active)
        w = b.matrix(name + "qkv", (m.heads + 2 * m.kv_heads) * m.head_dim, m.hidden)
        self._done(name + "qkv", lambda k: b.product(Gemv, w, x, qkv, t, self._sm, flags=X_NORM, gain=self.gain, **k))
        self._done(name + "attention", lambda k: self._attention(layer, qkv, attended, k))
        middle = self._residual(name + "o", m.heads * m.head_dim, attended, x)
        gate_up = b.matrix(name + "gate_up", 2 * self.sizes.intermediate, m.hidden, "interleave8")
        self._done(name + "gate_up", lambda k: b.product(GemvGlu, gate_up, middle, active, t, self._sm, flags=X_NORM, gain=self.gain, **k))
        return self._residual(name + "down", self.sizes.intermediate, active, middle)

    def _residual(self, name: str, cols: int, x: Value, old: Value) -> Value:
        new = self.b.version(self.x[1 - self.x.index(old.buffer)])
        w = self.b.matrix(name, self.machine.hidden, cols)
        residual = {"res_buf": old.buffer, "res_tag": old.tag}
        place = lambda k: self.b.product(Gemv, w, x, new, self.sizes.tiles, self._sm, flags=X_NARROW, **residual, **k)  # noqa: E731
        self._done(name, place)
        return new

    def _attention(self, layer: int, qkv: Value, out: Value, words: dict[str, int]) -> list[TaskId]:
        m, b, part = self.machine, self.b, self.b.version(self.part)
        k0 = m.heads * m.head_dim
        common = {"q_buf": qkv.buffer, "q_tag": qkv.tag, "k_buf": qkv.buffer, "k_tag": qkv.tag, "v_buf": qkv.buffer, "v_tag": qkv.tag}
        common |= {
            "part_buf": part.buffer,
            "part_tag": part.tag,
            "out_buf": out.buffer,
            "out_tag": out.tag,
            "layer": layer,
            "nq": self.group,
        }
        common |= {"splits": self.sizes.splits, "unit_rows": self.sizes.unit_rows, "window": self.sizes.window}
        placed = []
        for head in range(m.kv_heads):
            rows = {
                "kv_head": head,
                "q0": head * self.group,
                "k_start": k0 + head * m.head_dim,
                "v_start": k0 + (m.kv_heads + head) * m.head_dim,
            }
            placed += [b.add(self._sm(0), Attention(split=split, **rows, **common, **words)) for split in range(self.sizes.splits)]
        return placed

    def _head(self, x: Value) -> None:
        m, b, t = self.machine, self.b, self.sizes.tiles
        w = b.matrix("head", m.vocab, m.hidden)
        tasks = -(-m.vocab // (TILE_ROWS * t))  # one candidate pair each
        best = b.value("candidates", "u32", 2 * tasks)
        self._done("head", lambda k: b.product(GemvHead, w, x, best, t, self._sm, flags=X_NORM, gain=self.gain, **k))
        words = {"in_buf": best.buffer, "in_tag": best.tag, "out_buf": self.token.buffer, "out_tag": self.token.tag, "count": tasks}
        b.add(self._sm(0), Sample(**words, **self._wait()))


def changed(program: Program, at: TaskId, **words: Any) -> Program:
    """The program with other words in one task."""
    return changed_all(program, {at: words})


def changed_all(program: Program, changes: dict[TaskId, dict[str, Any]]) -> Program:
    queues = [list(queue) for queue in program.queues]
    for (sm, index), words in changes.items():
        queues[sm][index] = replace(queues[sm][index], **words)
    return replace(program, queues=tuple(map(tuple, queues)))


def reshaped(program: Program, changes: Mapping[TaskId, MatVecShape]) -> Program:
    """The program with products of other columns and flags, and device code for them."""
    shapes = [*program.shapes, *(shape for shape in dict.fromkeys(changes.values()) if shape not in program.shapes)]
    words = {at: {"cols": shape.cols, "flags": shape.flags, "shape": shapes.index(shape)} for at, shape in changes.items()}
    return replace(changed_all(program, words), shapes=tuple(shapes))


def find(program: Program, cls: type[Instruction], **words: int) -> list[TaskId]:
    """Ids of the tasks of a class with these words, in SM order."""
    return [
        (sm, index)
        for sm, queue in enumerate(program.queues)
        for index, task in enumerate(queue)
        if isinstance(task, cls) and all(getattr(task, name) == value for name, value in words.items())
    ]


def moved(program: Program, at: TaskId, place: int) -> Program:
    """The program with one task at another place of its queue; the stream follows the queue."""
    queues = [list(queue) for queue in program.queues]
    queues[at[0]].insert(place, queues[at[0]].pop(at[1]))
    streams = tuple(tuple(i for i, task in enumerate(queue) if task.streamed) for queue in queues)
    return replace(program, queues=tuple(map(tuple, queues)), streams=streams)
