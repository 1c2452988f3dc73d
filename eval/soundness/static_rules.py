"""The rules of docs/machine.md that need no execution: bounds, kinds, coverage of outputs and KV rows, resources, unchecked reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from amk.eval.soundness.findings import Unsafe
from amk.eval.soundness.footprint import turning_positions
from amk.eval.soundness.static_stretch import stretch_problems
from amk.isa.abi import NONE
from amk.isa.attention import MAX_GROUP, Attention
from amk.isa.batch import RUN, SEAT_BLOCK
from amk.isa.draw import Draw
from amk.isa.draw_head import DrawHead
from amk.isa.embed import Embed
from amk.isa.embed_batch import EmbedBatch
from amk.isa.filter_draw import FilterDraw
from amk.isa.filter_head import FilterHead
from amk.isa.gemm import Gemm
from amk.isa.gemm_glu import GemmGlu
from amk.isa.gemm_head import GemmHead
from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Access, Instruction
from amk.isa.machine import KV_BLOCK_ROWS, TILE_ROWS
from amk.isa.matmul import BATCH_FLAGS, OUT_BY_SEAT, X_BY_SEAT, MatMul
from amk.isa.matvec import X_NARROW, X_NORM, MatVec
from amk.isa.rmsnorm import RmsNorm
from amk.isa.sample import Sample
from amk.isa.sample_batch import SampleBatch
from amk.schedule.program import Program

BLOCK_BYTES = 232_448  # shared memory of a block on an H200, which the validator takes where it is told nothing


def static_problem(program: Program) -> Unsafe | None:
    """The first rule that the program breaks without being run, or None."""
    try:
        return next(_problems(program), None)
    except (ValueError, ZeroDivisionError, IndexError) as error:
        return Unsafe("kind", f"a task has no footprint: {error}")


def _problems(program: Program) -> Iterator[Unsafe]:
    yield from _machine(program)
    yield from _buffers(program)
    yield from stretch_problems(program)
    yield from _device(program)
    yield from _embedding(program)
    for queue in program.queues:
        for task in queue:
            yield from _words(program, task)
    yield from _streams(program)
    for position in sorted({*turning_positions(program), program.machine.context - 1}):
        yield from _accesses(program, position)
        yield from _as_written(program, position)
        yield from _kv_coverage(program, position)
    if not program.machine.prefill:
        yield from _tiles(program)
    yield from _token(program)
    yield from _kv_visibility(program)


def _machine(program: Program) -> Iterator[Unsafe]:
    machine = program.machine
    if len(program.queues) != machine.sms or len(program.streams) != machine.sms:
        yield Unsafe("kind", f"{len(program.queues)} queues and {len(program.streams)} streams for {machine.sms} SMs")
    if machine.stages < 1 or machine.inflight < 1 or machine.reduction_slots < 1 or machine.consumer_warps < 1:
        yield Unsafe("deadlock", "the ring, the copies in flight and the reduction slots must each be at least one")
    if (machine.watermark > 0) != (machine.throttled > 0):
        yield Unsafe("deadlock", "a feeder that holds back must be allowed a copy, and know when it holds back")
    if not 0 <= machine.watermark < machine.stages:
        yield Unsafe("ring", f"a watermark of {machine.watermark} in a ring of {machine.stages} stages")
    if machine.watermark and machine.prefill:
        yield Unsafe("deadlock", "the feeder of a stretch holds back, and copies without their x never land")
    if machine.stages * machine.slot_bytes + program.scratch_bytes > BLOCK_BYTES:
        yield Unsafe("resources", f"{machine.stages} slots of {machine.slot_bytes} bytes and the scratch do not fit a block")

    if machine.batch > 32 and not machine.prefill:
        yield Unsafe("kind", f"a batch of {machine.batch}, for which products have too few sums")
    if machine.batch > 1 and machine.batch % SEAT_BLOCK or machine.prefill and machine.batch == 1:
        yield Unsafe("kind", f"a batch of {machine.batch}: it must be whole blocks of {SEAT_BLOCK} seats, for prefill at least one")


def _device(program: Program) -> Iterator[Unsafe]:
    """Modes that device code has, and a hint to the watcher that comes at the latest with the last arrival."""
    knobs = program.device
    if knobs.sync not in ("counter", "tags") or knobs.weight_feed not in ("bulk", "cp_async", "plain"):
        yield Unsafe("kind", f"no device code waits by {knobs.sync} and copies by {knobs.weight_feed}")
    if knobs.cache_hint not in ("evict_first", "none") or knobs.poll_sleep_ns not in (0, 1, 20, 50, 100):
        yield Unsafe("kind", f"no device code caches by {knobs.cache_hint} or pauses {knobs.poll_sleep_ns} ns")
    if knobs.release_early not in (0, 1, 2, 4, 8, 16):
        yield Unsafe("kind", f"a watcher that goes by all but {knobs.release_early} of 32 arrivals")


def _embedding(program: Program) -> Iterator[Unsafe]:
    """A row of the embedding is as long as what embed tasks take of it."""
    stops = [task.col0 + task.cols for queue in program.queues for task in queue if isinstance(task, Embed | EmbedBatch)]
    if stops and max(stops) != program.machine.hidden:
        yield Unsafe("bounds", f"rows of {program.machine.hidden} elements in the embedding, of which {max(stops)} are taken")


def _buffers(program: Program) -> Iterator[Unsafe]:
    for buffer in program.buffers:
        if buffer.space == "arena" and (buffer.offset < 0 or buffer.offset + buffer.packets > program.arena_packets):
            yield Unsafe("bounds", f"buffer {buffer.name} leaves the arena")


def _words(program: Program, task: Instruction) -> Iterator[Unsafe]:
    for counter in (task.wait_counter, task.done_counter):
        if counter != NONE and not 0 <= counter < len(program.counters):
            yield Unsafe("resources", f"{task.stem}: counter {counter} of {len(program.counters)}")
    if task.shared_bytes(program.machine) > program.scratch_bytes:
        yield Unsafe(
            "resources", f"{task.stem}: {task.shared_bytes(program.machine)} bytes of scratch, but there are {program.scratch_bytes}"
        )
    yield from _seats(program, task)
    yield from _pairs(program, task)
    if isinstance(task, MatVec):
        yield from _matrix(program, task)
    elif isinstance(task, Attention):
        yield from _attention(program, task)
    elif isinstance(task, Embed | EmbedBatch) and not 0 <= task.col0 < task.col0 + task.cols <= program.machine.hidden:
        yield Unsafe("bounds", "embed: columns outside the embedding row")
    elif isinstance(task, RmsNorm) and not 0 <= task.col0 < task.col0 + task.count <= task.cols:
        yield Unsafe("bounds", "rmsnorm: columns outside its input")


def _seats(program: Program, task: Instruction) -> Iterator[Unsafe]:
    """Tasks for all seats have as many as the machine, and their values are whole runs, or lie by seat where the device knows it."""
    batch = program.machine.batch
    if not isinstance(task, Attention) and getattr(task, "batch", 1) != batch:
        yield Unsafe("kind", f"{task.stem}: computes {getattr(task, 'batch', 1)} tokens side by side on a machine of {batch}")
    if isinstance(task, EmbedBatch) and (task.col0 % TILE_ROWS or task.cols % TILE_ROWS):
        yield Unsafe("kind", f"{task.stem}: columns that are no whole runs")
    if not isinstance(task, MatMul):
        return
    least = TILE_ROWS if task.flags & X_NORM else RUN if task.flags & X_BY_SEAT else 1
    if not task.flags & X_NARROW or task.cols % least:
        yield Unsafe("kind", f"{task.stem}: x of {task.cols} columns in an order that the device does not read")
    if task.flags & OUT_BY_SEAT and (not isinstance(task, Gemm) or task.res_buf != NONE):
        yield Unsafe("kind", f"{task.stem}: writes by seat, but must not")
    if isinstance(task, Gemm) and not task.flags & OUT_BY_SEAT and task.rows % TILE_ROWS:
        yield Unsafe("kind", f"gemm: {task.rows} interleaved rows")


def _pairs(program: Program, task: Instruction) -> Iterator[Unsafe]:
    """What the device takes two packets at a time lies at even ones."""
    for buffer, start in _taken_in_pairs(program, task):
        if 0 <= buffer < len(program.buffers) and (program.buffers[buffer].offset + start) % 2:
            yield Unsafe("bounds", f"{task.stem}: pairs of packets from an odd one of {program.buffers[buffer].name}")


def _taken_in_pairs(program: Program, task: Instruction) -> Iterator[tuple[int, int]]:
    """Buffer, and the packet in it that the first pair begins at."""
    if isinstance(task, MatVec):
        apart = task.flags & X_BY_SEAT if isinstance(task, MatMul) else 0
        for seat in range(program.machine.batch if apart else 1):
            yield task.x_buf, task.x_start + seat * -(-task.cols // 2)
    if isinstance(task, Gemm) and not task.flags & OUT_BY_SEAT:
        yield task.out_buf, task.out_start
        if task.res_buf != NONE:
            yield task.res_buf, task.out_start
    if isinstance(task, GemmGlu):
        yield task.out_buf, task.out_start
    if isinstance(task, EmbedBatch):
        yield task.out_buf, 0
    if isinstance(task, Sample | SampleBatch | FilterDraw):
        yield task.in_buf, 0
    positions = range(0, program.machine.context, KV_BLOCK_ROWS)
    if isinstance(task, Attention) and any(task.span(position).active_splits > 1 for position in positions):
        yield task.part_buf, 0  # a partial has an even number of packets


def _matrix(program: Program, task: MatVec) -> Iterator[Unsafe]:
    if not 0 <= task.weight < len(program.matrices):
        yield Unsafe("bounds", f"{task.stem}: matrix {task.weight} of {len(program.matrices)}")
        return
    matrix = program.matrices[task.weight]
    if (matrix.rows, matrix.cols) != (task.rows, task.cols):
        yield Unsafe("kind", f"{task.stem}: shape of matrix {matrix.name}")
    if not 0 <= task.tile0 < task.tile0 + task.tiles <= -(-task.rows // TILE_ROWS):
        yield Unsafe("bounds", f"{task.stem}: tiles outside matrix {matrix.name}")
    if not 0 <= task.shape < len(program.shapes):
        yield Unsafe("handler", f"{task.stem}: shape {task.shape} of {len(program.shapes)}")
    elif (program.shapes[task.shape].cols, program.shapes[task.shape].flags) != (task.cols, task.flags):
        yield Unsafe("kind", f"{task.stem}: compiled shape {program.shapes[task.shape].label}")
    if task.gain >= 0 and task.gain + task.cols > program.constant_elements:
        yield Unsafe("bounds", f"{task.stem}: gain outside the constants")
    if task.gain >= 0 and task.gain % (4 if isinstance(task, MatMul) else 2):
        yield Unsafe("bounds", f"{task.stem}: gain at {task.gain}, which is taken in vectors")
    if not isinstance(task, MatMul) and task.flags & X_NORM and task.flags & X_NARROW:
        yield Unsafe("kind", f"{task.stem}: squares of narrow packets, which nobody adds up")
    if not isinstance(task, MatMul) and task.cols % (4 if task.flags & X_NARROW and program.machine.dtype != "fp32" else 2):
        yield Unsafe("kind", f"{task.stem}: {task.cols} columns, the last of which are half of a load")
    if task.bias >= 0 and task.bias + task.rows > program.constant_elements:
        yield Unsafe("bounds", f"{task.stem}: bias outside the constants")
    known = X_NARROW | X_NORM | (BATCH_FLAGS if isinstance(task, MatMul) else 0)
    if task.flags & ~known != (matrix.weights.flags if matrix.weights else 0):
        yield Unsafe("kind", f"{task.stem}: weight format of matrix {matrix.name}")
        return
    plan = task.plan(program.machine)
    if task.by_rows:
        grouped = matrix.weights is not None and matrix.weights.bits == 4 and matrix.weights.group > 0
        alike = {plan.pieces(warp) for warp in range(plan.warps)}
        if not (grouped and plan.chunks == 1 and len(alike) == 1):
            yield Unsafe("kind", f"{task.stem}: tiles that no warp can take whole")
    if max(plan.chunk_bytes(c) for c in range(plan.chunks)) > program.machine.stage_bytes:
        yield Unsafe("ring", f"{task.stem}: a chunk does not fit a stage")


def _cached_rows(program: Program, task: Instruction) -> Iterator[Unsafe]:
    positions, rows = program.machine.context, program.kv.rows
    if positions > rows:
        yield Unsafe("bounds", f"{task.stem}: {positions} positions, but the cache has {rows} rows")


def _attention(program: Program, task: Attention) -> Iterator[Unsafe]:
    machine, kv = program.machine, program.kv
    if not (0 <= task.layer < kv.layers and 0 <= task.kv_head < kv.heads):
        yield Unsafe("bounds", "attention: no such layer or KV head in the cache")
    yield from _cached_rows(program, task)
    if not (1 <= task.nq <= MAX_GROUP and 0 <= task.split < task.splits):
        yield Unsafe("kind", "attention: heads or split outside the task's group")
    for gain in (task.q_gain, task.k_gain):
        if (gain >= 0 or machine.qk_norm) and not 0 <= gain <= program.constant_elements - machine.head_dim:
            yield Unsafe("bounds", f"attention: a head's gain at {gain}, outside the constants")
    group = machine.heads // machine.kv_heads
    if not task.kv_head * group <= task.q0 <= task.q0 + task.nq <= (task.kv_head + 1) * group:
        yield Unsafe("kind", f"attention: query heads that KV head {task.kv_head} does not serve")
    if task.unit_rows < KV_BLOCK_ROWS or task.unit_rows % KV_BLOCK_ROWS:
        yield Unsafe("kind", f"attention: {task.unit_rows} rows a unit")
    if machine.context > 2 * KV_BLOCK_ROWS and machine.kv_blocks_per_chunk < 1:
        yield Unsafe("ring", "attention: a KV block does not fit a stage")


def _streams(program: Program) -> Iterator[Unsafe]:
    for sm, (queue, stream) in enumerate(zip(program.queues, program.streams, strict=True)):
        if any(not 0 <= index < len(queue) for index in stream):
            yield Unsafe("ring", f"the stream of SM {sm} names a task outside its queue")


def _accesses(program: Program, position: int) -> Iterator[Unsafe]:
    for queue in program.queues:
        for task in queue:
            for access in task.reads(program.machine, position):
                yield from _access(program, task, access, write=False)
            for access in task.writes(program.machine, position):
                yield from _access(program, task, access, write=True)


def _access(program: Program, task: Instruction, access: Access, write: bool) -> Iterator[Unsafe]:
    if not 0 <= access.buffer < len(program.buffers):
        yield Unsafe("bounds", f"{task.stem}: buffer {access.buffer} of {len(program.buffers)}")
        return
    buffer = program.buffers[access.buffer]
    if not 0 <= access.start <= access.stop <= buffer.packets:
        yield Unsafe("bounds", f"{task.stem}: {buffer.name}[{access.start}:{access.stop}] of {buffer.packets}")
    if buffer.space == "weights":
        yield Unsafe("kind", f"{task.stem}: {'writes' if write else 'reads'} {buffer.name}, which is no part of the arena")
    if access.start == access.stop:
        return
    if access.order and not write and (access.start, access.stop) != (0, buffer.packets):
        yield Unsafe("bounds", f"{task.stem}: takes a part of {buffer.name}, whose packets lie in another order than they count")
    if access.kind != buffer.kind:
        yield Unsafe("kind", f"{task.stem}: {access.kind} packets in {buffer.kind} buffer {buffer.name}")
    if access.tag == 0 and not write:  # relaxed loads are in no order: it may see what was there before the launch
        yield Unsafe("race", f"{task.stem}: an unchecked read of {buffer.name}")
    elif not 0 < access.tag <= program.machine.tags:
        yield Unsafe("resources", f"{task.stem}: tag {access.tag} of {program.machine.tags}")


def _as_written(program: Program, position: int) -> Iterator[Unsafe]:
    """A value is read as what was written, through whichever buffer: its kind, and in which order its packets count."""
    written: dict[int, list[Access]] = {}
    tasks = [task for queue in program.queues for task in queue]
    for access in (access for task in tasks for access in task.writes(program.machine, position) if access.start < access.stop):
        written.setdefault(access.tag, []).append(access)
    reads = [(task, read) for task in tasks for read in task.reads(program.machine, position)]
    for task, read in reads:
        low, high = (_place(program, read.buffer) + at for at in (read.start, read.stop))
        for write in written.get(read.tag, ()):
            base, alike = _place(program, write.buffer), _form(write) == _form(read)
            if not alike and base + write.start < high and low < base + write.stop:
                yield Unsafe("kind", f"{task.stem}: reads packets of another kind, or seats in another order, than were written")


def _form(access: Access) -> tuple[str, bool, str]:
    return access.kind, access.interleaved, access.order


def _kv_coverage(program: Program, position: int) -> Iterator[Unsafe]:
    """One tail task a (layer, KV head), and every streamed block of its window attended to once."""
    groups: dict[tuple[int, int], list[Attention]] = {}
    for queue in program.queues:
        for task in queue:
            if isinstance(task, Attention):
                groups.setdefault((task.layer, task.kv_head), []).append(task)
    for (layer, head), tasks in groups.items():
        tails = [task for task in tasks if task.split == 0]
        if len(tails) != 1:
            yield Unsafe("coverage", f"{len(tails)} tail tasks append the rows of layer {layer}, KV head {head}")
            continue
        span = tails[0].span(position)
        ranges = [r for task in tasks if task.active(position) for r in task.streamed_blocks(position)]
        blocks = Counter(block for start, stop in ranges for block in range(start, stop))
        if blocks != Counter(range(span.first, span.old)):
            yield Unsafe("coverage", f"the splits of layer {layer}, KV head {head} do not cover its window once")


def _tiles(program: Program) -> Iterator[Unsafe]:
    """Every tile of every matrix is computed once: a tile that nobody computes is an output that is not covered."""
    tasks = [task for queue in program.queues for task in queue if isinstance(task, MatVec)]
    for number, matrix in enumerate(program.matrices):
        tiles = Counter(tile for task in tasks if task.weight == number for tile in range(task.tile0, task.tile0 + task.tiles))
        if tiles != Counter(range(-(-matrix.rows // TILE_ROWS))):
            yield Unsafe("coverage", f"the tasks do not cover the tiles of matrix {matrix.name} once")


def _token(program: Program) -> Iterator[Unsafe]:
    """One task hands out the token, embeddings take that one, and it has seen the candidate of every task of the head."""
    tasks = [task for queue in program.queues for task in queue]
    samples = [task for task in tasks if isinstance(task, Sample | SampleBatch | FilterDraw)]
    if len(samples) > 1:
        yield Unsafe("coverage", f"{len(samples)} tasks hand out the token")
    chosen = {(_place(program, sample.out_buf), sample.out_tag) for sample in samples}
    for embed in (task for task in tasks if isinstance(task, Embed | EmbedBatch)):
        if (_place(program, embed.token_buf), embed.token_tag) not in chosen:
            yield Unsafe("kind", f"{embed.stem} takes packets as its token that hold none")
    for sample in samples:
        if isinstance(sample, FilterDraw) and sample.tiles != -(-program.machine.vocab // TILE_ROWS):
            yield Unsafe("bounds", f"{sample.stem} takes {sample.tiles} tiles of a vocabulary of {program.machine.vocab}")
        for head in (task for task in tasks if isinstance(task, GemvHead | GemmHead | FilterHead)):
            if _chooser(head) != _chooser(sample):
                yield Unsafe("kind", f"{sample.stem} cannot take what {head.stem} publishes")
            pair = 2 * program.machine.batch
            end = pair * sample.count if isinstance(sample, Sample | SampleBatch) else 0
            seen = (head.out_buf, head.out_tag) == (sample.in_buf, sample.in_tag)
            if not seen or isinstance(head, GemvHead | GemmHead) and head.out_start + pair > end:
                yield Unsafe("coverage", "sample does not see the candidate of a head task")


def _place(program: Program, buffer: int) -> int:
    """The packet of the arena at which a buffer begins."""
    return program.buffers[buffer].offset


def _chooser(task: Instruction) -> str:
    """Which way of choosing tokens a head or sample task belongs to."""
    ways = {GemvHead: "greedy", Sample: "greedy", GemmHead: "batch", SampleBatch: "batch", DrawHead: "draw", Draw: "draw"}
    return ways.get(type(task), "filter")


def _kv_visibility(program: Program) -> Iterator[Unsafe]:
    """A row streamed at a position must have been written `kv_lag` tokens before it, so that the feeder has waited for its writer."""
    for task in {t for queue in program.queues for t in queue if isinstance(t, Attention)}:
        for position in range(program.machine.context):
            ranges = task.streamed_blocks(position) if task.active(position) else []
            newest = max((stop * KV_BLOCK_ROWS - 1 for _, stop in ranges), default=-1)
            if newest >= 0 and position - newest < program.machine.kv_lag:
                yield Unsafe("race", f"attention streams row {newest} at position {position}, {program.machine.kv_lag} tokens behind")
