"""Nothing is timed that gives other bits when it runs again."""

from __future__ import annotations

import pytest
import torch

from amk.dev.judged import IDENTITY, NotCorrect, judged_before, same_bits
from amk.vm.interface import Decoded


class Machine:
    """Gives the same logits each time, but for the last bit of one in the launch `odd`."""

    context, batch = 64, 1

    def __init__(self, odd: int | None) -> None:
        self.odd, self.launches = odd, 0

    def decode(self, tokens: list[int], position: int, *, steps: int | None = None, logits: bool = False) -> Decoded:
        assert steps and all(0 <= token < 11 for token in tokens)
        found = torch.ones(steps, 11)
        if self.launches == self.odd:
            found[3, 4] = torch.nextafter(found[3, 4], torch.tensor(2.0))
        self.launches += 1
        return Decoded((0,) * steps, found, None)


def test_equal_bits_have_one_digest() -> None:
    assert same_bits(Machine(None), 11) == same_bits(Machine(None), 11)  # type: ignore[arg-type]


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_one_bit_in_one_launch_is_refused(odd: int) -> None:
    with pytest.raises(NotCorrect, match="same bits"):
        same_bits(Machine(odd), 11)  # type: ignore[arg-type]


class Batch(Machine):
    """Two rows side by side."""

    batch = 2

    def decode_batch(self, tokens: list[list[int]], positions: list[int], *, steps: int, logits: bool) -> Decoded:
        assert len(tokens) == len(positions) == 2 and tokens[0] != tokens[1]
        return self.decode(tokens[0], positions[0], steps=steps, logits=logits)


@pytest.mark.parametrize("odd", [None, 1])
def test_a_batch_runs_as_often(odd: int | None) -> None:
    machine = Batch(odd)
    if odd is None:
        assert same_bits(machine, 11) and machine.launches == 3  # type: ignore[arg-type]
        return
    with pytest.raises(NotCorrect, match="same bits"):
        same_bits(machine, 11)  # type: ignore[arg-type]


KNOWN = dict.fromkeys(IDENTITY, "x")
BEFORE = KNOWN | {"correct": True, "tolerance_used": 0.4, "judged_positions": 64}


def test_a_judgement_stands_for_the_same_program_with_the_same_bits() -> None:
    found = judged_before(KNOWN, BEFORE)
    assert found is not None and (found["correct"], found["tolerance_used"]) == (True, 0.4) and found["judged"]
    assert judged_before(KNOWN, None) is None


@pytest.mark.parametrize("change", [*({name: "y"} for name in IDENTITY), {"correct": False}, {"correct": None}], ids=str)
def test_a_judgement_of_anything_else_does_not(change: dict[str, object]) -> None:
    assert judged_before(KNOWN, BEFORE | change) is None
