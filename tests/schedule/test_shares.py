"""Shares of K: every run is somebody's, and no other number of shares would end earlier."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amk.isa.stretch import MOST_SHARES
from amk.schedule.shares import share_count, share_runs

RUNS = st.lists(st.integers(1, 8), min_size=1, max_size=48)


def fragments(runs: list[int], shares: int) -> list[int]:
    return [sum(runs[i] for i in share_runs(runs, shares, share)) for share in range(shares)]


def longest(groups: int, runs: list[int], sms: int, shares: int) -> int:
    """Fragments of the SM that has most: its tasks by those of the longest."""
    tasks = fragments(runs, shares) * groups
    return max(1, -(-len(tasks) // sms)) * max(tasks)


@pytest.mark.parametrize(("groups", "runs", "sms"), list(product((1, 3, 24, 128, 300), (1, 2, 7, 32, 128), (1, 4, 132))))
def test_no_other_number_of_shares_ends_earlier_and_no_smaller_one_as_early(groups: int, runs: int, sms: int) -> None:
    equal = [4] * runs
    chosen = share_count(groups, equal, sms)
    times = {shares: longest(groups, equal, sms, shares) for shares in range(1, min(runs, MOST_SHARES) + 1)}
    assert chosen == min(times, key=lambda shares: (times[shares], shares))


@given(RUNS, st.integers(1, 64), st.sampled_from((1, 4, 132)))
def test_the_number_of_shares_is_the_best_of_those_without_an_empty_one(runs: list[int], groups: int, sms: int) -> None:
    chosen = share_count(groups, runs, sms)
    assert 1 <= chosen <= MOST_SHARES and min(fragments(runs, chosen)) > 0
    for other in range(1, min(len(runs), MOST_SHARES) + 1):
        if min(fragments(runs, other)) > 0:
            assert (longest(groups, runs, sms, chosen), chosen) <= (longest(groups, runs, sms, other), other)


@given(RUNS, st.integers(1, 8))
def test_shares_take_every_run_once_in_order_and_end_by_less_than_a_run_before_what_is_due(runs: list[int], shares: int) -> None:
    parts = [share_runs(runs, shares, share) for share in range(shares)]
    assert [run for part in parts for run in part] == list(range(len(runs)))
    for share, part in enumerate(parts):
        due = sum(runs) * (share + 1) / shares
        assert sum(runs[: part.stop]) <= due < sum(runs[: part.stop]) + (runs[part.stop] if part.stop < len(runs) else 1)


@pytest.mark.parametrize(("runs", "shares"), [(1, 1), (7, 3), (8, 8), (33, 8), (128, 5)])
def test_shares_of_equal_runs_differ_by_at_most_one(runs: int, shares: int) -> None:
    parts = [share_runs([4] * runs, shares, share) for share in range(shares)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and min(map(len, parts)) > 0


def test_long_runs_before_short_ones_are_shared_out_by_what_they_hold() -> None:
    """A row of 64 fragments by stages of 24 KB: each of 8 warps has 6 of the first chunk and 2 of the second."""
    runs = [6] * 8 + [2] * 8
    assert fragments(runs, 4) == [12, 18, 18, 16]  # by their number: 24, 24, 8, 8


def test_one_matrix_of_llama_1b_on_an_h200() -> None:
    """qkv: 24 groups by 32 runs; 5 shares are 120 tasks of at most 7 runs, 6 shares would be two waves of 6."""
    assert share_count(24, [4] * 32, 132) == 5
