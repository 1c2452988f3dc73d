"""Every output of a stretch is computed exactly once: cells of its products, seats, KV heads, and what one phase takes from another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import product

import numpy as np

from amk.isa.abi import NONE
from amk.isa.batch import SEAT_BLOCK
from amk.isa.instruction import Instruction
from amk.isa.seat_norm import SeatNorm
from amk.isa.seat_qkv import SeatQkv
from amk.isa.stretch import GROUP_ROWS, GROUP_TILES
from amk.isa.stretch import runs as runs_of
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_matmul import StretchMatMul
from amk.isa.stretch_sums import StretchSums
from amk.schedule.proof.coverage import uneven
from amk.schedule.proof.packets import Matching
from amk.schedule.proof.report import Region, Report
from amk.schedule.proof.subject import SHOWN, Flags, Subject

PLACED = {"wait_counter", "wait_count", "done_counter"}  # words that tasks of one phase need not share


def check_products(subject: Subject, known: Flags, report: Report) -> None:
    """Each group of tiles of each matrix takes each run of K once, and its shares have each a place of their own."""
    cells: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for number, task in enumerate(subject.tasks):
        if isinstance(task, StretchMatMul) and known[number]:
            cells[task.weight][task.tile0 // GROUP_TILES].append(number)
    for weight, matrix in enumerate(subject.program.matrices):
        groups = cells[weight]
        shares = _shares(subject, [task for tasks in groups.values() for task in tasks])
        for group in range(-(-matrix.rows // GROUP_ROWS)):
            rows = Region(matrix.name, group * GROUP_ROWS, min(matrix.rows, (group + 1) * GROUP_ROWS))
            _check_runs(subject, rows, groups[group], report)
            _check_shares(subject, rows, groups[group], shares, report)


def _shares(subject: Subject, tasks: Iterable[int]) -> int:
    """How many shares of K tasks of one matrix give: 0 where they give no shares."""
    return max((task.share + 1 for task in map(subject.tasks.__getitem__, tasks) if isinstance(task, StretchSums)), default=0)


def _check_runs(subject: Subject, rows: Region, tasks: list[int], report: Report) -> None:
    if not tasks:
        report.add("coverage", f"no task computes rows {rows}", regions=[rows])
        return
    found = {number: task for number in tasks if isinstance(task := subject.tasks[number], StretchMatMul)}
    has = len(runs_of(found[tasks[0]].plan(subject.program.machine)))
    for first, stop, held in uneven(sorted((t.run0, t.run0 + t.runs, n) for n, t in found.items()), has):
        said = f"{subject.names(held)} all compute" if held else "no task computes"
        report.add("coverage", f"{said} rows {rows} over runs {first}:{stop} of {has} of K", subject.ids(held or tasks[:SHOWN]), [rows])


def _check_shares(subject: Subject, rows: Region, tasks: list[int], shares: int, report: Report) -> None:
    takers: dict[int, list[int]] = {share: [] for share in range(shares)}
    for number in tasks:
        task = subject.tasks[number]
        if isinstance(task, StretchSums):
            takers[task.share].append(number)
    for share, held in takers.items():
        if len(held) != 1:
            said = f"{subject.names(held)} all give" if held else "no task gives"
            report.add("coverage", f"{said} share {share} of {shares} of rows {rows}", subject.ids(held or tasks[:SHOWN]), [rows])


def check_seats(subject: Subject, report: Report) -> None:
    """A phase that goes seat by seat has a task for each seat, alike but for the seat; so has attention for each KV head and 8 seats.

    Every layer of the cache gets its rows; every layer but the last is attended to, and the last where its q is asked for.
    """
    program, tasks_of_layer = subject.program, subject.program.machine.kv_heads * (subject.program.machine.batch // SEAT_BLOCK)
    if program.kv.layers > len(subject.tasks) or (program.kv.layers > 1 and tasks_of_layer > len(subject.tasks)):
        said = f"{program.kv.layers} layers of {program.machine.kv_heads} KV heads, but there are {len(subject.tasks)} tasks in all"
        report.add("coverage", f"a stretch must have tasks for each of {said}")
        return
    every = range(program.machine.batch)
    norms: dict[tuple[int, int], list[int]] = defaultdict(list)
    rows: dict[int, list[int]] = {layer: [] for layer in range(program.kv.layers)}
    attending: dict[int, list[int]] = {layer: [] for layer in range(program.kv.layers)}
    for number, task in enumerate(subject.tasks):
        if isinstance(task, SeatNorm):
            norms[task.x_buf, task.x_tag].append(number)
        elif isinstance(task, SeatQkv):
            rows[task.layer].append(number)
        elif isinstance(task, StretchAttention):
            attending[task.layer].append(number)
    for (buffer, _), tasks in norms.items():
        held = program.buffers[buffer].name if buffer < len(program.buffers) else f"buffer {buffer}"
        _once(subject, str(held), tasks, ("seat",), [(seat,) for seat in every], report)
    for layer, tasks in rows.items():
        _once(subject, f"L{layer} KV rows", tasks, ("seat",), [(seat,) for seat in every], report)
    heads = list(product(range(min(program.machine.kv_heads, len(subject.tasks))), range(0, program.machine.batch, SEAT_BLOCK)))
    for layer, tasks in attending.items():
        if layer + 1 < program.kv.layers or _asked(subject, rows[layer]):
            _once(subject, f"L{layer} attention", tasks, ("kv_head", "seat0"), heads, report)
        elif tasks:
            said = f"{subject.names(tasks)} attend in layer {layer}, of which no q is published"
            report.add("coverage", said, subject.ids(tasks[:SHOWN]))


def _asked(subject: Subject, tasks: list[int]) -> bool:
    return any(isinstance(task, SeatQkv) and task.q_buf != NONE for task in map(subject.tasks.__getitem__, tasks))


def _once(subject: Subject, what: str, tasks: list[int], names: tuple[str, ...], wanted: Iterable[tuple[int, ...]], report: Report) -> None:
    """Tasks of one phase are told apart by the words `names`: each wanted value is there once, and all other words are the same."""
    takers: dict[tuple[int, ...], list[int]] = {key: [] for key in wanted}
    for number in tasks:
        takers[tuple(getattr(subject.tasks[number], name) for name in names)].append(number)
    for key, held in takers.items():
        if len(held) != 1:
            part = ", ".join(f"{name} {value}" for name, value in zip(names, key, strict=True))
            said = f"{subject.names(held)} all compute" if held else "no task computes"
            report.add("coverage", f"{said} {part} of {what}", subject.ids(held or tasks[:SHOWN]), [Region(what, key[-1], key[-1] + 1)])
    for number in tasks[1:]:
        unlike = _unlike(subject.tasks[tasks[0]], subject.tasks[number], {*names, *PLACED})
        if unlike:
            said = f"{subject.names([tasks[0], number])} are both of {what}, but differ in {', '.join(unlike)}"
            report.add("coverage", said, subject.ids([tasks[0], number]))


def _unlike(one: Instruction, other: Instruction, but: set[str]) -> list[str]:
    a, b = vars(one), vars(other)
    return [name for name in a if name not in but and a[name] != b[name]]


def check_phases(subject: Subject, m: Matching, report: Report) -> None:
    """What a phase takes is what it takes it for: all shares of one matrix of its rows, and q, k and v of its own layer."""
    shares = _shares_of_matrices(subject)
    for readers, writers in _phases(subject, m):
        sums = [w for w in writers if isinstance(subject.tasks[w], StretchSums)]
        for number in _unlike_takers(subject, readers):
            task = subject.tasks[number]
            if isinstance(task, SeatNorm | SeatQkv) and sums:
                _check_sums(subject, number, task, sums, shares, report)
            elif isinstance(task, StretchAttention):
                _check_layer(subject, number, task, writers, report)


def _shares_of_matrices(subject: Subject) -> dict[int, int]:
    by_matrix: dict[int, list[int]] = defaultdict(list)
    for number, task in enumerate(subject.tasks):
        if isinstance(task, StretchMatMul):
            by_matrix[task.weight].append(number)
    return {weight: _shares(subject, tasks) for weight, tasks in by_matrix.items()}


def _phases(subject: Subject, m: Matching) -> Iterator[tuple[list[int], list[int]]]:
    """Tasks that read the same packets, and those that publish them."""
    known = np.flatnonzero(m.source >= 0)
    if not len(known):
        return
    readers: dict[int, list[int]] = defaultdict(list)
    writers: dict[int, list[int]] = defaultdict(list)
    writer = m.writes.task[m.written.owner[m.source[known]]]
    for found, groups, tasks in ((readers, m.groups.of, m.groups.reads.task), (writers, m.read.owner[known], writer)):
        for group, task in np.unique(np.stack([groups, tasks]), axis=1).T.tolist():
            found[group].append(task)
    for group, members in readers.items():
        yield members, writers[group]


def _unlike_takers(subject: Subject, readers: list[int]) -> list[int]:
    """One task of each kind, layer and number of shares: what is true of one is true of the others."""
    found: dict[tuple[object, ...], int] = {}
    for number in readers:
        task = subject.tasks[number]
        found.setdefault((type(task), getattr(task, "layer", 0), getattr(task, "shares", 0)), number)
    return list(found.values())


def _check_sums(
    subject: Subject, number: int, task: SeatNorm | SeatQkv, writers: list[int], shares: dict[int, int], report: Report
) -> None:
    machine = subject.program.machine
    rows = task.rows(machine) if isinstance(task, SeatQkv) else machine.hidden
    found = {writer: made for writer in writers if isinstance(made := subject.tasks[writer], StretchSums)}
    first = found[writers[0]]
    other = next((writer for writer, made in found.items() if made.weight != first.weight), None)
    who, ids = subject.names([number]), subject.ids([number, *writers[:SHOWN]])
    if other is not None:
        said = f"{who} takes sums of two matrices, by {subject.names([writers[0], other])}"
        report.add("kind", said, subject.ids([number, writers[0], other]))
    elif first.rows != rows:
        report.add("kind", f"{who} takes sums of {rows} rows, but {subject.names(writers)} publish those of {first.rows}", ids)
    elif shares[first.weight] != task.shares:
        said = f"{who} adds {task.shares} shares, but there are {shares[first.weight]} by tasks such as {subject.name(writers[0])}"
        report.add("coverage", said, ids)


def _check_layer(subject: Subject, number: int, task: StretchAttention, writers: list[int], report: Report) -> None:
    for writer in writers:
        found = subject.tasks[writer]
        if isinstance(found, SeatQkv) and found.layer != task.layer:
            said = f"{subject.names([number])} takes what {subject.names([writer])} publishes, but is in another layer"
            report.add("kind", said, subject.ids([number, writer]))
            return
