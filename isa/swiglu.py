"""swiglu: publishes silu(gate) * up for a range of columns (used when gate and up are separate products)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amk.isa.abi import I32, U16
from amk.isa.gemv_glu import silu
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.rounding import round_to


@dataclass(frozen=True, kw_only=True)
class SwiGlu(Instruction):
    """Elements [col0, col0 + count) of gate and up (fp32 packets) to narrow packets; col0 and count are even."""

    gate_buf: U16
    gate_tag: U16
    up_buf: U16
    up_tag: U16
    out_buf: U16
    out_tag: U16
    col0: I32
    count: I32

    stem: ClassVar[str] = "swiglu"

    def reads(self, machine: Machine, position: int) -> list[Access]:
        stop = self.col0 + self.count
        return [
            Access(self.gate_buf, self.col0, stop, self.gate_tag, "f32"),
            Access(self.up_buf, self.col0, stop, self.up_tag, "f32"),
        ]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        n = machine.narrow
        return [Access(self.out_buf, self.col0 // n, -(-(self.col0 + self.count) // n), self.out_tag, "narrow")]

    def run(self, memory: Memory, position: int) -> Publishes:
        gate, up = (memory.read(access) for access in self.reads(memory.machine, position))
        return [(self.writes(memory.machine, position)[0], round_to(silu(gate) * up, memory.machine.dtype))]

    def shared_bytes(self, machine: Machine) -> int:
        """The task's elements as fp32, kept until all have been read."""
        return 4 * self.count
