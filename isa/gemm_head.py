"""gemm_head: gemv_head for a batch: logits of every seat to the host's buffer, and each seat's best one as (value, row)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.gemv_head import comparable
from amk.isa.instruction import Access, Memory, Publishes
from amk.isa.machine import TILE_ROWS, Machine
from amk.isa.matmul import MatMul


@dataclass(frozen=True, kw_only=True)
class GemmHead(MatMul):
    """Publishes with its last tile packets [out_start, out_start + 2 batch) of `out_buf`: for each seat the largest logit and its row,
    lowest row on ties. Earlier tiles publish nothing: their access is empty.
    """

    stem: ClassVar[str] = "gemm_head"

    def writes(self, machine: Machine, position: int) -> list[Access]:
        stops = [self.out_start] * (self.tiles - 1) + [self.out_start + 2 * self.batch]
        return [Access(self.out_buf, self.out_start, stop, self.out_tag, "u32", "storer", tile=t) for t, stop in enumerate(stops)]

    def run(self, memory: Memory, position: int) -> Publishes:
        y = self.product(memory)
        first = self.tile0 * TILE_ROWS
        for seat in range(self.batch):
            memory.write_logits(first, y[:, seat], seat)
        y = comparable(y)
        best = y.argmax(axis=0)
        bits = y.max(axis=0).astype(np.float32).view(np.uint32).astype(np.int64)
        empty = np.zeros(0, dtype=np.int64)
        values = [empty] * (self.tiles - 1) + [np.stack([bits, first + best], axis=1).ravel()]
        return list(zip(self.writes(memory.machine, position), values, strict=True))
