"""filter_head: rows of the output head with noise; publishes every row's score and perturbed score, and a summary of each tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from amk.isa.instruction import F32, Access, Memory, Publishes
from amk.isa.machine import TILE_ROWS, Machine
from amk.isa.matvec import MatVec
from amk.isa.sampling import FINITE, perturbed, scores_of, tile_masses

ROW_PACKETS = 2  # score, perturbed score
SUMMARY_PACKETS = 4  # largest score, mass relative to it (isa.sampling.tile_masses), best perturbed score, its row
TILE_PACKETS = ROW_PACKETS * TILE_ROWS + SUMMARY_PACKETS


@dataclass(frozen=True, kw_only=True)
class FilterHead(MatVec):
    """Publishes packets [36 n, 36 n + 36) of `out_buf` for tile n of the head: (score, perturbed score) of its 16 rows, then the summary.

    Rows beyond the vocabulary have the least finite scores.
    """

    stem: ClassVar[str] = "filter_head"
    draws: ClassVar[bool] = True

    def writes(self, machine: Machine, position: int) -> list[Access]:
        starts = range(TILE_PACKETS * self.tile0, TILE_PACKETS * (self.tile0 + self.tiles), TILE_PACKETS)
        return [Access(self.out_buf, at, at + TILE_PACKETS, self.out_tag, "u32", "storer", tile=t) for t, at in enumerate(starts)]

    def run(self, memory: Memory, position: int) -> Publishes:
        y = self.product(memory)
        first = self.tile0 * TILE_ROWS
        memory.write_logits(first, y)
        scores = scores_of(y, memory.sampling.temperature)
        tiles = tile_packets(scores, perturbed(scores, memory.sampling, position, 0, first), first)
        return list(zip(self.writes(memory.machine, position), tiles, strict=True))


def tile_packets(scores: F32, noisy: F32, first: int) -> npt.NDArray[Any]:
    """The packets [tiles, 36] of rows from `first` on, which begins a tile, as their bits."""
    tiles = -(-len(scores) // TILE_ROWS)
    rows = np.full((tiles * TILE_ROWS, ROW_PACKETS), -FINITE, dtype=np.float32)
    rows[: len(scores), 0], rows[: len(scores), 1] = scores, noisy
    candidates = rows[:, 1].reshape(tiles, TILE_ROWS)
    best = candidates.argmax(axis=1)
    packets = np.zeros((tiles, TILE_PACKETS), dtype=np.int64)
    packets[:, :-SUMMARY_PACKETS] = rows.reshape(tiles, -1).view(np.uint32)
    summary = np.stack([*tile_masses(scores), candidates.max(axis=1)], axis=1).astype(np.float32)
    packets[:, -SUMMARY_PACKETS:-1] = summary.view(np.uint32)
    packets[:, -1] = first + TILE_ROWS * np.arange(tiles) + best
    return packets


def rows_of(packets: npt.NDArray[Any], vocab: int) -> tuple[F32, F32]:
    """Scores and perturbed scores of the vocabulary from the packets of all its tiles."""
    rows = packets.reshape(-1, TILE_PACKETS)[:, :-SUMMARY_PACKETS].reshape(-1, ROW_PACKETS)[:vocab]
    scores, noisy = np.ascontiguousarray(rows.T.astype(np.uint32)).view(np.float32)
    return scores, noisy
