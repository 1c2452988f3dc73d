"""How many greedy tokens rounding may change: tokens that differ at near ties are told from a defect by how likely each was."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from amk.eval.tolerance import TIE, TIE_RARITY

if TYPE_CHECKING:
    import torch


def tie_gap(reference: torch.Tensor, expected: float, usual: float = 0.0) -> float:
    """How far below the best of the source's logits [vocab] a near tie ends: by the error expected there, or `usual` around, if larger."""
    return TIE * max(expected, usual) * float(reference.std())


def change_chance(reference: torch.Tensor, expected: float) -> float:
    """Chance (0 to 1) that an error of `expected` changes the greedy token of the source's logits [vocab], at most.

    The error is `expected` standard deviations of the logits in each, independent and Gaussian; chances of the other tokens to pass the
    best add up.
    """
    import torch

    logits = reference.double()
    best = int(logits.argmax())
    chances = 0.5 * torch.erfc((logits[best] - logits) / (2 * expected * logits.std()))
    chances[best] = 0
    return min(1.0, float(chances.sum()))


def most_changes(chances: Iterable[float]) -> int:
    """The most tokens that may differ, each by its own chance, such that more are rarer than `TIE_RARITY`; one always may."""
    counts = np.ones(1)  # the chance of each number of tokens
    for chance in chances:
        counts = np.append(counts * (1 - chance), 0) + np.append(0, counts * chance)
    more = 1 - np.cumsum(counts)
    return max(1, int(np.argmax(more < TIE_RARITY)))
