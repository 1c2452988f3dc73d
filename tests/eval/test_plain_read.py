"""The card's plain read is the best of a few rounds; a card that stays short of what its name promises is not measured."""

from __future__ import annotations

import pytest

from amk.eval.bench import LEAST_READ_GBS, READ_ROUNDS, best_read_gbs
from amk.eval.errors import RunVoid

LEAST = LEAST_READ_GBS["h200"]


class Reader:
    """A card that reads as it is told to, round by round."""

    def __init__(self, *rounds: float) -> None:
        self.left = list(rounds)

    def __call__(self) -> float:
        return self.left.pop(0)


def no_pause(_: float) -> None:
    pass


def test_a_card_that_reads_as_it_must_is_read_once() -> None:
    reader = Reader(LEAST, LEAST + 50)
    assert best_read_gbs("h200", reader, no_pause) == LEAST
    assert reader.left == [LEAST + 50]


def test_a_round_that_falls_short_is_followed_by_another() -> None:
    assert best_read_gbs("h200", Reader(LEAST - 16, LEAST - 4, LEAST + 90), no_pause) == LEAST + 90


def test_a_card_that_stays_short_voids_the_run_and_the_best_of_its_rounds_is_told() -> None:
    reader = Reader(*[LEAST - 20, LEAST - 4, LEAST - 16][:READ_ROUNDS], LEAST + 100)
    with pytest.raises(RunVoid, match=f"must reach {LEAST:.0f} GB/s .* reached {LEAST - 4:.0f} in {READ_ROUNDS} rounds"):
        best_read_gbs("h200", reader, no_pause)
    assert reader.left == [LEAST + 100]


def test_a_card_of_which_nothing_is_promised_is_read_once() -> None:
    assert best_read_gbs("auto", Reader(900.0), no_pause) == 900.0
