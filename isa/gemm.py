"""gemm: gemv for a batch; fp32 rows of every seat are published, with a residual added when `res_buf` names one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amk.isa.abi import NONE
from amk.isa.batch import deinterleave, interleave
from amk.isa.instruction import Access, Memory, Publishes
from amk.isa.machine import TILE_ROWS, Machine
from amk.isa.matmul import OUT_BY_SEAT, MatMul


@dataclass(frozen=True, kw_only=True)
class Gemm(MatMul):
    """Rows go to `out_buf`: interleaved, a tile's run of packets at `16 batch` times the tile; or by seat, row r of seat s to packet
    `s rows + r`. The residual is the same packets of `res_buf` and always interleaved.
    """

    stem: ClassVar[str] = "gemm"

    def _run(self, tile: int) -> tuple[int, int]:
        start = self.out_start + (self.tile0 + tile) * TILE_ROWS * self.batch
        return start, start + TILE_ROWS * self.batch

    def _seat_rows(self, tile: int, seat: int) -> tuple[int, int]:
        start = self.out_start + seat * self.rows + (self.tile0 + tile) * TILE_ROWS
        return start, start + self.tile_rows(tile)

    def _residual(self, tile: int) -> Access:
        return Access(self.res_buf, *self._run(tile), self.res_tag, "f32", "storer", tile=tile, interleaved=True, paired=True)

    def reads(self, machine: Machine, position: int) -> list[Access]:
        residual = [] if self.res_buf == NONE else [self._residual(t) for t in range(self.tiles)]
        return [*super().reads(machine, position), *residual]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        spans = [(t, span) for t in range(self.tiles) for span in self._spans(t)]
        whole = not self.flags & OUT_BY_SEAT
        return [Access(self.out_buf, *span, self.out_tag, "f32", "storer", tile=t, interleaved=whole, paired=whole) for t, span in spans]

    def _spans(self, tile: int) -> list[tuple[int, int]]:
        return [self._seat_rows(tile, seat) for seat in range(self.batch)] if self.flags & OUT_BY_SEAT else [self._run(tile)]

    def run(self, memory: Memory, position: int) -> Publishes:
        y = self.product(memory)
        values = []
        for tile, rows in enumerate(self.tile_slices()):
            part = y[rows]
            if self.res_buf != NONE:
                part = part + deinterleave(memory.read(self._residual(tile)), self.batch, narrow=False)
            values += list(part.T) if self.flags & OUT_BY_SEAT else [interleave(part, narrow=False)]
        return list(zip(self.writes(memory.machine, position), values, strict=True))
