"""gemm: gemv for a batch; rows of every seat are published with a residual added, narrow and interleaved, or without, in fp32 by seat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amk.isa.abi import NONE
from amk.isa.batch import deinterleave, interleave
from amk.isa.instruction import Access, Memory, Publishes
from amk.isa.machine import TILE_ROWS, Machine
from amk.isa.matmul import OUT_BY_SEAT, MatMul
from amk.isa.rounding import round_to


@dataclass(frozen=True, kw_only=True)
class Gemm(MatMul):
    """Rows go to `out_buf`: narrow and interleaved, a tile's two runs at `8 batch` packets times the tile; or in fp32 by seat, row r of
    seat s to packet `s rows + r`. The residual, if `res_buf` names one, is the same packets of it and always interleaved.
    """

    stem: ClassVar[str] = "gemm"

    def _runs(self, machine: Machine, tile: int) -> tuple[int, int]:
        packets = TILE_ROWS // machine.narrow * self.batch
        start = self.out_start + (self.tile0 + tile) * packets
        return start, start + packets

    def _seat_rows(self, tile: int, seat: int) -> tuple[int, int]:
        start = self.out_start + seat * self.rows + (self.tile0 + tile) * TILE_ROWS
        return start, start + self.tile_rows(tile)

    def _residual(self, machine: Machine, tile: int) -> Access:
        return Access(self.res_buf, *self._runs(machine, tile), self.res_tag, "narrow", "storer", tile=tile, interleaved=True, paired=True)

    def reads(self, machine: Machine, position: int) -> list[Access]:
        residual = [] if self.res_buf == NONE else [self._residual(machine, t) for t in range(self.tiles)]
        return [*super().reads(machine, position), *residual]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        tiles, tag = range(self.tiles), self.out_tag
        if self.flags & OUT_BY_SEAT:
            spans = [(t, self._seat_rows(t, seat)) for t in tiles for seat in range(self.batch)]
            return [Access(self.out_buf, *span, tag, "f32", "storer", tile=t) for t, span in spans]
        runs = [self._runs(machine, t) for t in tiles]
        return [Access(self.out_buf, *span, tag, "narrow", "storer", tile=t, interleaved=True, paired=True) for t, span in enumerate(runs)]

    def run(self, memory: Memory, position: int) -> Publishes:
        machine, y = memory.machine, self.product(memory)
        values = []
        for tile, rows in enumerate(self.tile_slices()):
            part = y[rows]
            if self.res_buf != NONE:
                part = part + deinterleave(memory.read(self._residual(machine, tile)), self.batch)
            values += list(part.T) if self.flags & OUT_BY_SEAT else [interleave(round_to(part, machine.dtype))]
        return list(zip(self.writes(machine, position), values, strict=True))
