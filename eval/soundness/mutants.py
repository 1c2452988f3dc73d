"""Small wrongs done to a program: a wait dropped, a tag off by one, entries swapped, buffers overlapped, a ring shrunk, and so on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from random import Random
from typing import Any, TypeAlias

from amk.isa.abi import NONE
from amk.isa.attention import PARTIAL_HEAD, Attention
from amk.isa.batch import SEAT_BLOCK
from amk.isa.draw import Draw
from amk.isa.draw_head import DrawHead
from amk.isa.filter_head import FilterHead
from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Instruction, Kind
from amk.isa.matmul import OUT_BY_SEAT, X_BY_SEAT, MatMul
from amk.isa.matvec import MatVec
from amk.isa.sample import Sample
from amk.isa.stretch import GROUP_TILES
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_matmul import StretchMatMul
from amk.schedule.program import MatVecShape, Program, TaskId

Mutation: TypeAlias = Callable[[Random, Program], Program | None]
READ_TAGS = ("token_tag", "x_tag", "res_tag", "in_tag", "gate_tag", "up_tag", "q_tag", "k_tag", "v_tag", "kv_tag", "sums_tag")
KINDS: tuple[Kind, ...] = ("f32", "narrow", "u32")
ATTENTION_WORDS = (
    *("split", "splits", "unit_rows", "window", "kv_head", "layer", "q0", "nq"),
    "seat0",
)
BUFFER_WORDS = (
    *("token_buf", "x_buf", "res_buf", "in_buf", "gate_buf", "up_buf", "q_buf", "k_buf", "v_buf", "part_buf", "out_buf"),
    *("sums_buf", "h_buf", "kv_buf"),
)
CHOOSERS_ALIKE: tuple[tuple[type[Instruction], ...], ...] = ((GemvHead, DrawHead, FilterHead), (Sample, Draw))  # of the same words


def mutate(random: Random, program: Program) -> tuple[str, Program]:
    """The name of one mutation that applies to the program, and what it makes of it."""
    names = list(MUTATIONS)
    weights = [1 if name in COARSE else 3 for name in names]
    while True:
        (name,) = random.choices(names, weights)
        mutant = MUTATIONS[name](random, program)
        if mutant is not None and mutant != program:
            return name, mutant


# ---- tasks and their words


def _tasks(program: Program) -> list[TaskId]:
    return [(sm, index) for sm, queue in enumerate(program.queues) for index in range(len(queue))]


def _with_task(program: Program, at: TaskId, **words: Any) -> Program:
    sm, index = at
    queue = program.queues[sm]
    return _with_queue(program, sm, (*queue[:index], replace(queue[index], **words), *queue[index + 1 :]))


def _with_queue(program: Program, sm: int, queue: tuple[Instruction, ...], stream: tuple[int, ...] | None = None) -> Program:
    queues = (*program.queues[:sm], queue, *program.queues[sm + 1 :])
    if stream is None:
        return replace(program, queues=queues)
    return replace(program, queues=queues, streams=(*program.streams[:sm], stream, *program.streams[sm + 1 :]))


def _pick(
    random: Random, program: Program, names: tuple[str, ...], kind: type[Any] | tuple[type[Any], ...] = object
) -> tuple[TaskId, str] | None:
    """A random task of a kind and one of those words that it has and uses."""
    choices = [
        (at, name)
        for at in _tasks(program)
        if isinstance(task := program.task(at), kind)
        for name in names
        if name in vars(task) and getattr(task, name) != NONE and not (name == "res_tag" and getattr(task, "res_buf", NONE) == NONE)
    ]
    return random.choice(choices) if choices else None


def _shifted(random: Random, program: Program, names: tuple[str, ...], steps: tuple[int, ...], least: int = 0) -> Program | None:
    """One word of one task moved by a step."""
    picked = _pick(random, program, names)
    if picked is None:
        return None
    at, name = picked
    value = getattr(program.task(at), name) + random.choice(steps)
    return None if value < least else _with_task(program, at, **{name: value})


def drop_check(random: Random, program: Program) -> Program | None:
    picked = _pick(random, program, READ_TAGS)
    return None if picked is None else _with_task(program, picked[0], **{picked[1]: 0})


def shift_read_tag(random: Random, program: Program) -> Program | None:
    return _shifted(random, program, READ_TAGS, (-1, 1))


def shift_write_tag(random: Random, program: Program) -> Program | None:
    return _shifted(random, program, ("out_tag", "part_tag", "h_tag"), (-1, 1))


def shift_threshold(random: Random, program: Program) -> Program | None:
    waiting = [at for at in _tasks(program) if program.task(at).wait_counter != NONE]
    if not waiting:
        return None
    at = random.choice(waiting)
    count = program.task(at).wait_count + random.choice((-1, 1))
    return None if count < 0 else _with_task(program, at, wait_count=count)


def drop_wait(random: Random, program: Program) -> Program | None:
    picked = _pick(random, program, ("wait_counter",))
    return None if picked is None else _with_task(program, picked[0], wait_counter=NONE, wait_count=0)


def other_wait(random: Random, program: Program) -> Program | None:
    picked = _pick(random, program, ("wait_counter", "done_counter"))
    if picked is None or not program.counters:
        return None
    return _with_task(program, picked[0], **{picked[1]: random.choice((*range(len(program.counters)), NONE))})


def shift_start(random: Random, program: Program) -> Program | None:
    return _shifted(random, program, ("x_start", "out_start", "k_start", "v_start"), (-16, -1, 1, 16), least=-16)


def shift_tiles(random: Random, program: Program) -> Program | None:
    return _shifted(random, program, ("tile0", "tiles"), (-1, 1), least=-1)


def shift_columns(random: Random, program: Program) -> Program | None:
    return _shifted(random, program, ("col0", "count", "cols"), (-16, 16))


def shift_attention(random: Random, program: Program) -> Program | None:
    picked = _pick(random, program, ATTENTION_WORDS, (Attention, StretchAttention))
    if picked is None:
        return None
    step = random.choice((-1, 1)) * {"unit_rows": 16, "seat0": SEAT_BLOCK}.get(picked[1], 1)
    value = getattr(program.task(picked[0]), picked[1]) + step
    return None if value < 0 else _with_task(program, picked[0], **{picked[1]: value})


def shift_stretch(random: Random, program: Program) -> Program | None:
    """A word of a stretch's task: which runs of K, which share of how many, which seat, or x in another order."""
    picked = _pick(random, program, ("run0", "runs", "share", "shares", "seat", "x_order", "tile0", "layer"))
    if picked is None or not program.machine.prefill:
        return None
    at, name = picked
    value = getattr(program.task(at), name) + random.choice((-1, 1)) * (GROUP_TILES if name == "tile0" else 1)
    return None if value < 0 else _with_task(program, at, **{name: value})


def shift_runs(random: Random, program: Program) -> Program | None:
    """Two neighbouring shares of a product divide their runs of K elsewhere, or one takes one less or one more on either side."""
    picked = _pick(random, program, ("share",), StretchMatMul)
    if picked is None:
        return None
    task, step = program.task(picked[0]), random.choice((-1, 1))
    assert isinstance(task, StretchMatMul)
    low = random.random() < 0.5
    moved = _with_task(program, picked[0], run0=task.run0 + step * low, runs=task.runs - step if low else task.runs + step)
    border = task.run0 if low else task.run0 + task.runs
    for at in _tasks(program) if random.random() < 0.5 else ():
        other = program.task(at)
        if isinstance(other, StretchMatMul) and (other.weight, other.tile0) == (task.weight, task.tile0):
            if low and other.run0 + other.runs == border:
                moved = _with_task(moved, at, runs=other.runs + step)
            elif not low and other.run0 == border:
                moved = _with_task(moved, at, run0=border + step, runs=other.runs - step)
    return moved if task.run0 + step * low >= 0 else None


def swap_words(random: Random, program: Program) -> Program | None:
    """Two tasks of one instruction of a stretch change places: the word that tells them apart."""
    picked = _pick(random, program, ("share", "seat", "seat0", "kv_head", "run0"))
    if picked is None or not program.machine.prefill:
        return None
    (at, name), task = picked, program.task(picked[0])
    alike = [other for other in _tasks(program) if other != at and type(program.task(other)) is type(task)]
    if not alike:
        return None
    other = random.choice(alike)
    swapped = _with_task(program, at, **{name: getattr(program.task(other), name)})
    return _with_task(swapped, other, **{name: getattr(task, name)})


def other_gate(random: Random, program: Program) -> Program | None:
    """A task that waits for one counter waits for all arrivals of another one."""
    waiting = [at for at in _tasks(program) if program.task(at).wait_counter != NONE]
    if not waiting:
        return None
    counter = random.randrange(len(program.counters))
    tasks = (program.task(at) for at in _tasks(program))
    arrivals = sum(task.arrivals(program.machine) for task in tasks if task.done_counter == counter)
    return _with_task(program, random.choice(waiting), wait_counter=counter, wait_count=arrivals)


def move_arrival(random: Random, program: Program) -> Program | None:
    """A task arrives at another counter, or at none, and those who wait for either wait for what arrivals these have now."""
    picked = _pick(random, program, ("done_counter",))
    if picked is None:
        return None
    moved = _with_task(program, picked[0], done_counter=random.choice((*range(len(program.counters)), NONE)))
    arrivals = [0] * len(program.counters)
    for task in (moved.task(at) for at in _tasks(moved)):
        if task.done_counter != NONE:
            arrivals[task.done_counter] += task.arrivals(moved.machine)
    for at in _tasks(moved):
        task = moved.task(at)
        if task.wait_counter != NONE:
            moved = _with_task(moved, at, wait_count=arrivals[task.wait_counter])
    return moved


def other_shape(random: Random, program: Program) -> Program | None:
    picked = _pick(random, program, ("shape", "flags", "weight", "rows"), MatVec)
    if picked is None:
        return None
    at, name = picked
    return _with_task(program, at, **{name: random.choice((0, 1, 2, getattr(program.task(at), name) + 16))})


def other_batch(random: Random, program: Program) -> Program | None:
    """A task, or the machine, is of more or fewer seats, or the machine does prefill where it did not."""
    picked = _pick(random, program, ("batch",))
    if picked is None or random.random() < 0.5:
        batch = program.machine.batch + random.choice((-SEAT_BLOCK, SEAT_BLOCK))
        spoilt = {"prefill": not program.machine.prefill} if random.random() < 0.5 or batch < 1 else {"batch": batch}
        return _machine(program, **spoilt)
    at, name = picked
    return _with_task(program, at, **{name: getattr(program.task(at), name) + random.choice((-SEAT_BLOCK, -1, 1, SEAT_BLOCK))})


def other_order(random: Random, program: Program) -> Program | None:
    """A product of a batch reads or writes by seat where it did not, or no longer does, and there is device code for that."""
    picked = _pick(random, program, ("flags",), MatMul)
    if picked is None:
        return None
    task = program.task(picked[0])
    assert isinstance(task, MatMul)
    shape = MatVecShape(task.cols, task.flags ^ random.choice((X_BY_SEAT, OUT_BY_SEAT)))
    shapes = tuple(dict.fromkeys((*program.shapes, shape)))
    return replace(_with_task(program, picked[0], flags=shape.flags, shape=shapes.index(shape)), shapes=shapes)


def other_chooser(random: Random, program: Program) -> Program | None:
    """A task of the head, or the sample, chooses in another way, with the same words."""
    choices = [(at, group) for at in _tasks(program) for group in CHOOSERS_ALIKE if type(program.task(at)) in group]
    if not choices:
        return None
    at, group = random.choice(choices)
    sm, index = at
    task, queue = program.task(at), program.queues[sm]
    words = {f.name: getattr(task, f.name) for f in fields(task)}
    return _with_queue(program, sm, (*queue[:index], random.choice(group)(**words), *queue[index + 1 :]))


def other_buffer(random: Random, program: Program) -> Program | None:
    """One access goes to another buffer."""
    picked = _pick(random, program, BUFFER_WORDS)
    if picked is None:
        return None
    return _with_task(program, picked[0], **{picked[1]: random.randrange(len(program.buffers) + 1)})


# ---- queues and streams


def swap_entries(random: Random, program: Program) -> Program | None:
    """Two entries of one queue change places; the stream follows, or keeps its old order of tasks."""
    long = [sm for sm, queue in enumerate(program.queues) if len(queue) > 1]
    if not long:
        return None
    sm = random.choice(long)
    queue = list(program.queues[sm])
    i, j = random.sample(range(len(queue)), 2) if random.random() < 0.5 else (k := random.randrange(len(queue) - 1), k + 1)
    queue[i], queue[j] = queue[j], queue[i]
    moved = {i: j, j: i}
    stream = [moved.get(index, index) for index in program.streams[sm]]
    return _with_queue(program, sm, tuple(queue), tuple(sorted(stream) if random.random() < 0.8 else stream))


def swap_stream(random: Random, program: Program) -> Program | None:
    long = [sm for sm, stream in enumerate(program.streams) if len(stream) > 1]
    if not long:
        return None
    sm = random.choice(long)
    stream = list(program.streams[sm])
    i, j = random.sample(range(len(stream)), 2)
    stream[i], stream[j] = stream[j], stream[i]
    return _with_queue(program, sm, program.queues[sm], tuple(stream))


def edit_stream(random: Random, program: Program) -> Program | None:
    """One entry of a stream is lost or comes twice."""
    streamed = [sm for sm, stream in enumerate(program.streams) if stream]
    if not streamed:
        return None
    sm = random.choice(streamed)
    stream = list(program.streams[sm])
    at = random.randrange(len(stream))
    stream[at : at + 1] = [] if random.random() < 0.5 else [stream[at]] * 2
    return _with_queue(program, sm, program.queues[sm], tuple(stream))


def remove_task(random: Random, program: Program) -> Program | None:
    if program.task_count < 2:
        return None
    return _without(program, random.choice(_tasks(program)))


def _without(program: Program, at: TaskId) -> Program:
    sm, index = at
    queue = program.queues[sm]
    stream = tuple(i - (i > index) for i in program.streams[sm] if i != index)
    return _with_queue(program, sm, (*queue[:index], *queue[index + 1 :]), stream)


def _inserted(program: Program, sm: int, index: int, task: Instruction) -> Program:
    queue = program.queues[sm]
    stream = [i + (i >= index) for i in program.streams[sm]] + ([index] if task.streamed else [])
    return _with_queue(program, sm, (*queue[:index], task, *queue[index:]), tuple(sorted(stream)))


def duplicate_task(random: Random, program: Program) -> Program | None:
    sm = random.randrange(len(program.queues))
    return _inserted(program, sm, random.randint(0, len(program.queues[sm])), program.task(random.choice(_tasks(program))))


def move_task(random: Random, program: Program) -> Program | None:
    """A task goes to a random place of a random queue."""
    at = random.choice(_tasks(program))
    without = _without(program, at)
    sm = random.randrange(len(program.queues))
    return _inserted(without, sm, random.randint(0, len(without.queues[sm])), program.task(at))


# ---- memory


def overlap_buffers(random: Random, program: Program) -> Program | None:
    """A buffer comes to lie on another one, wholly or in part."""
    if len(program.buffers) < 2:
        return None
    i, j = random.sample(range(len(program.buffers)), 2)
    target = program.buffers[j]
    offset = target.offset + random.choice((0, 0, 0, 1, target.packets // 2, target.packets - 1))
    buffers = list(program.buffers)
    buffers[i] = replace(buffers[i], offset=offset)
    return replace(program, buffers=tuple(buffers), arena_packets=max(program.arena_packets, offset + buffers[i].packets))


def share_slot(random: Random, program: Program) -> Program | None:
    """Every access to one value moves to another buffer of its kind and size, under a tag that is new there."""
    pairs = [
        (i, j)
        for i, a in enumerate(program.buffers)
        for j, b in enumerate(program.buffers)
        if i != j and a.kind == b.kind and a.packets <= b.packets
    ]
    if not pairs:
        return None
    old, new = random.choice(pairs)
    tag = program.machine.tags
    queues = tuple(tuple(_redirected(task, old, new, tag) for task in queue) for queue in program.queues)
    return replace(program, queues=queues, machine=replace(program.machine, tags=2 * tag))


def _redirected(task: Instruction, old: int, new: int, tag: int) -> Instruction:
    words = {f.name: getattr(task, f.name) for f in fields(task)}
    moved = [name for name in BUFFER_WORDS if words.get(name) == old]
    changes = dict.fromkeys(moved, new) | {f"{name[:-4]}_tag": words[f"{name[:-4]}_tag"] + tag for name in moved}
    return replace(task, **changes)


def row_of_partials(random: Random, program: Program) -> Program | None:
    """A new row of K or V that is read where partials lie, which nobody publishes at early positions."""
    tails = [at for at in _tasks(program) if isinstance(task := program.task(at), Attention) and task.split == 0 and task.part_buf != NONE]
    if not tails:
        return None
    at = random.choice(tails)
    task, row = program.task(at), random.choice("kv")
    assert isinstance(task, Attention)
    start = task.q0 * (task.splits - 1) * (program.machine.head_dim + PARTIAL_HEAD) + random.choice((0, 0, 2))
    return _with_task(program, at, **{f"{row}_buf": task.part_buf, f"{row}_tag": task.part_tag, f"{row}_start": start})


def spoil_buffer(random: Random, program: Program) -> Program | None:
    """A buffer of another kind, in read-only memory, or a packet shorter."""
    at = random.randrange(len(program.buffers))
    buffer = program.buffers[at]
    kinds = [kind for kind in KINDS if kind != buffer.kind]
    shorter, other = replace(buffer, packets=buffer.packets - 1), replace(buffer, kind=random.choice(kinds))
    spoilt = random.choice((shorter, other, replace(buffer, space="weights")))
    return replace(program, buffers=(*program.buffers[:at], spoilt, *program.buffers[at + 1 :]))


def shrink_arena(random: Random, program: Program) -> Program | None:
    return replace(program, arena_packets=program.arena_packets - random.choice((1, 16)))


def spoil_matrix(random: Random, program: Program) -> Program | None:
    if not program.matrices:
        return None
    at = random.randrange(len(program.matrices))
    matrix = program.matrices[at]
    spoilt = random.choice((replace(matrix, rows=matrix.rows - 16), replace(matrix, cols=matrix.cols + 16)))
    return replace(program, matrices=(*program.matrices[:at], spoilt, *program.matrices[at + 1 :]))


def shrink_cache(random: Random, program: Program) -> Program | None:
    """Fewer KV rows than positions."""
    rows = program.kv.rows - 16
    return replace(program, kv=replace(program.kv, rows=rows)) if rows >= 0 else None


# ---- the machine


def _machine(program: Program, **sizes: Any) -> Program:
    return replace(program, machine=replace(program.machine, **sizes))


def shrink_ring(random: Random, program: Program) -> Program | None:
    stages = random.randint(0 if random.random() < 0.1 else 1, max(1, program.machine.stages - 1))
    return _machine(program, stages=stages, inflight=max(1, min(program.machine.inflight, stages)))


def shrink_stage(random: Random, program: Program) -> Program | None:
    return _machine(program, stage_bytes=program.machine.stage_bytes // 2)


def shrink_slots(random: Random, program: Program) -> Program | None:
    return _machine(program, reduction_slots=0 if random.random() < 0.1 else 1)


def shrink_inflight(random: Random, program: Program) -> Program | None:
    return _machine(program, inflight=0 if random.random() < 0.1 else 1)


def other_throttle(random: Random, program: Program) -> Program | None:
    """Throttles at the bounds and past them: no copies, a watermark that the ring does not reach, one without the other."""
    stages = program.machine.stages
    return _machine(program, throttled=random.choice((0, 1, 2)), watermark=random.choice((0, 1, stages - 1, stages, stages + 1)))


def other_lag(random: Random, program: Program) -> Program | None:
    return _machine(program, kv_lag=random.choice((0, 1, 2, 17, 18, program.machine.kv_lag + 1)))


def grow_ring(random: Random, program: Program) -> Program | None:
    return _machine(program, stages=program.machine.stages * random.choice((2, 16)))


def shrink_scratch(random: Random, program: Program) -> Program | None:
    return replace(program, scratch_bytes=program.scratch_bytes - random.choice((4, 64)))


def other_hidden(random: Random, program: Program) -> Program | None:
    """Another length of an embedding row, where device code looks for a token's."""
    return _machine(program, hidden=program.machine.hidden * random.choice((2, 1024)) + random.choice((-16, 0, 16)))


def other_device(random: Random, program: Program) -> Program | None:
    """A value that device code has no case for, or that leaves a watcher waiting for arrivals that never come."""
    spoilt: dict[str, Any] = {"sync": "none", "weight_feed": "auto", "cache_hint": "evict_last", "release_early": -16, "poll_sleep_ns": -1}
    name = random.choice(list(spoilt))
    return replace(program, device=replace(program.device, **{name: spoilt[name]}))


def shrink_tags(random: Random, program: Program) -> Program | None:
    return _machine(program, tags=program.machine.tags - 1)


MUTATIONS: dict[str, Mutation] = {
    mutation.__name__: mutation
    for mutation in (
        drop_check,
        shift_read_tag,
        shift_write_tag,
        shift_threshold,
        drop_wait,
        other_wait,
        shift_start,
        shift_tiles,
        shift_columns,
        shift_attention,
        shift_stretch,
        shift_runs,
        swap_words,
        other_gate,
        move_arrival,
        other_shape,
        other_batch,
        other_chooser,
        other_order,
        other_buffer,
        swap_entries,
        swap_stream,
        edit_stream,
        remove_task,
        duplicate_task,
        move_task,
        overlap_buffers,
        share_slot,
        row_of_partials,
        spoil_buffer,
        shrink_arena,
        spoil_matrix,
        shrink_cache,
        shrink_ring,
        shrink_stage,
        shrink_slots,
        shrink_inflight,
        other_throttle,
        other_lag,
        grow_ring,
        shrink_scratch,
        shrink_tags,
        other_hidden,
        other_device,
    )
}
COARSE = frozenset(  # mutations that nearly always break a rule of form, so that a few of each are enough
    (
        "other_shape",
        "other_batch",
        "other_chooser",
        "other_order",
        "other_buffer",
        "shift_columns",
        "shift_tiles",
        "shift_start",
        "remove_task",
        "duplicate_task",
        "spoil_buffer",
        "shrink_arena",
        "spoil_matrix",
        "shrink_cache",
        "shrink_stage",
        "grow_ring",
        "shrink_scratch",
        "shrink_tags",
        "other_hidden",
        "other_device",
    )
)
