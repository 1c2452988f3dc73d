"""How the products of a stretch share K out: few tiles by long runs leave SMs idle, many shares cost their sums' way through memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from amk.isa.stretch import MOST_SHARES


def share_count(groups: int, runs: Sequence[int], sms: int) -> int:
    """Shares of K, at most 8 and none empty, for a matrix of `groups` groups of tiles on `sms` SMs. `runs`: fragments of each run.

    Groups times shares are dealt to the SMs in waves. The SM that is last has the least to do, and of equals the fewest shares win.
    """

    def last(shares: int) -> int:
        """Fragments of a row of K that the SM with the most takes."""
        return -(-groups * shares // sms) * max(sum(runs[i] for i in share_runs(runs, shares, share)) for share in range(shares))

    possible = [n for n in range(1, min(len(runs), MOST_SHARES) + 1) if all(share_runs(runs, n, share) for share in range(n))]
    return min(possible, key=lambda shares: (last(shares), shares))


def share_runs(runs: Sequence[int], shares: int, share: int) -> range:
    """The runs of one share: neighbours, which end before the share of all fragments that is due to it and those before it."""
    ends = [0, *accumulate(runs)]
    first, stop = (bisect_right(ends, ends[-1] * n // shares) - 1 for n in (share, share + 1))
    return range(first, stop)
