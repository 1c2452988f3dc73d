"""gemv_glu: gate and up projections in one matrix whose tiles hold 8 gate rows and their 8 up rows; publishes silu(gate) * up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.instruction import F32, Access, Memory, Publishes
from amk.isa.machine import TILE_ROWS, Machine
from amk.isa.matvec import MatVec
from amk.isa.rounding import round_to

HALF = TILE_ROWS // 2


def silu(x: F32) -> F32:
    """x * sigmoid(x) in fp32, without overflow for very negative x."""
    return (x / (np.float32(1) + np.exp(-np.maximum(x, np.float32(-80))))).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class GemvGlu(MatVec):
    """Tile t gives 8 elements, published narrow from packet `out_start + t * 8 / narrow` of `out_buf`."""

    stem: ClassVar[str] = "gemv_glu"

    def writes(self, machine: Machine, position: int) -> list[Access]:
        packets = HALF // machine.narrow
        first = self.out_start + self.tile0 * packets
        return [
            Access(self.out_buf, first + t * packets, first + (t + 1) * packets, self.out_tag, "narrow", "storer", tile=t)
            for t in range(self.tiles)
        ]

    def run(self, memory: Memory, position: int) -> Publishes:
        pairs = self.product(memory).reshape(self.tiles, 2, HALF)
        y = round_to(silu(pairs[:, 0]) * pairs[:, 1], memory.machine.dtype)
        return list(zip(self.writes(memory.machine, position), y, strict=True))
