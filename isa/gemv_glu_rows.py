"""gemv_glu_rows: gemv_glu of 4-bit codes whose consumer warps multiply a tile each, not a slice of every tile's columns, and publish it.

It means what gemv_glu means, and the proof takes it for one: docs/machine.md says why it may.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from amk.isa.gemv_glu import GemvGlu
from amk.isa.machine import Machine, chunk_plan
from amk.isa.weight_format import format_known, format_of

FACTS_BYTES = 8  # of a slice of x: what its lowest digit is worth, and its sum of squares
GROUP_FACTS_BYTES = 8  # of a group of a slice, where codes have zeros: its sum, as two lanes have it


def rows_possible(machine: Machine, cols: int, flags: int) -> bool:
    """Whether warps may share out the tiles of a product whole: codes of 4 bits in groups, one chunk a tile, as many pieces a warp."""
    weights = format_of(flags) if format_known(flags) else None
    if weights is None or weights.bits != 4 or not weights.group or cols < 1:
        return False
    try:
        plan = chunk_plan(machine, cols, weights)
    except ValueError:  # a stage holds no piece a warp
        return False
    return plan.chunks == 1 and plan.high_warps == 0


@dataclass(frozen=True, kw_only=True)
class GemvGluRows(GemvGlu):
    stem: ClassVar[str] = "gemv_glu_rows"
    by_rows: ClassVar[bool] = True

    @classmethod
    def of(cls, task: GemvGlu) -> GemvGluRows:
        """The same product by rows."""
        return cls(**{field.name: getattr(task, field.name) for field in fields(task)})

    def shared_bytes(self, machine: Machine) -> int:
        """Digits of x as of gemv_glu; behind a warp's lies what all warps need besides. Each warp's share is of whole 16 bytes."""
        weights, warps, plan = format_of(self.flags), machine.consumer_warps, self.plan(machine)
        digits = super().shared_bytes(machine) // warps
        groups = plan.high * plan.piece.columns // weights.group if weights and weights.asymmetric and weights.group else 1
        share = digits + -digits % 8 + FACTS_BYTES + GROUP_FACTS_BYTES * groups
        return warps * (share + -share % 16)
