"""Pass 4: where each value lies in the arena, under the overwrite rule of docs/machine.md.

A value W may take packets of a value V that was written before it only if every reader of V is an ancestor of every writer of W.
From one token to the next this always holds: every task of a token is an ancestor of its sample, which every task of the next
token comes after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from amk.schedule.fuse import TOKEN
from amk.schedule.graph import Graph, Read, Value

ALIGNMENT_PACKETS = 16  # 128 bytes: a warp reads whole lines
GATED_ALIGNMENT_PACKETS = 1024  # of 4 bytes


@dataclass(frozen=True)
class Arena:
    """The packet offset of every value, and the arena's size."""

    offsets: Mapping[str, int]
    packets: int


@dataclass(frozen=True)
class _Use:
    """Who writes and reads a value: op indices. `replaces` is the value whose packets its writer reads tile by tile (the residual)."""

    value: Value
    writer: int
    readers: frozenset[int]
    replaces: str | None


def allocate(graph: Graph, page_allocation: str) -> Arena:
    """`linear` gives every value packets of its own; `graph_color` lets values overlap that never live together (first fit)."""
    if graph.gated:
        return _in_slots(graph, share=page_allocation != "linear")
    if page_allocation == "linear":
        return _linear(graph)
    uses, before = _uses(graph), ancestors(graph)
    offsets: dict[str, int] = {}
    for use in sorted(uses.values(), key=lambda u: u.writer):
        blocked = [u for u in uses.values() if u.value.name in offsets and not _may_replace(u, use, before)]
        in_place = _in_place(use, blocked, offsets, uses, before)
        offsets[use.value.name] = _first_gap(use.value, blocked, offsets) if in_place is None else in_place
    return Arena(offsets, max(offsets[name] + _aligned(use.value) for name, use in uses.items()))


def ancestors(graph: Graph) -> list[frozenset[int]]:
    """For each op the ops all of whose tasks come before every task of it, within one token.

    A task that reads all of a value comes after every task of its writer and after everything that these tasks together come after.
    A task that reads a part of it comes at least after what every one of them comes after.
    """
    writer = {name: i for i, op in enumerate(graph.ops) for name in op.writes}
    every: list[frozenset[int]] = []  # before every task of the op
    together: list[frozenset[int]] = []  # before at least one task of it
    for i, op in enumerate(graph.ops):
        inputs = [(read, writer[read.value]) for read in op.reads if not read.carried and writer[read.value] != i]
        together.append(frozenset().union(*(together[w] | {w} for _, w in inputs)))
        every.append(frozenset().union(*(together[w] | {w} if read.share == "whole" else every[w] for read, w in inputs)))
    return every


def _uses(graph: Graph) -> dict[str, _Use]:
    writers = {name: i for i, op in enumerate(graph.ops) for name in op.writes}
    readers: dict[str, set[int]] = {v.name: set() for v in graph.values}
    residual: dict[str, str] = {}
    for i, op in enumerate(graph.ops):
        for read in op.reads:
            readers[read.value].add(i)
            residual |= {name: read.value for name in op.writes if _is_own(read)}
    return {v.name: _Use(v, writers[v.name], frozenset(readers[v.name]), residual.get(v.name)) for v in graph.values}


def _is_own(read: Read) -> bool:
    return read.share == "own"


def _may_replace(old: _Use, new: _Use, before: list[frozenset[int]]) -> bool:
    """Whether `new` may take packets of `old`. The sampled token outlives its token, and unread packets prove nothing: both stay alone."""
    alone = TOKEN in (old.value.name, new.value.name) or old.value.padded or new.value.padded
    return not alone and old.readers <= before[new.writer]


def _in_place(use: _Use, blocked: list[_Use], offsets: dict[str, int], uses: dict[str, _Use], before: list[frozenset[int]]) -> int | None:
    """The packets of the residual if nothing else forbids them: each tile's write follows its own read."""
    if use.replaces is None:
        return None
    old = uses[use.replaces]
    others = [u for u in blocked if u is not old]
    start = offsets[use.replaces]
    free = all(offsets[u.value.name] >= start + _aligned(use.value) or offsets[u.value.name] + _aligned(u.value) <= start for u in others)
    in_place = free and old.value.packets == use.value.packets and old.readers - {use.writer} <= before[use.writer]
    return start if in_place else None


def _first_gap(value: Value, blocked: list[_Use], offsets: dict[str, int]) -> int:
    at = 0
    for start, size in sorted((offsets[u.value.name], _aligned(u.value)) for u in blocked):
        if at + _aligned(value) <= start:
            break
        at = max(at, start + size)
    return at


def _linear(graph: Graph) -> Arena:
    offsets, at = {}, 0
    for value in graph.values:
        offsets[value.name] = at
        at += _aligned(value)
    return Arena(offsets, at)


def _in_slots(graph: Graph, share: bool) -> Arena:
    """Values of a stretch in slots: those that share one have its kind and all of its packets, for x is permuted within itself."""
    uses, before = _uses(graph), ancestors(graph)
    slots: list[list[_Use]] = []
    for use in sorted(uses.values(), key=lambda u: u.writer):
        taken = next((slot for slot in slots if share and all(_may_follow(old, use, before) for old in slot)), None)
        if taken is None:
            slots.append([use])
        else:
            taken.append(use)
    sizes = [slot[0].value.packets + -slot[0].value.packets % GATED_ALIGNMENT_PACKETS for slot in slots]
    offsets = {use.value.name: sum(sizes[:i]) for i, slot in enumerate(slots) for use in slot}
    return Arena(offsets, sum(sizes))


def _may_follow(old: _Use, new: _Use, before: list[frozenset[int]]) -> bool:
    """Whether `new` may take all packets of `old`: its readers come before, or, of a residual, each before it writes what it has read."""
    same = (old.value.kind, old.value.packets) == (new.value.kind, new.value.packets)
    own = {new.writer} if new.replaces == old.value.name else set()
    return same and old.readers - own <= before[new.writer]


def _aligned(value: Value) -> int:
    return value.packets + -value.packets % ALIGNMENT_PACKETS
