"""A program's launch laid flat: what each actor of each SM reads, streams and publishes at each token, in packets of the arena."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from amk.isa.attention import Attention
from amk.isa.instruction import Access, Instruction
from amk.isa.machine import Machine
from amk.isa.matmul import X_BY_SEAT, MatMul
from amk.isa.matvec import MatVec
from amk.schedule.program import Program


@dataclass(frozen=True, slots=True)
class Touch:
    """Arena packets [lo, hi) that a read expects, or a publish leaves, with a tag."""

    lo: int
    hi: int
    tag: int
    carried: bool = False


@dataclass(frozen=True, slots=True)
class Step:
    """One task at one position.

    `warp_reads[w]` are the consumer reads of warp w, of a task that `rereads` once for every tile; `tile_reads[j]` the storer reads of
    publish j; `fed_reads` what the feeder copies of the arena into the task's chunks. `publishes` are in order, of a stored task one a
    tile; one may touch several places, or none. `chunks` counts the task's chunks, for every tile the same number.
    """

    sm: int
    index: int
    task: Instruction
    skipped: bool
    warp_reads: tuple[tuple[Touch, ...], ...]
    tile_reads: tuple[tuple[Touch, ...], ...]
    publishes: tuple[tuple[Touch, ...], ...]
    chunks: int
    fed_reads: tuple[Touch, ...] = ()
    rereads: bool = False

    @property
    def name(self) -> str:
        return f"({self.sm}, {self.index}) {self.task.stem}"


Token: TypeAlias = tuple[tuple[Step, ...], ...]  # steps of each SM, in queue order
Positions: TypeAlias = tuple[int, ...]  # of each seat


def steps_at(program: Program, positions: Positions) -> Token:
    """Every task of the program with its seats at `positions`; a task's own errors (ValueError) come through."""
    offsets = [buffer.offset for buffer in program.buffers]
    return tuple(
        tuple(_step(program.machine, offsets, sm, index, task, positions[_seat(program, task)]) for index, task in enumerate(queue))
        for sm, queue in enumerate(program.queues)
    )


def _seat(program: Program, task: Instruction) -> int:
    """Whose position a task is at: that of the seat whose plane of the KV cache it names; tasks for all seats touch the same at all."""
    layers = max(1, program.kv.layers // program.machine.batch)
    return task.layer // layers % program.machine.batch if isinstance(task, Attention) else 0


def _step(machine: Machine, offsets: list[int], sm: int, index: int, task: Instruction, position: int) -> Step:
    reads, writes = task.reads(machine, position), task.writes(machine, position)
    fed = tuple(_touch(offsets, access) for access in reads) if task.gated and task.streamed else ()
    consumer = [access for access in reads if access.actor == "consumer" and access.tile == 0 and not fed]
    warps = tuple(
        tuple(touch for access in consumer if (touch := _share(machine, offsets, task, access, warp)).lo < touch.hi)
        for warp in range(machine.consumer_warps)
    )
    if isinstance(task, MatVec):
        groups = [[access for access in writes if access.tile == tile] for tile in range(task.tiles)]
    else:
        groups = [[access] for access in writes]
    tiles = tuple(
        tuple(_touch(offsets, access) for access in reads if access.actor == "storer" and access.tile == tile)
        for tile in range(len(groups))
    )
    publishes = tuple(tuple(touch for a in group if (touch := _touch(offsets, a)).lo < touch.hi) for group in groups)
    chunks = len(task.chunk_bytes(machine, position)) if task.streamed else 0
    rereads = isinstance(task, MatVec) and task.rereads(machine)
    return Step(sm, index, task, not reads and not writes, warps, tiles, publishes, chunks, fed, rereads)


def _touch(offsets: list[int], access: Access) -> Touch:
    base = offsets[access.buffer]
    return Touch(base + access.start, base + access.stop, access.tag, access.carried)


def _share(machine: Machine, offsets: list[int], task: Instruction, access: Access, warp: int) -> Touch:
    """What one consumer warp reads of a consumer access: its own K slice of a product's x, else all of it."""
    whole = _touch(offsets, access)
    if not isinstance(task, MatVec):
        return whole
    plan = task.plan(machine)
    packets = plan.piece.columns // (machine.narrow if access.kind == "narrow" else 1)
    if isinstance(task, MatMul) and not task.flags & X_BY_SEAT:
        packets *= task.batch  # a run has every seat's
    lo = whole.lo + plan.first(warp) * packets
    return Touch(lo, min(whole.hi, lo + plan.pieces(warp) * packets), whole.tag, whole.carried)


def appends_rows(program: Program, sm: int) -> bool:
    """Whether the SM has a tail task, which appends KV rows."""
    return any(isinstance(task, Attention) and task.split == 0 for task in program.queues[sm])


def turning_positions(program: Program) -> list[int]:
    """Position 0 and every position below the context at which some task's footprint differs from the position before."""
    tasks = [task for queue in program.queues for task in queue if isinstance(task, Attention)]
    shapes = {(task.window, task.unit_rows, task.splits): task for task in tasks}
    found, last = [], None
    for position in range(program.machine.context):
        now = [(span.first, span.old, span.active_splits) for span in (task.span(position) for task in shapes.values())]
        if now != last:
            found.append(position)
        last = now
    return found or [0]


def launches(program: Program, tokens: int) -> list[list[Positions]]:
    """Positions of launches of `tokens` tokens that between them pass every change of a footprint, before and after it.

    The seats of a batch begin all at one place, or each at another and in its turn at every one. A launch for prefill is one stretch, and
    touches the same packets wherever that begins.
    """
    context, batch = program.machine.context, program.machine.batch
    if program.machine.prefill:
        return [[(0,) * batch]]
    last = max(0, context - tokens)
    starts = sorted({min(last, max(0, turn - 1)) for turn in turning_positions(program)} | ({last} if _attends(program) else set()))
    seats = {(start,) * batch for start in starts}
    seats |= {tuple(starts[(turn + seat) % len(starts)] for seat in range(batch)) for turn in range(len(starts))}
    return [[tuple(start + token for start in own) for token in range(min(tokens, context - max(own)))] for own in sorted(seats)]


def _attends(program: Program) -> bool:
    return any(isinstance(task, Attention) for queue in program.queues for task in queue)


def cut_points(touches: Sequence[Touch]) -> list[int]:
    """Sorted borders of the touches: packets between two neighbouring borders are touched alike by everybody."""
    return sorted({border for touch in touches for border in (touch.lo, touch.hi)})


def all_touches(token: Token) -> list[Touch]:
    """Every read and publish of a token, in no particular order."""
    return [
        touch
        for queue in token
        for step in queue
        for group in (*step.warp_reads, *step.tile_reads, step.fed_reads, *step.publishes)
        for touch in group
    ]


def fed_chunks(program: Program, token: Token, sm: int) -> list[tuple[int, int]]:
    """(queue index, chunk) in the order in which the SM's feeder streams them in a token."""
    return [(index, chunk) for index in program.streams[sm] for chunk in range(token[sm][index].chunks)]
