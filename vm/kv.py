"""The KV cache of the reference machine: rows by layer and head."""

from __future__ import annotations

from typing import Any

import numpy as np

from amk.isa.instruction import F32
from amk.isa.rounding import round_to
from amk.schedule.program import Program
from amk.schedule.stream import stream_of
from amk.vm.interface import LaunchFailed


class KvRows:
    """K (after norm and RoPE) and V as fp32 arrays [rows, layers, heads, head_dim] of values that the machine's dtype can hold.

    Rows come first so that memory is touched only up to the last position.
    """

    def __init__(self, program: Program) -> None:
        shape = (program.kv.rows, program.kv.layers, program.kv.heads, program.machine.head_dim)
        self.dtype = program.machine.dtype
        self.context = program.machine.context
        self.keys = np.zeros(shape, dtype=np.float32)
        self.values = np.zeros(shape, dtype=np.float32)

    def seed(self, layer: int, keys: Any, values: Any) -> None:
        """Sets rows 0..n-1 of a layer from [heads, n, head_dim] tensors; ValueError for another layer, shape or too many rows."""
        _, _, heads, dim = self.keys.shape
        self._require(layer, 0)
        for name, cache, rows in (("keys", self.keys, keys), ("values", self.values, values)):
            array = _fp32(rows)
            if array.ndim != 3 or (array.shape[0], array.shape[2]) != (heads, dim) or array.shape[1] > self.context:
                raise ValueError(f"{name}: must be [{heads}, at most {self.context}, {dim}], but got {list(array.shape)}")
            cache[: array.shape[1], layer] = round_to(array, self.dtype).swapaxes(0, 1)

    def read(self, layer: int, stop: int) -> tuple[F32, F32]:
        """Copies of rows 0..stop-1 of a layer, each [heads, stop, head_dim]; ValueError for another layer or too many rows."""
        self._require(layer, stop)
        return self.keys[:stop, layer].swapaxes(0, 1).copy(), self.values[:stop, layer].swapaxes(0, 1).copy()

    def _require(self, layer: int, stop: int) -> None:
        require_rows(layer, self.keys.shape[1], stop, self.context)

    def rows(self, layer: int, head: int, start: int, stop: int) -> tuple[F32, F32]:
        return self.keys[start:stop, layer, head], self.values[start:stop, layer, head]

    def write(self, layer: int, head: int, row: int, k: F32, v: F32) -> None:
        self.keys[row, layer, head] = k
        self.values[row, layer, head] = v


def plane(program: Program, layer: int, row: int) -> int:
    """Where a layer of one row of a batch lies in the cache; ValueError for a layer or row that is not there."""
    if not 0 <= row < program.machine.sequences:
        raise ValueError(f"row: must be from 0 to {program.machine.sequences - 1}, but got {row}")
    require_rows(layer, program.layers, 0, program.machine.context)
    return row * program.layers + layer


def require_rows(layer: int, layers: int, stop: int, context: int) -> None:
    """ValueError unless `layer` and rows 0..stop-1 are in the cache."""
    if not 0 <= layer < layers:
        raise ValueError(f"layer: must be from 0 to {layers - 1}, but got {layer}")
    if not 0 <= stop <= context:
        raise ValueError(f"rows: must be at most {context}, but got {stop}")


def has_same_rows(program: Program, beside: Program) -> bool:
    """Whether a program may run on another's weights and KV rows."""
    return program.kv == beside.kv and stream_of(beside).begins_with(stream_of(program))


def require_same_rows(program: Program, beside: Program) -> None:
    """LaunchFailed("mismatch") unless a program may run on another's weights and KV rows."""
    if not has_same_rows(program, beside):
        raise LaunchFailed("mismatch", "the program must have the KV rows and stream the weights of the one beside it, but has others")


def _fp32(rows: Any) -> F32:
    """A torch tensor or array as an fp32 array on the CPU."""
    if hasattr(rows, "detach"):
        rows = rows.detach().float().cpu().numpy()
    return np.asarray(rows, dtype=np.float32)
