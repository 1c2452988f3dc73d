"""embed_batch: gathers columns of the embedding rows of a batch's input tokens into the residual stream, narrow and interleaved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.batch import interleave
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine


@dataclass(frozen=True, kw_only=True)
class EmbedBatch(Instruction):
    """Columns [col0, col0 + cols), whole runs of 16, of the rows of the host's tokens, or of those sampled in the previous step.

    Sampled tokens are read (and their tags checked) even where the host's are used, so that a step never begins before the one
    before it has ended.
    """

    token_buf: U16
    token_tag: U16
    out_buf: U16
    out_tag: U16
    batch: U16
    col0: I32
    cols: I32

    stem: ClassVar[str] = "embed_batch"
    carried: ClassVar[bool] = True
    polls: ClassVar[bool] = True
    batched: ClassVar[bool] = True

    def reads(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.token_buf, 0, self.batch, self.token_tag, "u32", carried=True)]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        first, stop = (column * self.batch // machine.narrow for column in (self.col0, self.col0 + self.cols))
        return [Access(self.out_buf, first, stop, self.out_tag, "narrow", interleaved=True, paired=True)]

    def run(self, memory: Memory, position: int) -> Publishes:
        sampled = memory.read(self.reads(memory.machine, position)[0])
        forced = [memory.forced_token(seat) for seat in range(self.batch)]
        tokens = [int(own) if token is None else token for token, own in zip(forced, sampled, strict=True)]
        rows = np.stack([memory.embedding(token)[self.col0 : self.col0 + self.cols] for token in tokens], axis=1)
        return [(self.writes(memory.machine, position)[0], interleave(rows))]
