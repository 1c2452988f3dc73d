"""A stretch: consecutive positions of one sequence, computed side by side, a seat each, and how their values lie in the arena.

Its values carry no tags. All of a value is read, after a counter has said that all of it is there (`Access.gated`): a tag for every word
would double what every SM reads of x. A packet of theirs is 4 bytes.

x of a product is narrow: 16 columns of all seats are a *fragment row*, the B operands of mma.m16n8k16 as the warps read them; within a
value who writes decides in which order its packets count (`X_ORDERS`), for nobody reads a part of it. Other values lie as they count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from amk.isa.batch import SEAT_BLOCK
from amk.isa.instruction import F32, Order
from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, ChunkPlan, Machine

GROUP_TILES = 8  # tiles of one task: a stage holds a run of each of them
GROUP_ROWS = TILE_ROWS * GROUP_TILES
MOST_SHARES = 8  # of K that a product is cut into: who adds them asks for all at once

# Orders of a value x [columns, seats], by who writes it: a seat at a time; some columns of all seats at a time; some columns of 8 seats.
BY_SEAT, BY_COLUMN, BY_HEAD = 0, 1, 2
X_ORDERS: tuple[Order, ...] = ("x by seat", "x by column", "x by head")


@dataclass(frozen=True)
class Run:
    """`count` fragments of a row of K from fragment `first` on, which lie next to each other in a tile, from byte `offset` of it."""

    first: int
    count: int
    offset: int


@cache
def runs(plan: ChunkPlan) -> tuple[Run, ...]:
    """The runs of a tile in the order of the stream: what one warp of a matrix-vector product gets of one chunk."""
    found, offset = [], 0
    for chunk in range(plan.chunks):
        for warp in range(plan.warps):
            count = plan.pieces_in_chunk(chunk, warp)
            if count > 0:
                found.append(Run(plan.first(warp) + chunk * plan.per_chunk, count, offset))
                offset += count * plan.piece.bytes
    return tuple(found)


def padded(columns: int) -> int:
    """Columns of whole fragments."""
    return columns + -columns % 16


def fragment_row_bytes(machine: Machine) -> int:
    """Bytes of 16 columns of every seat's x."""
    return 16 * machine.batch * machine.element_bytes


def slot_bytes(machine: Machine, fragments: int) -> int:
    """Bytes of a ring slot: a run of at most `fragments` fragments of each tile of a task, and the x that goes with it."""
    return fragments * (FRAGMENT_BYTES * GROUP_TILES + fragment_row_bytes(machine))


def ordered(x: F32, order: int, heads: int) -> F32:
    """Elements of x [columns, seats] in the order of its packets; `heads` counts the tasks that share the columns of BY_HEAD."""
    columns, seats = x.shape
    if order == BY_SEAT:
        return np.ascontiguousarray(x.T).ravel()
    if order == BY_COLUMN:
        return x.reshape(columns // 2, 2, seats).transpose(0, 2, 1).ravel()
    parts = x.reshape(heads, columns // heads // 2, 2, seats // SEAT_BLOCK, SEAT_BLOCK)
    return parts.transpose(0, 3, 1, 4, 2).ravel()


def unordered(packets: F32, order: int, heads: int, seats: int) -> F32:
    """The inverse of `ordered`: x [columns, seats]."""
    columns = len(packets) // seats
    if order == BY_SEAT:
        return packets.reshape(seats, columns).T
    if order == BY_COLUMN:
        return packets.reshape(columns // 2, seats, 2).transpose(0, 2, 1).reshape(columns, seats)
    parts = packets.reshape(heads, seats // SEAT_BLOCK, columns // heads // 2, SEAT_BLOCK, 2)
    return parts.transpose(0, 2, 4, 1, 3).reshape(columns, seats)
