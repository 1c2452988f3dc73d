"""Shares of K: every run is somebody's, and no other number of shares would end earlier."""

from __future__ import annotations

from itertools import product

import pytest

from amk.isa.stretch import MOST_SHARES
from amk.schedule.shares import share_count, share_runs


def longest(groups: int, runs: int, sms: int, shares: int) -> int:
    """Runs of the SM that has most: its tasks by the runs of the longest."""
    tasks = [len(share_runs(runs, shares, share)) for share in range(shares) for _ in range(groups)]
    return max(1, -(-len(tasks) // sms)) * max(tasks)


@pytest.mark.parametrize(("groups", "runs", "sms"), list(product((1, 3, 24, 128, 300), (1, 2, 7, 32, 128), (1, 4, 132))))
def test_no_other_number_of_shares_ends_earlier_and_no_smaller_one_as_early(groups: int, runs: int, sms: int) -> None:
    chosen = share_count(groups, runs, sms)
    times = {shares: longest(groups, runs, sms, shares) for shares in range(1, min(runs, MOST_SHARES) + 1)}
    assert chosen == min(times, key=lambda shares: (times[shares], shares))


@pytest.mark.parametrize(("runs", "shares"), [(1, 1), (7, 3), (8, 8), (33, 8), (128, 5)])
def test_shares_take_every_run_once_in_order_and_differ_by_at_most_one(runs: int, shares: int) -> None:
    parts = [share_runs(runs, shares, share) for share in range(shares)]
    assert [run for part in parts for run in part] == list(range(runs))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1 and min(map(len, parts)) > 0


def test_one_matrix_of_llama_1b_on_an_h200() -> None:
    """qkv: 24 groups by 32 runs; 5 shares are 120 tasks of at most 7 runs, 6 shares would be two waves of 6."""
    assert share_count(24, 32, 132) == 5
