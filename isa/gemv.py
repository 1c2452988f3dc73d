"""gemv: a matrix-vector product whose fp32 rows are published, with a residual added when `res_buf` names one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amk.isa.abi import NONE
from amk.isa.instruction import Access, Memory, Publishes
from amk.isa.machine import TILE_ROWS, Machine
from amk.isa.matvec import MatVec


@dataclass(frozen=True, kw_only=True)
class Gemv(MatVec):
    """Row r of the matrix goes to packet `out_start + r` of `out_buf`; the residual is the same packet of `res_buf`."""

    stem: ClassVar[str] = "gemv"

    def _rows(self, tile: int) -> tuple[int, int]:
        start = self.out_start + (self.tile0 + tile) * TILE_ROWS
        return start, start + self.tile_rows(tile)

    def _residual(self, tile: int) -> Access:
        start, stop = self._rows(tile)
        return Access(self.res_buf, start, stop, self.res_tag, "f32", "storer", tile=tile)

    def reads(self, machine: Machine, position: int) -> list[Access]:
        residual = [] if self.res_buf == NONE else [self._residual(t) for t in range(self.tiles)]
        return [self.x_read(machine), *residual]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.out_buf, *self._rows(t), self.out_tag, "f32", "storer", tile=t) for t in range(self.tiles)]

    def run(self, memory: Memory, position: int) -> Publishes:
        y = self.product(memory)
        tiles = [y[rows] for rows in self.tile_slices()]
        if self.res_buf != NONE:
            tiles = [part + memory.read(self._residual(t)) for t, part in enumerate(tiles)]
        return list(zip(self.writes(memory.machine, position), tiles, strict=True))
