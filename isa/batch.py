"""A batch: tokens that a machine computes side by side, and how their values lie in the arena.

Each token of a batch has a seat; seats come in blocks of 8, the columns of mma.m16n8k16. A value of a batch has as many packets as that of
one token for each seat, in one of two orders. *Interleaved* is that of the products' operands: a warp reads whole lines. Of fp32 packets,
16 elements of 8 seats are a run of 128 packets; of narrow ones, 8 elements of 8 seats are a run of 32. *By seat* has the seats' vectors one
after another, for attention, which works seat by seat.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from amk.isa.instruction import F32

SEAT_BLOCK = 8  # seats of one product: the N of mma.m16n8k16
WIDE_RUN = 16  # elements of an interleaved run of fp32 packets: the rows of a tile
NARROW_RUN = 8  # elements of a run of narrow packets: what a tile of gate and up rows gives

Ints = npt.NDArray[np.int64]


@cache
def interleaved(elements: int, batch: int, narrow: bool) -> Ints:
    """Where element k of seat s lies among the decoded elements of an interleaved value: [elements, batch]. `elements` fill whole runs."""
    k, seat = np.arange(elements)[:, None], np.arange(batch)[None, :]
    blocks = batch // SEAT_BLOCK
    if narrow:
        run, at = k // NARROW_RUN, k % NARROW_RUN
        return np.asarray(((run * blocks + seat // SEAT_BLOCK) * SEAT_BLOCK + seat % SEAT_BLOCK) * NARROW_RUN + at)
    run, at = k // WIDE_RUN, k % WIDE_RUN
    lane = seat % SEAT_BLOCK * 4 + at // 4
    return np.asarray((run * blocks + seat // SEAT_BLOCK) * WIDE_RUN * SEAT_BLOCK + at % 4 // 2 * 64 + lane * 2 + at % 2)


def interleave(values: F32, narrow: bool) -> F32:
    """[elements, batch], whole runs, as the elements of consecutive packets."""
    out = np.empty(values.size, dtype=np.float32)
    out[interleaved(*values.shape, narrow)] = values
    return out


def deinterleave(packets: F32, batch: int, narrow: bool) -> F32:
    """The inverse of `interleave`."""
    taken: F32 = packets[interleaved(len(packets) // batch, batch, narrow)]
    return taken
