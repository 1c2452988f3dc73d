"""Pass 5: a tag for every value, and counters: hints for when to begin, or, of a stretch, what orders its tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from amk.isa.abi import NONE
from amk.schedule.graph import AttentionOp, Graph, Op
from amk.schedule.place import Placement


@dataclass(frozen=True)
class Wait:
    """A counter and how many arrivals a token makes at it; NONE and 0 to wait for nothing."""

    counter: int = NONE
    count: int = 0


@dataclass(frozen=True)
class Sync:
    """`tags` of values, from 1 in the order of writing; the counters' names; by op what its tasks wait for and where they arrive."""

    tags: Mapping[str, int]
    counters: tuple[str, ...]
    waits: Mapping[str, Wait]
    done: Mapping[str, int]


def synchronise(graph: Graph, placement: Placement, consumer_warps: int, style: str) -> Sync:
    """Each op waits for all arrivals of the op that writes the last of its inputs.

    With style "tags" there are no counters, unless they order. Nor is there one for instructions that poll the tags themselves.
    """
    tags = {name: tag for tag, name in enumerate((name for op in graph.ops for name in op.writes), start=1)}
    if style == "tags" and not graph.gated:
        return Sync(tags, (), {}, {})
    sources = {op.name: _last_source(graph, op) for op in graph.ops if op.reads and not op.instruction.polls}
    waited = [op for op in graph.ops if op.name in {source.name for source in sources.values()}]
    done = {op.name: i for i, op in enumerate(waited)}
    counts = {op.name: _arrivals(op, placement, consumer_warps) for op in waited}
    waits = {name: Wait(done[source.name], counts[source.name]) for name, source in sources.items()}
    return Sync(tags, tuple(op.name for op in waited), waits, done)


def arrives(op: Op, unit: int) -> bool:
    """Whether the task that begins with `unit` arrives at the op's counter: of attention only the tails do, the last to end."""
    return not isinstance(op, AttentionOp) or unit % op.splits == 0


def _last_source(graph: Graph, op: Op) -> Op:
    """The latest op in queue order that writes an input of `op` (which is not `op` itself)."""
    inputs = {read.value for read in op.reads} - set(op.writes)
    return [other for other in graph.ops if inputs & set(other.writes)][-1]


def _arrivals(op: Op, placement: Placement, consumer_warps: int) -> int:
    tasks = sum(arrives(op, run.start) for run in placement[op.name])
    return tasks * (1 if op.instruction.stored or op.instruction.gated else consumer_warps)
