"""What the two products of a stretch share: a group of 8 tiles of the matrix times x of every seat, over some of the runs of K."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.instruction import F32, Access, Instruction, Memory
from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, ChunkPlan, Machine, chunk_plan
from amk.isa.rounding import round_to
from amk.isa.stretch import X_ORDERS, Run, fragment_row_bytes, padded, runs, unordered


@dataclass(frozen=True, kw_only=True)
class StretchMatMul(Instruction):
    """Tiles [tile0, tile0 + tiles) of matrix `weight`, at most 8, by runs [run0, run0 + runs) of K (isa.stretch.runs).

    x of `cols` columns, in order `x_order`, is all of `x_buf` from packet 0 on. The feeder streams a run of each tile, wherever the weights
    of the program beside lie, and the run's columns of x behind it.
    """

    weight: U16
    shape: U16
    x_buf: U16
    x_tag: U16
    out_buf: U16
    out_tag: U16
    tile0: U16
    tiles: U16
    run0: U16
    runs: U16
    x_order: U16
    batch: U16
    cols: I32
    rows: I32

    streamed: ClassVar[bool] = True
    batched: ClassVar[bool] = True
    gated: ClassVar[bool] = True

    def plan(self, machine: Machine) -> ChunkPlan:
        return chunk_plan(machine, self.cols)

    def own_runs(self, machine: Machine) -> tuple[Run, ...]:
        return runs(self.plan(machine))[self.run0 : self.run0 + self.runs]

    def reads(self, machine: Machine, position: int) -> list[Access]:
        packets = padded(self.cols) * self.batch // machine.narrow
        return [Access(self.x_buf, 0, packets, self.x_tag, "narrow", gated=True, order=X_ORDERS[self.x_order])]

    def chunk_bytes(self, machine: Machine, position: int) -> list[int]:
        return [run.count * (self.tiles * FRAGMENT_BYTES + fragment_row_bytes(machine)) for run in self.own_runs(machine)]

    def product(self, memory: Memory) -> F32:
        """[16 tiles, batch]; rows past the matrix are zero."""
        machine = memory.machine
        x = unordered(memory.read(self.reads(machine, 0)[0]), self.x_order, machine.kv_heads, self.batch)
        columns = np.concatenate([np.arange(16 * run.first, 16 * (run.first + run.count)) for run in self.own_runs(machine)])
        columns = columns[columns < self.cols]
        first = self.tile0 * TILE_ROWS
        w = memory.matrix(self.weight)[first : min(self.rows, first + self.tiles * TILE_ROWS)]
        out = np.zeros((self.tiles * TILE_ROWS, self.batch), dtype=np.float32)
        out[: len(w)] = w[:, columns] @ round_to(x[columns], machine.dtype)
        return out
