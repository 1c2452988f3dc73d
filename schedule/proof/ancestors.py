"""What each data node comes after, through checked packets only: docs/machine.md, "Values and tags".

A node's publishes come after its reads (and those of its task's earlier nodes); a read comes after the publish that it checks. Program
order between tasks and counters order nothing. Nodes are ranked so that those needed late come late; ancestors are then nearly a prefix
of the ranks, and a set is a prefix `[0, base)` and a bitset above it. Nodes that read the same groups share one set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from amk.schedule.proof.packets import Matching
from amk.schedule.proof.subject import Ints
from amk.schedule.proof.waits import Nodes, Order

SET_BYTES = 1 << 30  # that all bitsets together may take


class Ranks(NamedTuple):
    """A set of ranks: all below `base`, and base + i for every bit i of `bits` (whose bit 0 is clear)."""

    base: int
    bits: int

    def holds(self, rank: int) -> bool:
        return rank < self.base or bool(self.bits >> (rank - self.base) & 1)

    def lacking(self, low: int, mask: int) -> int:
        """Of the ranks low + i for every bit i of `mask`, those not in the set, as bits above `base`."""
        shift = self.base - low
        return (mask >> shift if shift >= 0 else mask << -shift) & ~self.bits


EMPTY = Ranks(0, 0)


def ranks(base: int, bits: int) -> Ranks:
    """The set with its prefix as long as can be."""
    if bits & 1:
        full = (~bits & (bits + 1)).bit_length() - 1
        return Ranks(base + full, bits >> full)
    return Ranks(base, bits)


def union(sets: list[Ranks]) -> Ranks:
    if len(sets) == 1:
        return sets[0]
    base = max((s.base for s in sets), default=0)
    bits = 0
    for s in sets:
        bits |= s.bits >> (base - s.base)
    return ranks(base, bits)


def with_ranks(s: Ranks, more: list[int]) -> Ranks:
    bits = s.bits
    for rank in more:
        if rank >= s.base:
            bits |= 1 << (rank - s.base)
    return ranks(s.base, bits)


@dataclass(frozen=True)
class Ancestors:
    """`rank[node]`; `before[node]` the ranks of its ancestors; `carries[node]` the carried groups that it or an ancestor reads, a bit each.

    `after_group[g]` are the publishers of a group and their ancestors: what a read of it comes after. `carried_groups` number the bits.
    """

    rank: Ints
    before: list[Ranks]
    carries: list[int]
    after_group: dict[int, Ranks]
    carried_groups: list[int]

    def last_token(self, node: int) -> Ranks:
        """Ranks of the nodes of the token before that come before a node."""
        carried = self.carries[node]
        return union([self.after_group[g] for bit, g in enumerate(self.carried_groups) if carried >> bit & 1])


class _Edges(NamedTuple):
    """The bipartite data graph: for each node the groups it publishes to and reads, for each group its publishers and readers."""

    feeds: list[list[int]]
    reads: list[list[int]]
    publishers: list[list[int]]
    readers: list[list[int]]


def find_ancestors(m: Matching, nodes: Nodes, order: Order) -> Ancestors | None:
    """The ancestors of every node, None if the sets do not fit SET_BYTES."""
    edges = _edges(m, nodes, order)
    by_time = np.argsort(order.at, kind="stable").tolist()
    chained = (np.arange(len(nodes)) > nodes.first[nodes.task]).tolist()
    depth = _depths(by_time, edges, chained, m.groups.carried.tolist())
    by_rank = np.lexsort((order.at, -np.array(depth, dtype=np.int64))).tolist()
    rank = np.zeros(len(nodes), dtype=np.int64)
    rank[by_rank] = np.arange(len(nodes))
    return _sweep(by_rank, rank, edges, chained, m.groups.carried.tolist())


def _edges(m: Matching, nodes: Nodes, order: Order) -> _Edges:
    n, g = len(nodes), len(m.groups)
    (a, b), (c, d) = order.sources, order.sinks
    return _Edges(_lists(a, b, n), _lists(d, c, n), _lists(b, a, g), _lists(c, d, g))


def _lists(owner: Ints, value: Ints, size: int) -> list[list[int]]:
    order = np.argsort(owner, kind="stable")
    values: list[int] = value[order].tolist()
    offset = np.searchsorted(owner[order], np.arange(size + 1)).tolist()
    return [values[a:b] for a, b in zip(offset[:-1], offset[1:], strict=True)]


def _depths(by_time: list[int], edges: _Edges, chained: list[bool], carried: list[bool]) -> list[int]:
    """The longest way from each node to one whose publishes nobody reads in this token."""
    depth = [0] * len(by_time)
    group_depth: list[int] = [-1] * len(edges.readers)
    for node in reversed(by_time):
        deepest = depth[node]
        for group in edges.feeds[node]:
            if carried[group]:
                continue
            if group_depth[group] < 0:
                group_depth[group] = 1 + max(depth[reader] for reader in edges.readers[group])
            deepest = max(deepest, group_depth[group])
        depth[node] = deepest
        if chained[node]:
            depth[node - 1] = max(depth[node - 1], deepest + 1)
    return depth


def _sweep(by_rank: list[int], rank: Ints, edges: _Edges, chained: list[bool], carried: list[bool]) -> Ancestors | None:
    ranked: list[int] = rank.tolist()
    before = [EMPTY] * len(by_rank)
    carries = [0] * len(by_rank)
    after_group: dict[int, Ranks] = {}
    group_carries: dict[int, int] = {}
    carried_groups = [g for g, is_carried in enumerate(carried) if is_carried]
    bit = {g: 1 << i for i, g in enumerate(carried_groups)}
    shared: dict[tuple[int, ...], Ranks] = {}
    room = SET_BYTES * 8

    def settle(group: int) -> Ranks:
        publishers = edges.publishers[group]
        distinct = {id(s): s for s in (before[p] for p in publishers)}
        return with_ranks(union(list(distinct.values())), [ranked[p] for p in publishers])

    for node in by_rank:
        now = [g for g in edges.reads[node] if not carried[g]]
        for group in now:
            if group not in after_group:
                after_group[group] = settle(group)
                room -= after_group[group].bits.bit_length()
                group_carries[group] = _all(carries[p] for p in edges.publishers[group])
        key = tuple(now)
        if key not in shared:
            shared[key] = union([after_group[g] for g in now])
            room -= shared[key].bits.bit_length() if len(now) > 1 else 0
        before[node] = shared[key]
        carries[node] = _all(bit[g] if carried[g] else group_carries[g] for g in edges.reads[node])
        if chained[node]:
            before[node] = with_ranks(union([shared[key], before[node - 1]]), [ranked[node - 1]])
            carries[node] |= carries[node - 1]
            room -= before[node].bits.bit_length()
        if room < 0:
            return None
    after_group |= {g: settle(g) for g in carried_groups}
    return Ancestors(rank, before, carries, after_group, carried_groups)


def _all(keys: Iterable[int]) -> int:
    joined = 0
    for key in keys:
        joined |= key
    return joined
