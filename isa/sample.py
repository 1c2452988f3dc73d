"""sample: picks the next token from the head tasks' candidates (greedy: largest logit, lowest token on ties)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Sample(Instruction):
    """Takes `count` (value, row) pairs from the start of `in_buf`; publishes the token in packet 0 of `out_buf`, hands it to the host."""

    in_buf: U16
    in_tag: U16
    out_buf: U16
    out_tag: U16
    count: I32

    stem: ClassVar[str] = "sample"
    polls: ClassVar[bool] = True

    def reads(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.in_buf, 0, 2 * self.count, self.in_tag, "u32", paired=True)]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.out_buf, 0, 1, self.out_tag, "u32")]

    def run(self, memory: Memory, position: int) -> Publishes:
        return self.chosen(memory, position, self.best(memory, position))

    def best(self, memory: Memory, position: int) -> int:
        """The row of the largest candidate."""
        pairs = np.asarray(memory.read(self.reads(memory.machine, position)[0])).astype(np.int64).reshape(-1, 2)
        values = pairs[:, 0].astype(np.uint32).view(np.float32)
        rows = pairs[:, 1]
        return int(rows[values == values.max()].min())

    def chosen(self, memory: Memory, position: int, token: int) -> Publishes:
        """The token goes to the host and, unless it ends the launch, to the next step."""
        if memory.emit_token(token):
            return []
        return [(self.writes(memory.machine, position)[0], np.asarray([token], dtype=np.int64))]
