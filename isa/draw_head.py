"""draw_head: rows of the output head; writes logits to the host's buffer and publishes its best score with noise as (value, row)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Memory, Publishes
from amk.isa.machine import TILE_ROWS
from amk.isa.sampling import perturbed, scores_of


@dataclass(frozen=True, kw_only=True)
class DrawHead(GemvHead):
    """As GemvHead, but of the scores (logits over the temperature) with their noise: the best of all is the draw."""

    stem: ClassVar[str] = "draw_head"
    draws: ClassVar[bool] = True

    def run(self, memory: Memory, position: int) -> Publishes:
        y = self.product(memory)
        first = self.tile0 * TILE_ROWS
        memory.write_logits(first, y)
        scores = scores_of(y, memory.sampling.temperature)
        return self.best_of(memory, position, perturbed(scores, memory.sampling, position, 0, first))
