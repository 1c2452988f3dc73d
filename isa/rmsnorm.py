"""rmsnorm: publishes columns of the normalised residual stream (used when the norm is not fused into the reader)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.rounding import round_to


@dataclass(frozen=True, kw_only=True)
class RmsNorm(Instruction):
    """Columns [col0, col0 + count) of x * gain / sqrt(mean(x^2) + eps) over all `cols` of x; col0 and count are multiples of 16."""

    x_buf: U16
    x_tag: U16
    out_buf: U16
    out_tag: U16
    cols: I32
    col0: I32
    count: I32
    gain: I32

    stem: ClassVar[str] = "rmsnorm"

    def reads(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.x_buf, 0, self.cols, self.x_tag, "f32")]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        n = machine.narrow
        return [Access(self.out_buf, self.col0 // n, -(-(self.col0 + self.count) // n), self.out_tag, "narrow")]

    def run(self, memory: Memory, position: int) -> Publishes:
        x = memory.read(self.reads(memory.machine, position)[0])
        scale = np.float32(1.0 / (float((x * x).mean()) + memory.machine.rms_eps) ** 0.5)
        part = slice(self.col0, self.col0 + self.count)
        y = round_to(x[part] * scale * memory.constant(self.gain, self.cols)[part], memory.machine.dtype)
        return [(self.writes(memory.machine, position)[0], y)]

    def shared_bytes(self, machine: Machine) -> int:
        """A sum of squares a consumer warp, and the task's columns as fp32, kept until all of x has been read."""
        return 4 * (machine.consumer_warps + self.count)
