"""embed_prefill: gathers columns of the embedding rows of a stretch's tokens into the residual stream, interleaved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.batch import interleave
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine


@dataclass(frozen=True, kw_only=True)
class EmbedPrefill(Instruction):
    """Columns [col0, col0 + cols), whole runs of 16, of the rows of the host's tokens: it reads no packet, for a launch is one stretch."""

    out_buf: U16
    out_tag: U16
    batch: U16
    col0: I32
    cols: I32

    stem: ClassVar[str] = "embed_prefill"
    polls: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    def reads(self, machine: Machine, position: int) -> list[Access]:
        return []

    def writes(self, machine: Machine, position: int) -> list[Access]:
        first, stop = self.col0 * self.batch, (self.col0 + self.cols) * self.batch
        return [Access(self.out_buf, first, stop, self.out_tag, "f32", interleaved=True)]

    def run(self, memory: Memory, position: int) -> Publishes:
        tokens = [memory.forced_token(seat) or 0 for seat in range(self.batch)]
        rows = np.stack([memory.embedding(token)[self.col0 : self.col0 + self.cols] for token in tokens], axis=1)
        return [(self.writes(memory.machine, position)[0], interleave(rows, narrow=False))]
