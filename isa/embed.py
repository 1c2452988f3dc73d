"""embed: gathers columns of the input token's embedding row into the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amk.isa.abi import I32, U16
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine


@dataclass(frozen=True, kw_only=True)
class Embed(Instruction):
    """Columns [col0, col0 + cols) of the row of the host's token, or of the token sampled in the previous step.

    The sampled token is read (and its tag checked) even where the host's token is used, so that a step never begins before
    the one before it has ended.
    """

    token_buf: U16
    token_tag: U16
    out_buf: U16
    out_tag: U16
    col0: I32
    cols: I32

    stem: ClassVar[str] = "embed"
    carried: ClassVar[bool] = True
    polls: ClassVar[bool] = True

    def reads(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.token_buf, 0, 1, self.token_tag, "u32", carried=True)]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.out_buf, self.col0, self.col0 + self.cols, self.out_tag, "f32")]

    def run(self, memory: Memory, position: int) -> Publishes:
        sampled = memory.read(self.reads(memory.machine, position)[0])
        forced = memory.forced_token()
        token = forced if forced is not None else int(sampled[0])
        row = memory.embedding(token)[self.col0 : self.col0 + self.cols]
        return [(self.writes(memory.machine, position)[0], row)]
