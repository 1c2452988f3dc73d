"""stretch_sums: fp32 sums of a group of rows over a share of K, for every seat; who reads them adds the shares in order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import U16
from amk.isa.instruction import Access, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.stretch import GROUP_ROWS, GROUP_TILES
from amk.isa.stretch_matmul import StretchMatMul


@dataclass(frozen=True, kw_only=True)
class StretchSums(StretchMatMul):
    """Share `share` of K. A group's sums are [batch, 128] packets, and groups follow each other: [shares, groups, batch, 128]."""

    share: U16

    stem: ClassVar[str] = "stretch_sums"

    def writes(self, machine: Machine, position: int) -> list[Access]:
        groups = -(-self.rows // GROUP_ROWS)
        size = GROUP_ROWS * self.batch
        start = (self.share * groups + self.tile0 // GROUP_TILES) * size
        return [Access(self.out_buf, start, start + size, self.out_tag, "f32", gated=True, order="sums")]

    def run(self, memory: Memory, position: int) -> Publishes:
        sums = self.product(memory)
        out = np.zeros((self.batch, GROUP_ROWS), dtype=np.float32)
        out[:, : len(sums)] = sums.T
        return [(self.writes(memory.machine, position)[0], out.ravel())]
