"""gemm_glu: gemv_glu for a batch: silu(gate) * up of every seat, published narrow and interleaved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amk.isa.batch import RUN, interleave
from amk.isa.gemv_glu import HALF, silu
from amk.isa.instruction import Access, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.matmul import MatMul
from amk.isa.rounding import round_to


@dataclass(frozen=True, kw_only=True)
class GemmGlu(MatMul):
    """Tile t gives 8 elements of each seat: the run of `4 batch` packets at that many times t."""

    stem: ClassVar[str] = "gemm_glu"

    def writes(self, machine: Machine, position: int) -> list[Access]:
        packets = RUN // machine.narrow * self.batch
        first = self.out_start + self.tile0 * packets
        starts = range(first, first + self.tiles * packets, packets)
        return [
            Access(self.out_buf, at, at + packets, self.out_tag, "narrow", "storer", tile=t, interleaved=True, paired=True)
            for t, at in enumerate(starts)
        ]

    def run(self, memory: Memory, position: int) -> Publishes:
        pairs = self.product(memory).reshape(self.tiles, 2, HALF, self.batch)
        y = round_to(silu(pairs[:, 0]) * pairs[:, 1], memory.machine.dtype)
        return list(zip(self.writes(memory.machine, position), map(interleave, y), strict=True))
