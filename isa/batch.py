"""A batch: tokens that a machine computes side by side, and how their values lie in the arena.

Each token of a batch has a seat; seats come in blocks of 8, the columns of mma.m16n8k16. A value of a batch has as many packets as that of
one token for each seat, in one of two orders. *Interleaved* is that of the products' operands, of narrow packets alone: 8 elements of 8
seats are a run of 32 packets, and a warp reads whole lines. *By seat* has the seats' vectors one after another, for attention, which works
seat by seat.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt

from amk.isa.instruction import F32

SEAT_BLOCK = 8  # seats of one product: the N of mma.m16n8k16
MOST_SEATS = 4 * SEAT_BLOCK  # of a product, which has sums for as many blocks; a stretch's products have more
RUN = 8  # elements of an interleaved run: what a tile of gate and up rows gives

Ints = npt.NDArray[np.int64]


@cache
def interleaved(elements: int, batch: int) -> Ints:
    """Where element k of seat s lies among the decoded elements of an interleaved value: [elements, batch]. `elements` fill whole runs."""
    k, seat = np.arange(elements)[:, None], np.arange(batch)[None, :]
    return np.asarray((k // RUN * batch + seat) * RUN + k % RUN)


def interleave(values: F32) -> F32:
    """[elements, batch], whole runs, as the elements of consecutive packets."""
    out = np.empty(values.size, dtype=np.float32)
    out[interleaved(*values.shape)] = values
    return out


def deinterleave(packets: F32, batch: int) -> F32:
    """The inverse of `interleave`."""
    taken: F32 = packets[interleaved(len(packets) // batch, batch)]
    return taken
