"""What the three streamed products of a batch share: the same matrix, tiles and stream as a matrix-vector product, x for every seat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from amk.isa.abi import U16
from amk.isa.batch import RUN, SEAT_BLOCK, deinterleave
from amk.isa.instruction import F32, Access, Memory
from amk.isa.machine import TILE_ROWS, Machine
from amk.isa.matvec import X_NORM, MatVec
from amk.isa.rounding import round_to

# Flags beside those of isa.matvec and isa.weight_format.
X_BY_SEAT = 256  # x lies by seat, else interleaved
OUT_BY_SEAT = 512  # so does the output
X_KEPT = 1024  # a warp keeps its slice of x, for more tiles than one; else it reads x again for every tile
BATCH_FLAGS = X_BY_SEAT | OUT_BY_SEAT | X_KEPT
KEPT_SEAT_WORDS = 32  # registers a lane may spend on its slice of x; a larger one is kept in scratch


@dataclass(frozen=True, kw_only=True)
class MatMul(MatVec):
    """MatVec with `batch` vectors x, always of narrow packets: there are no idle columns for rounding errors, and as every SM reads all of
    x, a step takes the L2 cache longer than the weights take memory.
    """

    batch: U16 = SEAT_BLOCK

    batched: ClassVar[bool] = True

    def x_reads(self, machine: Machine, columns: slice) -> list[Access]:
        """The packets that hold `columns` of every seat's x; `columns` begins at a whole run."""
        by_seat, per = bool(self.flags & X_BY_SEAT), machine.narrow
        start, stop = columns.start // per, -(-columns.stop // per)
        if by_seat:
            stride = -(-self.cols // per)
            spans = [(seat * stride + start, seat * stride + stop) for seat in range(self.batch)]
        else:
            spans = [(start * self.batch, (columns.stop + -columns.stop % RUN) // per * self.batch)]
        at = self.x_start
        return [Access(self.x_buf, at + a, at + b, self.x_tag, "narrow", interleaved=not by_seat, paired=True) for a, b in spans]

    def reads(self, machine: Machine, position: int) -> list[Access]:
        x = self.x_reads(machine, slice(0, self.cols))
        return [*x, *(replace(access, tile=self.tiles - 1) for access in x)] if self.rereads(machine) else x

    def rereads(self, machine: Machine) -> bool:
        return self.tiles > 1 and not self.flags & X_KEPT and self._lane_words(machine) > KEPT_SEAT_WORDS

    def _lane_words(self, machine: Machine) -> int:
        """Registers that a lane needs for its part of a slice of x."""
        plan = self.plan(machine)
        return plan.chunks * plan.per_chunk * 2 * self.batch // SEAT_BLOCK

    def slice_reads(self, machine: Machine, columns: slice) -> list[Access]:
        return self.x_reads(machine, columns) if columns.stop > columns.start else []

    def slice_of(self, loaded: Sequence[F32], columns: slice) -> F32:
        """x [columns, batch] from what `slice_reads` reads."""
        width = columns.stop - columns.start
        if not width:
            return np.zeros((0, self.batch), dtype=np.float32)
        if self.flags & X_BY_SEAT:
            return np.stack([part[:width] for part in loaded], axis=1)
        return deinterleave(loaded[0], self.batch)[:width]

    def shared_bytes(self, machine: Machine) -> int:
        """x as elements where it is kept and registers do not hold it, each consumer warp its own K slice."""
        plan = self.plan(machine)
        kept = plan.warps * plan.high * plan.piece.columns * machine.element_bytes * self.batch
        return kept if self.flags & X_KEPT and self._lane_words(machine) > KEPT_SEAT_WORDS else 0

    def slice_sums(self, memory: Memory, x: F32, columns: slice) -> tuple[F32, Any]:
        first, squares = self.tile0 * TILE_ROWS, np.zeros(self.batch, dtype=np.float32)
        if self.flags & X_NORM:
            squares = (x * x).sum(axis=0)
            x = x * memory.constant(self.gain, self.cols)[columns][:, None]
        w = memory.matrix(self.weight)[first : min(self.rows, first + self.tiles * TILE_ROWS), columns]
        return w @ round_to(x, memory.machine.dtype), squares

    def bias_rows(self, memory: Memory, rows: int) -> F32:
        return super().bias_rows(memory, rows)[:, None]
