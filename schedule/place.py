"""Pass 3: which SM does which unit, and the tasks that follow: units that lie next to each other on an SM are one task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from amk.isa.matmul import X_KEPT
from amk.schedule.fuse import CANDIDATES
from amk.schedule.graph import AttentionOp, Graph, MatVecOp, Op
from amk.schedule.knobs import Assignment
from amk.schedule.rejection import Rejection, reject
from amk.schedule.tile import Tiling

KEPT_SHARE = 1 / 3  # of shared memory x may take where a batch's products keep it, for the ring must have room beside it


@dataclass(frozen=True)
class Run:
    """One task: tiles (columns, units) [start, stop) of its op on `sm`."""

    sm: int
    start: int
    stop: int


Placement = Mapping[str, tuple[Run, ...]]  # tasks of each op, in the order of what they compute


def assignment_problems(graph: Graph, tilings: Mapping[str, Tiling], assignment: Assignment, sms: int) -> Iterator[Rejection]:
    """What is wrong with an explicit map: ops that do not exist, the wrong number of units, SMs that the card does not have."""
    if isinstance(assignment, str):
        return
    for key, chosen in assignment:
        ops = [op for op in graph.ops if key in (op.name, op.kind)]
        if not ops:
            kinds = ", ".join(dict.fromkeys(op.kind for op in graph.ops))
            yield reject(f"sm_assignment.{key}", key, f"one of {kinds}, or one of them in a layer, as in L0.o")
        units = {tilings[op.name].units for op in ops}
        if units - {len(chosen)}:
            counts = " or ".join(map(str, sorted(units)))
            yield reject(f"sm_assignment.{key}", f"{len(chosen)} of them", f"the SM of each of its {counts} units")
        if any(sm >= sms for sm in chosen):
            yield reject(f"sm_assignment.{key}", max(chosen), f"SMs from 0 to {sms - 1}")


def place(graph: Graph, tilings: Mapping[str, Tiling], assignment: Assignment, sms: int, fixed: Placement | None = None) -> Placement:
    """The tasks of every op. An op that an explicit map leaves out is balanced by load; those of `fixed` have their tasks already."""
    explicit = {} if isinstance(assignment, str) else dict(assignment)
    policy = assignment if isinstance(assignment, str) else "load_balance"
    loads = [0] * sms  # bytes that each SM streams in the ops placed so far
    late: set[int] = set()  # SMs whose task ends the phase before: they come last to the next one
    placement = {}
    for op in graph.ops:
        tiling = tilings[op.name]
        if fixed and op.name in fixed:
            placement[op.name] = fixed[op.name]
            continue
        chosen = explicit.get(op.name) or explicit.get(op.kind) or _by_policy(policy, op, tiling, loads, late)
        for sm in chosen:
            loads[sm] += tiling.unit_bytes
        late = {chosen[unit] for unit in range(0, len(chosen), op.splits)} if isinstance(op, AttentionOp) else set()
        placement[op.name] = tuple(_runs(chosen, tiling))
    return placement


def sized_candidates(graph: Graph, placement: Placement) -> Graph:
    """The graph with one (value, row) pair for each head task."""
    heads = [op for op in graph.ops if isinstance(op, MatVecOp) and op.name == "head"]
    packets = sum(2 * op.batch * len(placement[op.name]) for op in heads)
    return replace(graph, values=tuple(replace(v, packets=packets) if v.name == CANDIDATES else v for v in graph.values))


def kept_bytes(shared_bytes: int) -> int:
    """The most that x may take where it is kept."""
    return int(shared_bytes * KEPT_SHARE)


def with_kept_inputs(graph: Graph, placement: Placement, most: int) -> Graph:
    """The graph with products of a batch that keep their inputs: those with a task of several tiles, of at most `most` bytes."""
    return replace(graph, ops=tuple(_kept(op, placement, most) if isinstance(op, MatVecOp) else op for op in graph.ops))


def _kept(op: MatVecOp, placement: Placement, most: int) -> MatVecOp:
    tiles = max(run.stop - run.start for run in placement[op.name])
    keeps = op.batch > 1 and tiles > 1 and 2 * op.batch * op.cols <= most
    return replace(op, flags=op.flags | X_KEPT) if keeps else op


def _by_policy(policy: str, op: Op, tiling: Tiling, loads: list[int], late: set[int]) -> list[int]:
    """The SM of each unit."""
    units, sms = tiling.units, len(loads)
    if policy == "contiguous":
        return [unit * sms // units for unit in range(units)]
    if policy == "round_robin":
        return [unit % sms for unit in range(units)]
    return _spread_attention(op, loads) if isinstance(op, AttentionOp) else _balanced(units, loads, late)


def _balanced(units: int, loads: list[int], late: set[int]) -> list[int]:
    """Contiguous shares that differ by at most one unit, as the phase must balance; the larger go to the least loaded, late SMs last."""
    sms = len(loads)
    share, extra = divmod(units, sms)
    larger = set(sorted(range(sms), key=lambda sm: (sm in late, loads[sm]))[:extra])
    return [sm for sm in range(sms) for _ in range(share + (sm in larger))]


def _spread_attention(op: AttentionOp, loads: list[int]) -> list[int]:
    """Tails, which do more, then the other splits, each on another SM while there are any, the least loaded first."""
    sms = sorted(range(len(loads)), key=loads.__getitem__)
    order = sorted(range(op.units), key=lambda unit: (unit % op.splits != 0, unit))
    rank = {unit: i for i, unit in enumerate(order)}
    return [sms[rank[unit] % len(sms)] for unit in range(len(order))]


def _runs(chosen: list[int] | tuple[int, ...], tiling: Tiling) -> Iterator[Run]:
    first = 0
    for unit in range(1, len(chosen) + 1):
        if unit == len(chosen) or chosen[unit] != chosen[first] or not tiling.mergeable:
            yield Run(chosen[first], *tiling.bounds(first, unit))
            first = unit
