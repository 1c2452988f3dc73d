"""The program: the object that is proven and that runs. Everything an SM does in one token, and the memory it does it in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from amk.isa.attention import Attention
from amk.isa.instruction import Instruction, Kind
from amk.isa.machine import Machine
from amk.isa.matvec import X_NARROW, X_NORM
from amk.isa.weight_format import WeightFormat, format_of

TaskId: TypeAlias = tuple[int, int]  # (SM, index in its queue)


@dataclass(frozen=True)
class Buffer:
    """`packets` 8-byte packets of the arena from packet `offset`; buffers whose values never live together may overlap."""

    name: str
    kind: Kind
    offset: int
    packets: int
    space: Literal["arena", "weights"] = "arena"


@dataclass(frozen=True)
class Matrix:
    """A read-only weight matrix as the stream packs it: `rows` by `cols`, in tiles of 16 rows.

    `sources` are weight names. "stack" concatenates their rows; "interleave8" (two sources) alternates 8 rows of the first with 8 rows
    of the second, each padded with zero rows to a multiple of 8. `weights` is the format in which it is streamed, None for elements of
    the machine's dtype.
    """

    name: str
    sources: tuple[str, ...]
    layout: Literal["stack", "interleave8"]
    rows: int
    cols: int
    weights: WeightFormat | None = None


@dataclass(frozen=True)
class Constant:
    """A vector of fp32 elements at element `start` of the constants: the named weights laid out as in Matrix."""

    name: str
    sources: tuple[str, ...]
    layout: Literal["stack", "interleave8"]
    start: int
    count: int


@dataclass(frozen=True)
class KvCache:
    """KV rows of every layer and KV head: `rows` (a multiple of 16) each. Of a batch, `layers` counts those of every sequence."""

    layers: int
    heads: int
    rows: int


@dataclass(frozen=True)
class MatVecShape:
    """A compiled variant of the matrix-vector product: columns, how x comes (isa.matvec.X_NARROW, X_NORM) and the weight format."""

    cols: int
    flags: int

    @property
    def label(self) -> str:
        weights = format_of(self.flags)
        x = f"{'n' if self.flags & X_NARROW else ''}{'r' if self.flags & X_NORM else ''}"
        return f"{self.cols}{x}{f' {weights.name}' if weights else ''}"


@dataclass(frozen=True)
class DeviceKnobs:
    """Kernel knobs that only the device code reads; each is a macro of the binary."""

    cache_hint: str
    sync: str
    poll_sleep_ns: int
    release_early: int
    weight_feed: str


@dataclass(frozen=True)
class Program:
    """One token of the model on every SM; it is looped over the tokens of a launch.

    `queues[sm]` is the order in which consumers, storer and watcher take their tasks; `streams[sm]` the order in which the feeder
    streams for them, as indices into the queue. Counter ids are indices into `counters` (their names).
    """

    machine: Machine
    device: DeviceKnobs
    buffers: tuple[Buffer, ...]
    arena_packets: int
    matrices: tuple[Matrix, ...]
    shapes: tuple[MatVecShape, ...]
    constants: tuple[Constant, ...]
    kv: KvCache
    counters: tuple[str, ...]
    queues: tuple[tuple[Instruction, ...], ...]
    streams: tuple[tuple[int, ...], ...]
    scratch_bytes: int

    @property
    def constant_elements(self) -> int:
        return max((c.start + c.count for c in self.constants), default=0)

    @property
    def by_rows(self) -> bool:
        """Whether consumer warps share out the tiles of a product whole."""
        return any(task.by_rows for queue in self.queues for task in queue)

    @property
    def floating(self) -> bool:
        """Whether its quantised weights are floating-point numbers: the device code multiplies these or integers, not both."""
        return any(weights.floating for shape in self.shapes if (weights := format_of(shape.flags)))

    @property
    def draws(self) -> bool:
        """Its launches take isa.sampling.Sampling: temperature, filters, seed and stop tokens."""
        return any(task.draws for queue in self.queues for task in queue)

    @property
    def task_count(self) -> int:
        return sum(map(len, self.queues))

    @property
    def layers(self) -> int:
        """Layers of the model: each sequence has a plane of the KV cache for each of them."""
        return self.kv.layers // self.machine.sequences

    def seat_of(self, task: Instruction) -> int:
        """The seat whose position an attention task is at; 0 for tasks that work for all seats."""
        return task.layer // max(1, self.layers) if isinstance(task, Attention) else 0

    def task(self, task_id: TaskId) -> Instruction:
        return self.queues[task_id[0]][task_id[1]]
