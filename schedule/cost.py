"""What a token costs: bytes it must stream, the floor they set, and a predicted latency with its error against measurements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from amk.isa.attention import Attention
from amk.isa.gemm_glu import GemmGlu
from amk.isa.gemv_glu import GemvGlu
from amk.isa.instruction import Instruction
from amk.isa.machine import Machine, chunk_plan
from amk.isa.matvec import MatVec
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_glu import StretchGlu
from amk.isa.stretch_matmul import StretchMatMul
from amk.isa.weight_format import format_of
from amk.schedule.program import Program
from amk.schedule.targets import Target

# Fitted to the figures of H200s (132 SMs, 1980 MHz) in results/ at b60f01a, ROWS_COST at 27118ee: see `latency_us`.
READ_SHARE = 0.97  # what a plain read reaches of the data sheet's bandwidth
BOUNDARY_US = 1.44  # from the last publish of a phase to the first product of the next: publish, counter, poll, read
CHUNK_CYCLES = 290  # for the consumers of an SM to use up 16 KiB of 16-bit weights
CODE_COST = {8: 2.3, 4: 3.1}  # of as many bytes of codes, over that, by their bits; x as fixed-point digits is in it
ROWS_COST = 2.8  # the same where warps share out tiles whole
CHUNK_BYTES = 16384
COPY_US = 1.0  # one bulk copy under load, from issue to arrival
REFERENCE_MHZ = 1980

F64 = npt.NDArray[np.float64]


def streamed_bytes(program: Program, position: int) -> int:
    """Bytes that a token at `position`, or a stretch from it on, must read: every matrix once (of a quantised one codes, scales and zeros),
    embedding rows, KV rows before the position; no padding.
    """
    machine = program.machine
    rows = sum(_kv_rows(task, position) for queue in program.queues for task in queue)
    embedded = machine.hidden * (machine.batch if machine.prefill else 1)
    return _matrix_bytes(program) + machine.element_bytes * (embedded + 2 * rows * machine.head_dim)


def _kv_rows(task: Instruction, position: int) -> int:
    """Old rows that the KV head of a tail task, or of the first seats of a stretch, is read for; new rows are written, not read."""
    if not (isinstance(task, Attention) and task.split == 0 or isinstance(task, StretchAttention) and task.seat0 == 0):
        return 0
    return min(position, task.window - 1) if task.window else position


def _matrix_bytes(program: Program) -> int:
    """Bytes of all matrices without the rows that pad interleaved ones.

    An interleaved matrix has twice as many real rows as the reader of its product has columns.
    """
    tasks = [task for queue in program.queues for task in queue if isinstance(task, MatVec | StretchMatMul)]
    cols_of_reader = {task.x_tag: task.cols for task in tasks}
    padded = {
        task.weight: 2 * cols_of_reader.get(task.out_tag, task.rows // 2)
        for task in tasks
        if isinstance(task, GemvGlu | GemmGlu | StretchGlu)
    }
    element = program.machine.element_bytes
    return sum(
        matrix.weights.matrix_bytes(rows, matrix.cols) if matrix.weights else element * rows * matrix.cols
        for rows, matrix in ((padded.get(i, matrix.rows), matrix) for i, matrix in enumerate(program.matrices))
    )


def floor_us(program: Program, position: int, bandwidth_gbs: float) -> float:
    """The time in which `streamed_bytes` can be read at a bandwidth (GB/s, 10^9): no token is faster."""
    return streamed_bytes(program, position) / bandwidth_gbs / 1e3


def latency_us(program: Program, target: Target, position: int, bandwidth: float | None = None) -> float:
    """Predicted time of one token in a long launch, never below the floor. `bandwidth` in GB/s; None takes 97 % of the data sheet's.

    Phases follow each other: a phase ends when its slowest SM has streamed and used up its share. Bandwidth is shared evenly, so an
    SM streams at 1/sms of it (or at what its copies in flight sustain), also while it waits at a boundary, until its ring is full. The
    constants were fitted to figures of H200s (1B, 8B and SmolLM2-135M, every knob; dev/cost_error.py shows the errors). What the
    model does not know: skew between SMs, polling, what copies make of others' latency and so what a throttle gains, and what a large
    `N_tile` costs by leaving SMs idle.
    """
    gbs = bandwidth if bandwidth is not None else READ_SHARE * target.bandwidth_gbs
    m, clock = program.machine, REFERENCE_MHZ / target.clock_mhz
    rate = min(gbs * 1e3 / m.sms, m.inflight * m.slot_bytes / COPY_US)  # bytes per us of one SM
    phases, used = _phase_bytes(program, position)
    use = CHUNK_CYCLES / target.clock_mhz / CHUNK_BYTES  # us per byte
    ahead: F64 = np.zeros(m.sms)
    first, ahead = _token(phases, used, ahead, rate, use, BOUNDARY_US * clock, float(m.stages * m.slot_bytes))
    steady, _ = _token(phases, used, ahead, rate, use, BOUNDARY_US * clock, float(m.stages * m.slot_bytes))
    return max(steady, floor_us(program, position, gbs))


def _token(phases: F64, used: F64, ahead: F64, rate: float, use: float, boundary: float, ring: float) -> tuple[float, F64]:
    """Time of a token whose SMs begin with `ahead` bytes landed in their rings, and what is ahead at its end."""
    total = 0.0
    for need, eaten in zip(phases, used, strict=True):
        ahead = np.minimum(ring, ahead + boundary * rate)
        phase = float(np.maximum(eaten * use, (need - ahead) / rate).max())
        ahead = np.clip(ahead + phase * rate - need, 0, ring)
        total += boundary + max(phase, 0.0)
    return total, ahead


def _phase_bytes(program: Program, position: int) -> tuple[F64, F64]:
    """[phases, sms] bytes that each SM streams (padding included) in each phase: tasks that are equally deep in the chain of tags.

    And the bytes of 16-bit weights that cost as much to use up.
    """
    tasks = [(sm, task, *_tags(task, program.machine, position)) for sm, queue in enumerate(program.queues) for task in queue]
    depth = _depths([(reads, writes) for _, _, reads, writes in tasks])
    streamed: F64 = np.zeros((max(depth.values(), default=0) + 1, program.machine.sms))
    used = np.zeros_like(streamed)
    for sm, task, _, writes in tasks:
        for tag in writes[:1]:
            found = _task_bytes(task, program.machine, position)
            streamed[depth[tag], sm] += found
            used[depth[tag], sm] += found * _use_cost(task)
    return streamed, used


def _use_cost(task: Instruction) -> float:
    """What a byte that a task streams costs its consumers, over a byte of 16-bit weights."""
    if task.by_rows:
        return ROWS_COST
    weights = format_of(task.flags) if isinstance(task, MatVec) else None
    return CODE_COST[weights.bits] if weights else 1.0


def _tags(task: Instruction, machine: Machine, position: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Tags that a task reads and publishes in this token. Products state theirs: listing each of their tiles would take long."""
    if isinstance(task, MatVec):
        return (task.x_tag,), (task.out_tag,)
    reads = {access.tag for access in task.reads(machine, position) if not access.carried}
    return tuple(reads), tuple({access.tag for access in task.writes(machine, position)})


def _depths(edges: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[int, int]:
    """How many boundaries lie before each tag. Tags are numbered in the order in which they are published."""
    sources: defaultdict[int, set[int]] = defaultdict(set)
    for reads, writes in edges:
        for tag in writes:
            sources[tag].update(reads)
    depth: dict[int, int] = {}
    for tag in sorted(sources):
        depth[tag] = max((depth[source] + 1 for source in sources[tag] if source in depth), default=0)
    return depth


def _task_bytes(task: Instruction, machine: Machine, position: int) -> int:
    if isinstance(task, MatVec):
        return task.tiles * _tile_bytes(machine, task.cols, task.flags)
    return sum(task.chunk_bytes(machine, position))


@cache
def _tile_bytes(machine: Machine, cols: int, flags: int) -> int:
    return chunk_plan(machine, cols, format_of(flags)).tile_bytes


@dataclass(frozen=True)
class ErrorReport:
    """Predictions against measurements, in percent of the measured.

    A `bias_pct` above 0 predicts too slow; `rank` is Spearman's correlation, nan where either side is constant.
    """

    points: int
    mean_abs_pct: float
    bias_pct: float
    worst_pct: float
    rank: float


def error_report(pairs: Sequence[tuple[float, float]]) -> ErrorReport:
    """The error of (predicted, measured) latencies; ValueError where there are none or a measured one is not positive."""
    if not pairs or min(measured for _, measured in pairs) <= 0:
        raise ValueError(f"pairs: must be (predicted, measured) latencies above 0, but got {list(pairs)[:4]}")
    predicted, measured = np.asarray(pairs, dtype=np.float64).T
    error = 100 * (predicted - measured) / measured
    worst = float(error[np.abs(error).argmax()])
    return ErrorReport(len(pairs), float(np.abs(error).mean()), float(error.mean()), worst, _spearman(predicted, measured))


def _spearman(a: F64, b: F64) -> float:
    ranks = _ranks(a), _ranks(b)
    spread = float(np.std(ranks[0]) * np.std(ranks[1]))
    return float(np.mean((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())) / spread) if spread else float("nan")


def _ranks(values: F64) -> Any:
    """Ranks from 0; equal values share the mean of theirs."""
    below = (values[:, None] > values[None, :]).sum(axis=1)
    return below + ((values[:, None] == values[None, :]).sum(axis=1) - 1) / 2
