"""What the weight streams of a program hold: programs that stream the same bytes share one copy of the weights."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

from amk.isa.matvec import MatVec
from amk.schedule.program import Program


def stream_digest(program: Program) -> str:
    """SHA-256 (64 hex characters) of the weights' tiles on every SM in the order of the stream, and of how each is cut into chunks."""
    machine = program.machine
    cut = [machine.dtype, machine.consumer_warps, machine.stage_bytes]
    matrices = [asdict(matrix) for matrix in program.matrices]
    tiles = [
        [(task.weight, task.tile0, task.tiles) for task in (queue[index] for index in stream) if isinstance(task, MatVec)]
        for queue, stream in zip(program.queues, program.streams, strict=True)
    ]
    return hashlib.sha256(json.dumps([cut, matrices, tiles], sort_keys=True).encode()).hexdigest()
