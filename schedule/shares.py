"""How the products of a stretch share K out: few tiles by long runs leave SMs idle, many shares cost their sums' way through memory."""

from __future__ import annotations

from amk.isa.stretch import MOST_SHARES


def share_count(groups: int, runs: int, sms: int) -> int:
    """Shares of K for a matrix of `groups` groups of tiles, each by `runs` runs of K, on `sms` SMs; at most 8, each at least one run.

    Groups times shares are dealt to the SMs in waves. The SM that is last has the least to do, and of equals the fewest shares win.
    """
    return min(range(1, min(runs, MOST_SHARES) + 1), key=lambda shares: (-(-groups * shares // sms) * -(-runs // shares), shares))


def share_runs(runs: int, shares: int, share: int) -> range:
    """The runs of one share: neighbours, and no share has over one more than another."""
    return range(runs * share // shares, runs * (share + 1) // shares)
