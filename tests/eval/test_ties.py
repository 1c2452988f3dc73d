"""How many tokens rounding may change: what is computed is what random errors do."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from amk.eval.ties import change_chance, most_changes
from amk.eval.tolerance import TIE_RARITY


@pytest.mark.parametrize("gap", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_the_chance_of_a_change_is_what_gaussian_errors_do(gap: float) -> None:
    """`gap`: of the two best, in expected errors."""
    expected, generator = 0.02, torch.Generator().manual_seed(1)
    logits = torch.randn(1000, generator=generator).double().clamp(max=2.5)
    logits[7], logits[11] = 6.0, 6.0
    logits[11] -= gap * expected * logits.std()
    noise = torch.randn(40000, 2, generator=generator).double() * expected * logits.std()
    changed = float((logits[11] + noise[:, 1] > logits[7] + noise[:, 0]).double().mean())
    assert change_chance(logits, expected) == pytest.approx(changed, abs=0.01)


def test_a_token_that_stands_apart_does_not_change() -> None:
    logits = torch.zeros(100)
    logits[3] = 1
    assert change_chance(logits, 0.01) < 1e-12


def test_many_that_are_tied_are_no_more_than_certain() -> None:
    assert change_chance(torch.tensor([2.0] * 50 + [0.0] * 50), 0.01) == 1


@pytest.mark.parametrize(("logits", "expected"), [([1.0, 1.0, 1.0], 0.01), ([3.0, 1.0, 0.0], math.inf)])
def test_where_nothing_tells_tokens_apart_a_change_is_certain(logits: list[float], expected: float) -> None:
    """All logits equal, and a source whose rounded logits are not finite."""
    assert change_chance(torch.tensor(logits), expected) == 1


@pytest.mark.parametrize(("chances", "most"), [([], 1), ([0.0] * 60, 1), ([1e-5] * 60, 1), ([1.0] * 5, 5), ([0.005] * 10, 2)])
def test_one_may_always_differ_and_then_as_many_as_is_likely(chances: list[float], most: int) -> None:
    assert most_changes(chances) == most


@pytest.mark.parametrize("seed", range(4))
def test_correct_programs_exceed_it_as_rarely_as_said_and_the_next_lower_number_oftener(seed: int) -> None:
    rng = np.random.default_rng(seed)
    chances = rng.uniform(0, 1, 60) ** 6
    found, runs = most_changes(chances), 400000
    counts = sum((rng.random(runs) < chance).astype(np.int32) for chance in chances)
    assert np.mean(counts > found) < 2 * TIE_RARITY
    assert np.mean(counts > found - 1) > TIE_RARITY / 2
