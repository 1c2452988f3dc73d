"""What the names of a graph mean in a program: buffers, constants, matrices, compiled shapes, tags and counters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from amk.isa.abi import NONE
from amk.schedule.graph import Graph, MatVecOp, Op, StretchMatMulOp
from amk.schedule.program import MatVecShape
from amk.schedule.synchronise import Sync, Wait, arrives


class Hints(TypedDict):
    wait_counter: int
    wait_count: int
    done_counter: int


@dataclass(frozen=True)
class Names:
    """Where every name of the graph went."""

    buffers: Mapping[str, int]
    constants: Mapping[str, int]
    matrices: Mapping[str, int]
    shapes: tuple[MatVecShape, ...]
    sync: Sync
    unit_rows: int
    packets: Mapping[str, int]
    seats: Mapping[str, tuple[int, ...]]  # the buffer of each seat of a value that lies by seat, and of others the value's own

    def constant(self, name: str | None) -> int:
        return -1 if name is None else self.constants[name]

    def hints(self, op: Op, unit: int) -> Hints:
        wait = self.sync.waits.get(op.name, Wait())
        done = self.sync.done.get(op.name, NONE) if arrives(op, unit) else NONE
        return {"wait_counter": wait.counter, "wait_count": wait.count, "done_counter": done}


def matvec_shapes(graph: Graph) -> tuple[MatVecShape, ...]:
    """The compiled variants that the program needs, each once."""
    return tuple(dict.fromkeys(shape for op in graph.ops if (shape := shape_of(op)) is not None))


def shape_of(op: Op) -> MatVecShape | None:
    """The variant of a product, None of other ops."""
    if isinstance(op, StretchMatMulOp):
        return MatVecShape(op.cols, 0)
    return MatVecShape(op.cols, op.flags) if isinstance(op, MatVecOp) else None


def resolve_names(graph: Graph, sync: Sync, unit_rows: int) -> Names:
    buffers = {value.name: i for i, value in enumerate(graph.values)}
    seats, views = {}, len(graph.values)
    for value in graph.values:
        own = value.seats if value.seats > 1 else 0
        seats[value.name] = tuple(range(views, views + own)) or (buffers[value.name],)
        views += own
    return Names(
        buffers=buffers,
        constants={constant.name: constant.start for constant in graph.constants},
        matrices={matrix.name: i for i, matrix in enumerate(graph.matrices)},
        shapes=matvec_shapes(graph),
        sync=sync,
        unit_rows=unit_rows,
        packets={value.name: value.packets for value in graph.values},
        seats=seats,
    )
