"""Keep or revert: attempts to be kept without deserving it."""

from __future__ import annotations

from typing import Any

import pytest

from amk.eval.verdict import from_json
from amk.flywheel.decide import is_gain, keeps, noise_us
from amk.tests.flywheel.examples import crashed, refused, verdict


def candidate(latency_us: float, **options: Any) -> dict[str, Any]:
    return verdict(latency_us, program="p1", **options)


def test_a_gain_of_one_percent_is_the_least_that_is_kept() -> None:
    assert keeps(candidate(99.0), verdict(100.0))
    assert not keeps(candidate(99.01), verdict(100.0))
    assert is_gain(99.0, 100.0) and not is_gain(99.005, 100.0)  # a hundredth of the longer time
    assert not keeps(candidate(100.0), verdict(100.0))
    assert not keeps(candidate(150.0), verdict(100.0))


def test_a_gain_within_the_noise_of_both_is_not_kept() -> None:
    """Half-widths of 2 and 1 us ask for a gain of 3 us."""
    noisy = verdict(100.0, width_us=2.0)
    assert noise_us(from_json(noisy)) == 2.0
    assert keeps(candidate(97.0, width_us=1.0), noisy)
    assert not keeps(candidate(97.01, width_us=1.0), noisy)
    assert not keeps(candidate(97.01, width_us=2.0), verdict(100.0, width_us=1.0))


def test_the_first_correct_candidate_with_a_latency_is_kept() -> None:
    assert keeps(candidate(100.0), None)
    assert keeps(candidate(100.0, kind="predicted"), None)
    assert keeps(candidate(1000.0), refused())
    assert keeps(candidate(1000.0), verdict(correct=False))


@pytest.mark.parametrize("incumbent", [None, verdict(100.0)])
@pytest.mark.parametrize(
    "forged",
    [
        refused(),
        crashed(),
        verdict(None, program="p1"),
        verdict(correct=False, program="p1"),
        {},
        {"latency_us": 50.0, "correct": True},
        verdict(50.0, program="p1") | {"correct": False},
        verdict(50.0, program="p1") | {"correct": None},
        verdict(50.0, program="p1") | {"correct": 1},
        verdict(50.0, program="p1") | {"correct": "true"},
        verdict(50.0, program="p1") | {"status": "incorrect"},
        verdict(50.0, program="p1") | {"valid": False},
        verdict(50.0, program="p1") | {"tolerance_used": 1.5},
        verdict(50.0, program="p1") | {"positions": []},
        verdict(50.0, program="p1") | {"latency_us": 1.0},
        verdict(50.0, program="p1") | {"latency_us": 11.0},
        verdict(50.0, program="p1") | {"latency_us": 1.0, "bound_us": None},
        verdict(50.0, program="p1") | {"latency_us": float("nan")},
        verdict(50.0, program="p1") | {"latency_us": "50"},
        verdict(50.0, program="p1") | {"latency_kind": None},
        verdict(50.0, program="p1") | {"latency_samples": None},
        verdict(50.0, program="p1") | {"latency_samples": {"p10": 60.0, "p50": 50.0, "p90": 40.0, "n": 5}},
        verdict(50.0, program="p1") | {"bandwidth_kind": "spec"},
        verdict(50.0, program="p1") | {"program_digest": None},
        verdict(50.0, program="p1", kind="predicted") | {"latency_kind": "measured-gpu"},
    ],
)
def test_nothing_is_kept_without_an_honest_latency(forged: dict[str, Any], incumbent: dict[str, Any] | None) -> None:
    assert not keeps(forged, incumbent)


def test_a_prediction_never_dethrones_a_measurement() -> None:
    assert not keeps(candidate(11.0, kind="predicted"), verdict(100.0))


def test_a_measurement_takes_the_place_of_a_prediction() -> None:
    assert keeps(candidate(200.0), verdict(100.0, kind="predicted"))


def test_the_same_program_measured_again_is_not_an_improvement() -> None:
    assert not keeps(verdict(50.0), verdict(100.0))


def test_keys_that_a_loop_adds_change_nothing() -> None:
    assert keeps(candidate(90.0) | {"source": "mutate", "trial": 3}, verdict(100.0) | {"source": "default"})


@pytest.mark.parametrize(
    "other", [{"model": "small"}, {"gpu": "b200"}, {"dtype": "int8"}, {"latency_position": 16}, {"device_name": "NVIDIA H100"}]
)
def test_latencies_of_unlike_things_are_not_compared(other: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"must be about the same thing.*{next(iter(other))}"):
        keeps(candidate(50.0) | other, verdict(100.0))
