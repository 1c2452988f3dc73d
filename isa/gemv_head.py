"""gemv_head: rows of the output head; writes logits to the host's buffer and publishes its best one as (value, row)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.instruction import F32, Access, Memory, Publishes
from amk.isa.machine import TILE_ROWS, Machine
from amk.isa.matvec import MatVec


def comparable(y: F32) -> F32:
    """Values as the device compares them: what is no number is less than all others, and the first row is a token where none is one."""
    return np.where(np.isnan(y), np.float32(-np.inf), y)


@dataclass(frozen=True, kw_only=True)
class GemvHead(MatVec):
    """Publishes packets [out_start, out_start + 2) of `out_buf` with its last tile: the largest logit and its row, lowest row on ties.

    Earlier tiles publish nothing: their access is empty.
    """

    stem: ClassVar[str] = "gemv_head"

    def writes(self, machine: Machine, position: int) -> list[Access]:
        stops = [self.out_start] * (self.tiles - 1) + [self.out_start + 2]
        return [Access(self.out_buf, self.out_start, stop, self.out_tag, "u32", "storer", tile=t) for t, stop in enumerate(stops)]

    def run(self, memory: Memory, position: int) -> Publishes:
        y = self.product(memory)
        memory.write_logits(self.tile0 * TILE_ROWS, y)
        return self.best_of(memory, position, y)

    def best_of(self, memory: Memory, position: int, y: F32) -> Publishes:
        """The publishes, given the values of the task's rows."""
        y = comparable(y)
        best = int(np.argmax(y))
        bits = int(np.float32(y[best]).view(np.uint32))
        empty = np.zeros(0, dtype=np.int64)
        values = [empty] * (self.tiles - 1) + [np.asarray([bits, self.tile0 * TILE_ROWS + best], dtype=np.int64)]
        return list(zip(self.writes(memory.machine, position), values, strict=True))
