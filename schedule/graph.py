"""One token of the model as ops and values: what the passes after fusion work on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from amk.isa.batch import SEAT_BLOCK
from amk.isa.instruction import Instruction, Kind
from amk.isa.registry import instructions
from amk.isa.stretch import GROUP_ROWS
from amk.schedule.program import Constant, Matrix


@dataclass(frozen=True)
class Value:
    """A vector that one op publishes, `packets` long. `padded`: it has packets that nobody reads.

    One that lies by seat (isa/batch.py) is as many vectors, each a buffer of its own for the tasks of its seat; `seats` is 1 for others.
    """

    name: str
    kind: Kind
    packets: int
    padded: bool = False
    seats: int = 1


@dataclass(frozen=True)
class Read:
    """An input. "whole": every task reads all of it; "part": the tasks share it out; "own": each tile's packets as it replaces them.

    A `carried` read takes the value of the token before.
    """

    value: str
    share: Literal["whole", "part", "own"]
    carried: bool = False


@dataclass(frozen=True, kw_only=True)
class Op:
    """A phase of the token: its tasks run one instruction (`stem`). Names are unique ("L3.qkv"); `writes` in the order of their tags."""

    name: str
    stem: str
    reads: tuple[Read, ...]
    writes: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The name without its layer: "qkv" of "L3.qkv"."""
        return self.name.rpartition(".")[2]

    @property
    def instruction(self) -> type[Instruction]:
        return instructions()[self.stem]


@dataclass(frozen=True, kw_only=True)
class EmbedOp(Op):
    cols: int
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class NormOp(Op):
    cols: int
    gain: str


@dataclass(frozen=True, kw_only=True)
class SwiGluOp(Op):
    cols: int


@dataclass(frozen=True, kw_only=True)
class MatVecOp(Op):
    """`rows` by `cols` of the matrix with the op's name; `reads` are x and, where there is one, the residual.

    `flags` are those of isa.matvec: how x comes, and the matrix's weight format.
    """

    rows: int
    cols: int
    flags: int
    gain: str | None
    bias: str | None
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class AttentionOp(Op):
    """Reads q, k and v; K rows begin at packet `k_offset` of k, V rows at `v_offset` of v.

    Writes partials (if splits > 1), which its own tails read, and the output. Of a batch, each seat has these tasks for itself, and a plane
    of the KV cache for each layer: seat s has planes from s times `layers` on.
    """

    layer: int
    kv_heads: int
    group: int
    head_dim: int
    splits: int
    window: int
    k_offset: int
    v_offset: int
    q_gain: str | None
    k_gain: str | None
    seats: int = 1
    layers: int = 0

    @property
    def units(self) -> int:
        return self.seats * self.kv_heads * self.splits


@dataclass(frozen=True, kw_only=True)
class StretchOp(Op):
    """A phase of a stretch of `batch` seats (isa/stretch.py). Its tasks wait for all of the phase that writes the last of their inputs."""

    batch: int

    @property
    def units(self) -> int:
        """Its tasks: one a seat."""
        return self.batch


@dataclass(frozen=True, kw_only=True)
class SeatNormOp(StretchOp):
    """h and its norm. `reads` are the residual and the `shares` of a product, none where h is the embedding; `writes` are h and x."""

    shares: int
    gain: str
    bias: str | None


@dataclass(frozen=True, kw_only=True)
class SeatQkvOp(StretchOp):
    """q, and k with v, of the `shares` of a product; no `writes` where only the rows of the cache are wanted."""

    layer: int
    shares: int
    bias: str | None
    q_gain: str | None
    k_gain: str | None


@dataclass(frozen=True, kw_only=True)
class StretchMatMulOp(StretchOp):
    """x times the matrix with the op's name, a task for each group of its tiles in each share of its `runs` of K."""

    rows: int
    cols: int
    runs: int
    shares: int
    x_order: int
    bias: str | None

    @property
    def groups(self) -> int:
        return -(-self.rows // GROUP_ROWS)

    @property
    def units(self) -> int:
        """Share after share, each with all its groups."""
        return self.groups * self.shares


@dataclass(frozen=True, kw_only=True)
class StretchAttentionOp(StretchOp):
    """A task for each KV head and each 8 seats."""

    layer: int
    kv_heads: int
    window: int

    @property
    def units(self) -> int:
        return self.kv_heads * (self.batch // SEAT_BLOCK)


@dataclass(frozen=True, kw_only=True)
class SampleOp(Op):
    batch: int = 1


@dataclass(frozen=True)
class Graph:
    """Ops in the order of every queue, the values between them and what they read from weights."""

    ops: tuple[Op, ...]
    values: tuple[Value, ...]
    matrices: tuple[Matrix, ...]
    constants: tuple[Constant, ...]

    @property
    def gated(self) -> bool:
        """Counters order its tasks, and its values carry no tags."""
        return any(op.instruction.gated for op in self.ops)
