"""filter_draw: picks the best perturbed score among the tokens that the filters keep, and ends the launch at a stop token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.filter_head import TILE_PACKETS, rows_of
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.sampling import best_token, kept_tokens

QUEUE_TILES = 64  # tiles that a consumer warp has found and not looked at yet
BINS = 256  # of a histogram
SHARED_WORDS = 16  # what the warps tell each other in one round


@dataclass(frozen=True, kw_only=True)
class FilterDraw(Instruction):
    """Takes the packets of all `tiles` tiles of the head (isa.filter_head) from `in_buf`; else as Draw."""

    in_buf: U16
    in_tag: U16
    out_buf: U16
    out_tag: U16
    tiles: I32

    stem: ClassVar[str] = "filter_draw"
    polls: ClassVar[bool] = True
    draws: ClassVar[bool] = True

    def reads(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.in_buf, 0, TILE_PACKETS * self.tiles, self.in_tag, "u32", paired=True)]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        return [Access(self.out_buf, 0, 1, self.out_tag, "u32")]

    def run(self, memory: Memory, position: int) -> Publishes:
        machine = memory.machine
        scores, noisy = rows_of(np.asarray(memory.read(self.reads(machine, position)[0])), machine.vocab)
        token = best_token(noisy, kept_tokens(scores, memory.sampling))
        if memory.emit_token(token):
            return []
        return [(self.writes(machine, position)[0], np.asarray([token], dtype=np.int64))]

    def shared_bytes(self, machine: Machine) -> int:
        """A histogram, two lines of words that the warps share, and each warp's queue of tiles."""
        return 4 * (BINS + machine.consumer_warps * (2 * SHARED_WORDS + QUEUE_TILES))
