"""A graph while its ops are being listed: the matrices and constants of a model come in one order, whoever lists the ops."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from amk.schedule.graph import Graph, Op, Value
from amk.schedule.model import ModelSpec, weight_format
from amk.schedule.program import Constant, Matrix

CONSTANT_ALIGNMENT = 4  # elements: 16 bytes, one vector load
Layout = Literal["stack", "interleave8"]


@dataclass
class GraphBuilder:
    """A program beside another reads its weights: its matrices and constants must be the first of the other's, in the same places."""

    spec: ModelSpec
    batch: int
    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    constants: list[Constant] = field(default_factory=list)

    def graph(self) -> Graph:
        return Graph(tuple(self.ops), tuple(self.values), tuple(self.matrices), tuple(self.constants))

    def matrix(self, name: str, sources: tuple[str, ...], rows: int, cols: int, layout: Layout = "stack") -> Matrix:
        """The stacked (or interleaved) `sources`, of whose weight format all are."""
        self.matrices.append(Matrix(name, sources, layout, rows, cols, weight_format(self.spec, sources[0])))
        return self.matrices[-1]

    def constant(self, name: str, sources: tuple[str, ...], count: int, layout: Layout = "stack") -> str:
        end = max((c.start + c.count for c in self.constants), default=0)
        self.constants.append(Constant(name, sources, layout, end + -end % CONSTANT_ALIGNMENT, count))
        return name

    def bias(self, matrix: Matrix, present: bool) -> str | None:
        """The bias of all rows of a matrix, None where it has none."""
        sources = tuple(f"{source}.bias" for source in matrix.sources)
        return self.constant(f"{matrix.name}.bias", sources, matrix.rows, matrix.layout) if present else None

    def head_gains(self, layer: int) -> tuple[str | None, str | None]:
        """Gains of the norms of q and k heads, None where the model has none."""
        if not self.spec.qk_norm:
            return None, None
        q, k = (self.constant(f"L{layer}.{n}", (f"L{layer}.{n}",), self.spec.head_dim) for n in ("q_norm", "k_norm"))
        return q, k
