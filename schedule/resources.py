"""What a block needs of its SM: the layout of shared memory, in one place, and its threads."""

from __future__ import annotations

from dataclasses import dataclass

from amk.isa.abi import TASK_BYTES
from amk.isa.machine import Machine
from amk.isa.stretch import GROUP_TILES
from amk.schedule.program import Program

SCRATCH_ALIGNMENT = 16
REDUCTION_FLOATS = 20  # a warp's partial sums of 16 rows, padded so that warps meet no bank conflict
STREAM_ENTRY_BYTES = 2
PLACE_BYTES = 4 * GROUP_TILES  # of a stream entry: where each tile of its task lies
BUFFER_ENTRY_BYTES = 4
BARRIER_BYTES = 1024  # mbarriers of ring, reduction slots and consumers, and the watcher's counts
SERVICE_WARPS = 3  # feeder, storer, watcher
WARP_THREADS = 32


@dataclass(frozen=True)
class SharedNeeds:
    """What shared memory must hold; tasks and stream entries are those of the SM that has most.

    A `gated` program has no reduction slots, and a place for each tile of a stream entry.
    """

    stages: int
    slot_bytes: int
    scratch_bytes: int
    consumer_warps: int
    reduction_slots: int
    tasks: int
    stream_entries: int
    buffers: int
    batch: int = 1
    gated: bool = False


@dataclass(frozen=True)
class SharedLayout:
    """Byte offsets in dynamic shared memory; `total` is what a block needs.

    The ring begins at 0. Then come scratch, the reduction slots ([slots][consumer warps][batch][20] fp32), the task records, the stream
    entries (u16 indices into the queue), the buffer table (u32 packet offsets), the places of a stretch's tiles (8 u32 a stream entry, none
    on other machines) and `barrier_bytes` for barriers.
    """

    ring: int
    scratch: int
    reduction: int
    tasks: int
    streams: int
    buffers: int
    places: int
    barriers: int
    barrier_bytes: int

    @property
    def total(self) -> int:
        return self.barriers + self.barrier_bytes


def shared_needs(program: Program) -> SharedNeeds:
    m = program.machine
    return SharedNeeds(
        stages=m.stages,
        slot_bytes=m.slot_bytes,
        scratch_bytes=program.scratch_bytes,
        consumer_warps=m.consumer_warps,
        reduction_slots=m.reduction_slots,
        tasks=max(map(len, program.queues)),
        stream_entries=max(map(len, program.streams)),
        buffers=len(program.buffers),
        batch=m.batch,
        gated=m.prefill,
    )


def shared_layout(parts: Program | SharedNeeds) -> SharedLayout:
    """The layout of a program, or of parts that are not a program yet."""
    needs = shared_needs(parts) if isinstance(parts, Program) else parts
    scratch = _aligned(needs.stages * needs.slot_bytes, SCRATCH_ALIGNMENT)
    reduction = _aligned(scratch + needs.scratch_bytes, SCRATCH_ALIGNMENT)
    slots = 0 if needs.gated else needs.reduction_slots
    tasks = _aligned(reduction + 4 * REDUCTION_FLOATS * needs.batch * needs.consumer_warps * slots, TASK_BYTES)
    streams = tasks + TASK_BYTES * needs.tasks
    buffers = _aligned(streams + STREAM_ENTRY_BYTES * needs.stream_entries, BUFFER_ENTRY_BYTES)
    places = _aligned(buffers + BUFFER_ENTRY_BYTES * needs.buffers, SCRATCH_ALIGNMENT)
    barriers = places + (PLACE_BYTES * needs.stream_entries if needs.gated else 0)
    return SharedLayout(0, scratch, reduction, tasks, streams, buffers, places, barriers, BARRIER_BYTES)


def block_threads(machine: Machine) -> int:
    """Threads of a block: consumers and the three service warps."""
    return WARP_THREADS * (machine.consumer_warps + SERVICE_WARPS)


def _aligned(offset: int, alignment: int) -> int:
    return offset + -offset % alignment
