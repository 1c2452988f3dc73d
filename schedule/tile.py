"""Pass 2: how each op is cut into units, the smallest pieces that are placed on an SM."""

from __future__ import annotations

from dataclasses import dataclass

from amk.isa.machine import ELEMENT_BYTES, TILE_ROWS
from amk.isa.weight_format import format_of
from amk.schedule.graph import AttentionOp, EmbedOp, Graph, MatVecOp, NormOp, Op, StretchOp, SwiGluOp
from amk.schedule.model import ModelSpec
from amk.schedule.settings import Settings

EMBED_COLUMNS = 512
NORM_COLUMNS = 256  # a multiple of 16, see isa.rmsnorm
SWIGLU_COLUMNS = 256  # even, see isa.swiglu
PLANNING_POSITION = 1024  # where the balance of attention against products is judged


@dataclass(frozen=True)
class Tiling:
    """`total` tiles or columns of an op in units of `size` (the last may be smaller); a unit streams about `unit_bytes`."""

    total: int
    size: int
    unit_bytes: int = 0
    mergeable: bool = True  # neighbouring units on one SM are one task

    @property
    def units(self) -> int:
        return -(-self.total // self.size)

    def bounds(self, first_unit: int, stop_unit: int) -> tuple[int, int]:
        return first_unit * self.size, min(stop_unit * self.size, self.total)


def tile(spec: ModelSpec, graph: Graph, settings: Settings) -> dict[str, Tiling]:
    """The tiling of every op, by name."""
    return {op.name: _tiling(op, spec, settings) for op in graph.ops}


def _tiling(op: Op, spec: ModelSpec, settings: Settings) -> Tiling:
    element = ELEMENT_BYTES[spec.dtype]
    if isinstance(op, MatVecOp):
        bits = weights.bits if (weights := format_of(op.flags)) else 8 * element
        return Tiling(-(-op.rows // TILE_ROWS), settings.tiles_per_unit, settings.config.n_tile * op.cols * bits // 8)
    if isinstance(op, AttentionOp):
        rows = min(PLANNING_POSITION, settings.context, op.window or settings.context)
        unit_bytes = 2 * rows * op.head_dim * element // op.splits
        return Tiling(op.units, 1, unit_bytes, mergeable=False)
    if isinstance(op, StretchOp):
        return Tiling(op.units, 1, mergeable=False)
    if isinstance(op, EmbedOp):
        return Tiling(op.cols, EMBED_COLUMNS)
    if isinstance(op, NormOp):
        return Tiling(op.cols, NORM_COLUMNS)
    return Tiling(op.cols, SWIGLU_COLUMNS) if isinstance(op, SwiGluOp) else Tiling(1, 1)
