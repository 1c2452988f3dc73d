"""The rules of docs/machine.md for a stretch that need no execution: whole buffers, words in range, everything computed once."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import combinations, product

from amk.eval.soundness.findings import Unsafe
from amk.isa.abi import NONE
from amk.isa.batch import SEAT_BLOCK
from amk.isa.instruction import Instruction
from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, Machine
from amk.isa.seat_norm import SeatNorm
from amk.isa.seat_qkv import SeatQkv
from amk.isa.stretch import BY_HEAD, BY_SEAT, MOST_SHARES, fragment_row_bytes, runs
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_glu import StretchGlu
from amk.isa.stretch_matmul import StretchMatMul
from amk.isa.stretch_sums import StretchSums
from amk.schedule.program import Program

COPY_BYTES = 16
PACKET_BYTES = 4  # of values without tags
GROUP = 8  # tiles
OWN_WORDS: dict[type[Instruction], tuple[str, ...]] = {  # which tell the tasks of one phase apart, beside what they wait for
    SeatNorm: ("seat",),
    SeatQkv: ("seat",),
    StretchAttention: ("kv_head", "seat0"),
}
COUNTERS = ("wait_counter", "wait_count", "done_counter")


def stretch_problems(program: Program) -> Iterator[Unsafe]:
    """What is wrong with a program for prefill, or with a stretch's task in another one."""
    tasks = [task for queue in program.queues for task in queue]
    for task in tasks:
        if task.gated != program.machine.prefill:
            yield Unsafe("kind", f"{task.stem}: on a machine that does {'prefill' if program.machine.prefill else 'no prefill'}")
    if program.machine.slot and not program.machine.prefill:
        yield Unsafe("ring", "ring slots of another size than a stage")
    if program.machine.prefill:
        yield from _machine(program.machine)
        yield from _buffers(program)
        for task in tasks:
            yield from _words(program, task)
        yield from _products(program, [task for task in tasks if isinstance(task, StretchMatMul)])
        yield from _phases(program, tasks)
        yield from _sums(program, tasks)
        yield from _layers(program, tasks)


def _machine(machine: Machine) -> Iterator[Unsafe]:
    if machine.hidden % 16 or machine.heads * machine.head_dim % 16 or machine.head_dim % 4:
        yield Unsafe("kind", f"rows of {machine.hidden}, and {machine.heads} heads of {machine.head_dim}: no whole fragments")


def _buffers(program: Program) -> Iterator[Unsafe]:
    """Whole copies can be made of every value, and two values share all packets or none."""
    for buffer in program.buffers:
        if buffer.offset * PACKET_BYTES % COPY_BYTES:
            yield Unsafe("bounds", f"buffer {buffer.name} begins between two copies")
    for a, b in combinations([b for b in program.buffers if b.space == "arena" and b.packets], 2):
        apart = a.offset + a.packets <= b.offset or b.offset + b.packets <= a.offset
        if not apart and (a.offset, a.packets, a.kind) != (b.offset, b.packets, b.kind):
            yield Unsafe("kind", f"buffers {a.name} and {b.name} share some of their packets")


def _words(program: Program, task: Instruction) -> Iterator[Unsafe]:
    machine, kv = program.machine, program.kv
    if isinstance(task, StretchMatMul):
        yield from _product_words(program, task)
    if isinstance(task, SeatNorm | SeatQkv) and not 0 <= task.seat < machine.batch:
        yield Unsafe("bounds", f"{task.stem}: seat {task.seat} of {machine.batch}")
    if isinstance(task, SeatQkv | StretchAttention) and not (0 <= task.layer < kv.layers and machine.context <= kv.rows):
        yield Unsafe("bounds", f"{task.stem}: layer {task.layer} of {kv.layers}, {machine.context} positions in {kv.rows} rows")
    if isinstance(task, StretchAttention):
        if task.seat0 % SEAT_BLOCK or not 0 <= task.seat0 < machine.batch or not 0 <= task.kv_head < min(machine.kv_heads, kv.heads):
            yield Unsafe("bounds", f"stretch_attention: head {task.kv_head}, seats from {task.seat0}")
        if task.window < 0:
            yield Unsafe("bounds", f"stretch_attention: a window of {task.window} rows")
    for start, count, vector in _constants(program, task):
        if start < 0 or start + count > program.constant_elements or start % vector:
            yield Unsafe("bounds", f"{task.stem}: {count} elements from {start} of the constants, {vector} at a time")
    if isinstance(task, SeatNorm | SeatQkv) and task.shares > MOST_SHARES:
        yield Unsafe("bounds", f"{task.stem}: {task.shares} shares, but at most {MOST_SHARES} are added")
    yield from _in_place(program, task)


def _in_place(program: Program, task: Instruction) -> Iterator[Unsafe]:
    """What a task writes over of its own inputs it writes over element by element, as it reads it: the row of a residual."""
    offsets = [buffer.offset for buffer in program.buffers]
    for read, write in product(task.reads(program.machine, 0), task.writes(program.machine, 0)):
        if max(read.buffer, write.buffer) >= len(offsets):
            continue
        (a, b), (c, d) = ((offsets[x.buffer] + x.start, offsets[x.buffer] + x.stop) for x in (read, write))
        if a < d and c < b and ((a, b) != (c, d) or read.order or write.order):
            yield Unsafe("race", f"{task.stem}: writes over what its other warps still read")


def _constants(program: Program, task: Instruction) -> Iterator[tuple[int, int, int]]:
    """Start and number of the constants that a task takes, and how many at a time."""
    machine = program.machine
    if isinstance(task, SeatNorm):
        yield task.gain, machine.hidden, 4
    if isinstance(task, SeatNorm | SeatQkv | StretchGlu) and task.bias >= 0:
        rows = machine.hidden if isinstance(task, SeatNorm) else task.rows if isinstance(task, StretchGlu) else task.rows(machine)
        yield task.bias, rows, 1 if isinstance(task, StretchGlu) else 4
    if isinstance(task, SeatQkv):
        yield from ((gain, machine.head_dim, 1) for gain in (task.q_gain, task.k_gain) if gain >= 0 or machine.qk_norm)


def _product_words(program: Program, task: StretchMatMul) -> Iterator[Unsafe]:
    machine = program.machine
    if not 0 <= task.weight < len(program.matrices):
        yield Unsafe("bounds", f"{task.stem}: matrix {task.weight} of {len(program.matrices)}")
        return
    matrix = program.matrices[task.weight]
    if (matrix.rows, matrix.cols) != (task.rows, task.cols) or matrix.weights is not None:
        yield Unsafe("kind", f"{task.stem}: shape or format of matrix {matrix.name}")
        return
    tiles = -(-matrix.rows // TILE_ROWS)
    if task.tile0 % GROUP or not 0 <= task.tile0 < tiles or task.tiles != min(GROUP, tiles - task.tile0):
        yield Unsafe("bounds", f"{task.stem}: tiles of matrix {matrix.name} that are no group")
    has = len(runs(task.plan(machine)))
    if not 0 <= task.run0 < task.run0 + task.runs <= has:
        yield Unsafe("bounds", f"{task.stem}: runs of K that matrix {matrix.name} has not")
        return
    longest = max(run.count for run in runs(task.plan(machine)))
    if longest * (GROUP * FRAGMENT_BYTES + fragment_row_bytes(machine)) > machine.slot_bytes or machine.slot_bytes % COPY_BYTES:
        yield Unsafe("ring", f"{task.stem}: a chunk does not fit a slot")
    if not 0 <= task.shape < len(program.shapes):
        yield Unsafe("bounds", f"{task.stem}: shape {task.shape} of {len(program.shapes)}")
    elif (program.shapes[task.shape].cols, program.shapes[task.shape].flags) != (task.cols, 0):
        yield Unsafe("kind", f"{task.stem}: compiled shape {program.shapes[task.shape].label}")
    if task.cols != {BY_SEAT: machine.hidden, BY_HEAD: machine.heads * machine.head_dim}.get(task.x_order, task.cols):
        yield Unsafe("kind", f"{task.stem}: {task.cols} columns of x in order {task.x_order}")
    if (matrix.layout == "interleave8") != isinstance(task, StretchGlu) or isinstance(task, StretchGlu) and task.rows % TILE_ROWS:
        yield Unsafe("kind", f"{task.stem}: rows of matrix {matrix.name} in another order")
    if isinstance(task, StretchGlu) and task.runs != has:
        yield Unsafe("coverage", f"stretch_glu: activates {task.runs} of {has} runs of K")


def _products(program: Program, tasks: list[StretchMatMul]) -> Iterator[Unsafe]:
    """Each tile of each matrix takes each run of K once, and of each group the shares are numbered from 0 on."""
    for number, matrix in enumerate(program.matrices):
        own = [task for task in tasks if task.weight == number]
        groups = range(0, -(-matrix.rows // TILE_ROWS), GROUP)
        cells = Counter((task.tile0, run) for task in own for run in range(task.run0, task.run0 + task.runs))
        has = len(runs(own[0].plan(program.machine))) if own else 1
        if cells != Counter(product(groups, range(has))):
            yield Unsafe("coverage", f"the tasks do not take every run of K of every group of matrix {matrix.name} once")
        places = Counter((task.tile0, task.share) for task in own if isinstance(task, StretchSums))
        if places and places != Counter(product(groups, range(_shares(own)))):
            yield Unsafe("coverage", f"the shares of matrix {matrix.name} are not numbered from 0 on in every group")


def _shares(tasks: Iterable[StretchMatMul]) -> int:
    return 1 + max((task.share for task in tasks if isinstance(task, StretchSums)), default=-1)


def _phases(program: Program, tasks: list[Instruction]) -> Iterator[Unsafe]:
    """The tasks that publish one x, or are of one layer, are one for each seat (KV head and 8 seats), and alike but for that."""
    machine = program.machine
    seats = Counter((seat,) for seat in range(machine.batch))
    blocks = Counter(product(range(machine.kv_heads), range(0, machine.batch, SEAT_BLOCK)))
    phases: dict[tuple[object, ...], list[Instruction]] = defaultdict(list)
    for task in tasks:
        if isinstance(task, SeatNorm):
            phases[SeatNorm, task.x_buf, task.x_tag].append(task)
        elif isinstance(task, SeatQkv | StretchAttention):
            phases[type(task), task.layer].append(task)
    for key, own in phases.items():
        names = OWN_WORDS[type(own[0])]
        if Counter(tuple(getattr(task, name) for name in names) for task in own) != (blocks if len(names) > 1 else seats):
            yield Unsafe("coverage", f"{own[0].stem} {key[1:]}: not once for every {' and '.join(names)}")
        others = [name for name in vars(own[0]) if name not in (*names, *COUNTERS)]
        if any(getattr(task, name) != getattr(own[0], name) for task in own for name in others):
            yield Unsafe("coverage", f"{own[0].stem} {key[1:]}: tasks differ in what all must share")


def _layers(program: Program, tasks: list[Instruction]) -> Iterator[Unsafe]:
    """Every layer has its rows made; each but the last is attended to, the last where its q is published; q, k and v are of the layer."""
    rows = {task.layer: task for task in tasks if isinstance(task, SeatQkv)}
    attends = {task.layer: task for task in tasks if isinstance(task, StretchAttention)}
    for layer in range(program.kv.layers):
        if layer not in rows:
            yield Unsafe("coverage", f"nobody makes the KV rows of layer {layer}")
        wanted = layer + 1 < program.kv.layers or (layer in rows and rows[layer].q_buf != NONE)
        if (layer in attends) != wanted:
            yield Unsafe("coverage", f"attention of layer {layer}: {'none' if wanted else 'nobody publishes its q'}")
    for layer, task in attends.items():
        source = rows.get(layer)
        if source is None or _value(program, task.q_buf, task.q_tag) != _value(program, source.q_buf, source.q_tag):
            yield Unsafe("kind", f"attention of layer {layer} takes q of another one")
        elif _value(program, task.kv_buf, task.kv_tag) != _value(program, source.kv_buf, source.kv_tag):
            yield Unsafe("kind", f"attention of layer {layer} takes k and v of another one")


def _sums(program: Program, tasks: list[Instruction]) -> Iterator[Unsafe]:
    """Who adds shares adds all of one matrix, which has the rows that it takes."""
    made: dict[tuple[int, int], set[int]] = defaultdict(set)
    products: dict[int, list[StretchSums]] = defaultdict(list)
    for task in tasks:
        if isinstance(task, StretchSums):
            made[_value(program, task.out_buf, task.out_tag)].add(task.weight)
            products[task.weight].append(task)
    for task in tasks:
        if not isinstance(task, SeatNorm | SeatQkv) or isinstance(task, SeatNorm) and task.res_buf == NONE:
            continue
        rows = task.rows(program.machine) if isinstance(task, SeatQkv) else program.machine.hidden
        weights = made[_value(program, task.sums_buf, task.sums_tag)]
        if len(weights) != 1:
            yield Unsafe("coverage", f"{task.stem}: takes sums of {len(weights)} matrices")
            continue
        (weight,) = weights
        if program.matrices[weight].rows != rows:
            yield Unsafe("kind", f"{task.stem}: takes {rows} rows of matrix {program.matrices[weight].name}")
        if not 0 < task.shares == _shares(products[weight]):
            yield Unsafe("coverage", f"{task.stem}: adds {task.shares} of {_shares(products[weight])} shares")


def _value(program: Program, buffer: int, tag: int) -> tuple[int, int]:
    """Where a value lies, and its tag: the same through every buffer that lies there. A buffer that is not there has a place of its own."""
    known = 0 <= buffer < len(program.buffers)
    return (program.buffers[buffer].offset if known else -1 - buffer), tag
