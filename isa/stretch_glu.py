"""stretch_glu: silu(gate) * up of a group of gate and up rows (interleaved by 8), over all of K, as x of the next product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32
from amk.isa.gemv_glu import HALF, silu
from amk.isa.instruction import Access, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.rounding import round_to
from amk.isa.stretch import BY_COLUMN, X_ORDERS, ordered
from amk.isa.stretch_matmul import StretchMatMul


@dataclass(frozen=True, kw_only=True)
class StretchGlu(StretchMatMul):
    """Tile t gives columns 8t to 8t + 7 of the output, whose order is BY_COLUMN; an odd last tile gives 8 zeros behind them.

    `bias` is the constants offset of a bias of all rows, -1 for none.
    """

    bias: I32 = -1

    stem: ClassVar[str] = "stretch_glu"

    def writes(self, machine: Machine, position: int) -> list[Access]:
        packets = HALF * self.batch // machine.narrow
        tiles = self.tiles + self.tiles % 2
        first, stop = self.tile0 * packets, (self.tile0 + tiles) * packets
        return [Access(self.out_buf, first, stop, self.out_tag, "narrow", gated=True, order=X_ORDERS[BY_COLUMN])]

    def run(self, memory: Memory, position: int) -> Publishes:
        machine, rows = memory.machine, self.product(memory)
        if self.bias >= 0:
            at = self.tile0 * 2 * HALF
            rows = rows + memory.constant(self.bias + at, len(rows))[:, None]
        pairs = rows.reshape(self.tiles, 2, HALF, self.batch)
        y = round_to(silu(pairs[:, 0]) * pairs[:, 1], machine.dtype).reshape(-1, self.batch)
        y = np.concatenate([y, np.zeros((self.tiles % 2 * HALF, self.batch), dtype=np.float32)])
        return [(self.writes(machine, position)[0], ordered(y, BY_COLUMN, 1))]
