"""What the three streamed matrix-vector instructions share: the words, the read of x, and the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from amk.isa.abi import I32, NONE, U16
from amk.isa.instruction import F32, Access, Instruction, Memory
from amk.isa.machine import TILE_ROWS, ChunkPlan, Machine, chunk_plan
from amk.isa.rounding import fixed_point, scaled_halves, two_part
from amk.isa.weight_format import format_of

X_NARROW = 1  # x comes as narrow packets, not fp32 packets
DIGITS = 3  # bytes of a fixed-point x, for products in integers
X_NORM = 2  # x is RMS-normalised: gain applied when read, scale after the product


@dataclass(frozen=True, kw_only=True)
class MatVec(Instruction):
    """Rows [16 tile0, 16 (tile0 + tiles)) of matrix `weight` ([rows, cols], rows past the end are padding) times x.

    x is `cols` elements from packet `x_start` of `x_buf`. `shape` names the compiled (cols, flags) variant; `flags` also hold the
    matrix's weight format. `gain` and `bias` are element offsets in the constants, -1 for none.
    """

    shape: U16
    flags: U16
    weight: U16
    x_buf: U16
    x_tag: U16
    out_buf: U16
    out_tag: U16
    tile0: I32
    tiles: I32
    cols: I32
    rows: I32
    x_start: I32 = 0
    out_start: I32 = 0
    gain: I32 = -1
    bias: I32 = -1
    res_buf: U16 = NONE
    res_tag: U16 = 0

    streamed: ClassVar[bool] = True
    stored: ClassVar[bool] = True

    @property
    def in_integers(self) -> bool:
        """Whether codes and x are multiplied as integers."""
        weights = format_of(self.flags)
        return weights is not None and not weights.floating

    def plan(self, machine: Machine) -> ChunkPlan:
        """How its tiles are cut into chunks and shared among the consumer warps."""
        return chunk_plan(machine, self.cols, format_of(self.flags))

    def tile_rows(self, tile: int) -> int:
        """Rows of the task's tile number `tile` that exist in the matrix."""
        return max(0, min(TILE_ROWS, self.rows - (self.tile0 + tile) * TILE_ROWS))

    def x_read(self, machine: Machine) -> Access:
        narrow = bool(self.flags & X_NARROW)
        packets = -(-self.cols // machine.narrow) if narrow else self.cols
        return Access(self.x_buf, self.x_start, self.x_start + packets, self.x_tag, "narrow" if narrow else "f32", paired=True)

    def reads(self, machine: Machine, position: int) -> list[Access]:
        return [self.x_read(machine)]

    def rereads(self, machine: Machine) -> bool:
        """Whether consumers read their slice of x again for every tile after the first."""
        return False

    def slice_reads(self, machine: Machine, columns: slice) -> list[Access]:
        """What of x the consumer warp with these columns reads; `columns` begins at a whole packet."""
        x = self.x_read(machine)
        per_packet = machine.narrow if x.kind == "narrow" else 1
        return [replace(x, start=x.start + columns.start // per_packet, stop=x.start + -(-columns.stop // per_packet))]

    def slice_of(self, loaded: Sequence[F32], columns: slice) -> F32:
        """`columns` of x from the elements of what `slice_reads` reads."""
        return loaded[0][: columns.stop - columns.start]

    def chunk_bytes(self, machine: Machine, position: int) -> list[int]:
        plan = self.plan(machine)
        return [plan.chunk_bytes(c) for c in range(plan.chunks)] * self.tiles

    def shared_bytes(self, machine: Machine) -> int:
        """x as elements, each consumer warp its own K slice; an fp32 packet takes two 16-bit elements: the value and its rounding error.

        For codes that are integers three planes of 8-bit digits a warp, 32 bytes apart from where their banks would be the same.
        """
        plan = self.plan(machine)
        if self.in_integers:
            return DIGITS * plan.warps * (plan.high * plan.piece.columns | 32)
        parts = 1 if self.flags & X_NARROW or machine.dtype == "fp32" else 2
        return parts * plan.warps * plan.high * plan.piece.columns * machine.element_bytes

    def slice_sums(self, memory: Memory, x: F32, columns: slice) -> tuple[F32, Any]:
        """One K slice of the product: W[:, columns] times x (its elements), neither scaled nor biased, and the sum of squares of x."""
        first, squares = self.tile0 * TILE_ROWS, 0.0
        if self.flags & X_NORM:
            squares = float((x * x).sum())
            x = x * memory.constant(self.gain, self.cols)[columns]
        w = memory.matrix(self.weight)[first : min(self.rows, first + self.tiles * TILE_ROWS), columns]
        return w @ self._as_multiplied(x, memory.machine.dtype), squares

    def _as_multiplied(self, x: F32, dtype: str) -> F32:
        if self.in_integers:
            return fixed_point(x)
        return two_part(x, dtype) if format_of(self.flags) is None else scaled_halves(x)

    def product(self, memory: Memory) -> F32:
        """fp32 rows of the task (padding rows left out): W x, scaled and biased."""
        machine = memory.machine
        reduced = memory.reduced_sums()
        if reduced is None:
            every = slice(0, self.cols)
            x = self.slice_of([memory.read(access) for access in self.slice_reads(machine, every)], every)
            reduced = self.slice_sums(memory, x, every)
        y, squares = reduced
        if self.flags & X_NORM:
            y = y * np.float32((squares / self.cols + machine.rms_eps) ** -0.5)
        return y if self.bias < 0 else y + self.bias_rows(memory, len(y))

    def bias_rows(self, memory: Memory, rows: int) -> F32:
        """The bias of the task's rows, in the shape in which it is added to them."""
        return memory.constant(self.bias + self.tile0 * TILE_ROWS, rows)

    def tile_slices(self) -> list[slice]:
        """Rows of `product` that belong to each tile."""
        starts = range(0, self.tiles * TILE_ROWS, TILE_ROWS)
        return [slice(s, s + self.tile_rows(s // TILE_ROWS)) for s in starts]
