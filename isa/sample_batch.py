"""sample_batch: picks the next token of every seat from the head tasks' candidates (greedy, lowest token on ties)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine


@dataclass(frozen=True, kw_only=True)
class SampleBatch(Instruction):
    """Takes `count` (value, row) pairs for each seat, seat s's at 2 s of every 2 `batch` packets of `in_buf`; publishes the token of seat s
    in packet s of `out_buf` and hands it to the host.
    """

    in_buf: U16
    in_tag: U16
    out_buf: U16
    out_tag: U16
    batch: U16
    count: I32

    stem: ClassVar[str] = "sample_batch"
    polls: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    def reads(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.in_buf, 0, 2 * self.count * self.batch, self.in_tag, "u32", paired=True)]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.out_buf, 0, self.batch, self.out_tag, "u32")]

    def run(self, memory: Memory, position: int) -> Publishes:
        packets = np.asarray(memory.read(self.reads(memory.machine, position)[0])).astype(np.int64)
        pairs = packets.reshape(self.count, self.batch, 2)
        values = pairs[:, :, 0].astype(np.uint32).view(np.float32)
        tokens = np.where(values == values.max(axis=0), pairs[:, :, 1], np.iinfo(np.int64).max).min(axis=0)
        for seat, token in enumerate(tokens.tolist()):
            memory.emit_token(token, seat)
        return [(self.writes(memory.machine, position)[0], tokens)]
