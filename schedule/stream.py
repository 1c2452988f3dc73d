"""What the weight streams of a program hold: programs that stream the same bytes, or take tiles from among them, share one copy of them."""

from __future__ import annotations

from dataclasses import dataclass

from amk.isa.machine import TILE_ROWS
from amk.isa.matvec import MatVec
from amk.schedule.program import Constant, Matrix, Program

Tiles = tuple[tuple[int, int, int], ...]  # (matrix, first tile, tiles) of neighbouring tiles, in the order of the stream


@dataclass(frozen=True)
class Stream:
    """The weights' tiles on every SM in the order of the stream, how each is cut into chunks, and the constants beside them.

    A program that takes tiles of others' streams, wherever they lie, has none of its own (`tiles` is empty).
    """

    cut: tuple[str, int, int]
    matrices: tuple[Matrix, ...]
    constants: tuple[Constant, ...]
    tiles: tuple[Tiles, ...]

    def begins_with(self, other: Stream) -> bool:
        """Whether a program of the other stream finds in this one all that it reads: the same streams, or its matrices in any streams."""
        matrices, constants = self.matrices[: len(other.matrices)], self.constants[: len(other.constants)]
        whole = (self.cut, matrices, constants) == (other.cut, other.matrices, other.constants)
        return whole and (self.tiles == other.tiles if other.tiles else self._holds(len(matrices)))

    def _holds(self, matrices: int) -> bool:
        """Whether every tile of the first `matrices` matrices is in a stream."""
        held = {(matrix, tile) for stream in self.tiles for matrix, first, count in stream for tile in range(first, first + count)}
        return all((i, tile) in held for i in range(matrices) for tile in range(-(-self.matrices[i].rows // TILE_ROWS)))


def stream_of(program: Program) -> Stream:
    machine = program.machine
    tiles = tuple(
        tuple((task.weight, task.tile0, task.tiles) for task in (queue[index] for index in stream) if isinstance(task, MatVec))
        for queue, stream in zip(program.queues, program.streams, strict=True)
    )
    cut = (machine.dtype, machine.consumer_warps, machine.stage_bytes)
    return Stream(cut, program.matrices, program.constants, () if machine.prefill else tiles)
