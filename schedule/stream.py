"""What the weight streams of a program hold: programs that stream the same bytes, or the first of them, share one copy of the weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

from amk.isa.matvec import MatVec
from amk.schedule.program import Constant, Matrix, Program

Tiles = tuple[tuple[int, int, int], ...]  # (matrix, first tile, tiles) of neighbouring tiles, in the order of the stream


@dataclass(frozen=True)
class Stream:
    """The weights' tiles on every SM in the order of the stream, how each is cut into chunks, and the constants beside them."""

    cut: tuple[str, int, int]
    matrices: tuple[Matrix, ...]
    constants: tuple[Constant, ...]
    tiles: tuple[Tiles, ...]

    def begins_with(self, other: Stream) -> bool:
        """Whether a program of the other stream finds in this one all that it reads, each SM from the beginning of its stream."""
        if self.cut != other.cut or len(self.tiles) != len(other.tiles):
            return False
        matrices, constants = self.matrices[: len(other.matrices)], self.constants[: len(other.constants)]
        whole = (matrices, constants) == (other.matrices, other.constants)
        return whole and all(a[: len(b)] == b for a, b in zip(self.tiles, other.tiles, strict=True))


def stream_of(program: Program) -> Stream:
    machine = program.machine
    tiles = (
        tuple((task.weight, task.tile0, task.tiles) for task in (queue[index] for index in stream) if isinstance(task, MatVec))
        for queue, stream in zip(program.queues, program.streams, strict=True)
    )
    cut = (machine.dtype, machine.consumer_warps, machine.stage_bytes)
    return Stream(cut, program.matrices, program.constants, tuple(tiles))


def stream_digest(program: Program) -> str:
    """SHA-256 (64 hex characters) of the weights' tiles on every SM in the order of the stream, and of how each is cut into chunks."""
    stream = stream_of(program)
    facts = [stream.cut, [asdict(matrix) for matrix in stream.matrices], stream.tiles]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
