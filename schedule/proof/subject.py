"""The tasks of a program in one flat list, their words as columns, and their names in messages."""

from __future__ import annotations

from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any

import numpy as np
import numpy.typing as npt

from amk.isa.attention import Attention
from amk.isa.batch import SEAT_BLOCK
from amk.isa.instruction import Instruction
from amk.isa.machine import TILE_ROWS
from amk.isa.matvec import MatVec
from amk.isa.registry import instructions, word_fields
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_matmul import StretchMatMul
from amk.schedule.program import Program, TaskId
from amk.schedule.proof.limits import Limits
from amk.schedule.proof.report import Report

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]
SHOWN = 4  # tasks that one message names
WORD_RANGE = {"u16": (0, (1 << 16) - 1), "i32": (-(1 << 31), (1 << 31) - 1)}


@dataclass(frozen=True)
class Words:
    """The tasks of one instruction class: their numbers in the flat list and each word as a column."""

    cls: type[Instruction]
    ids: Ints
    column: dict[str, Ints]


@dataclass(frozen=True)
class Subject:
    """What the proof looks at. `sm` and `index` place each task of `tasks`; `first[sm]` is the number of an SM's first task."""

    program: Program
    tasks: list[Instruction]
    sm: Ints
    index: Ints
    words: list[Words]

    def id(self, task: int) -> TaskId:
        return int(self.sm[task]), int(self.index[task])

    def name(self, task: int) -> str:
        """`0.398 (gemv L3.down rows 0:16)`: SM, place in its queue, what it is."""
        sm, index = self.id(task)
        return f"{sm}.{index} ({self._what(self.tasks[task])})"

    def names(self, tasks: Any) -> str:
        """`task 0.1 (...)`, or `tasks 0.1 (...), 0.2 (...) and 5 more`."""
        numbers = [int(t) for t in tasks]
        shown = [self.name(t) for t in numbers[:SHOWN]]
        rest = len(numbers) - len(shown)
        if len(numbers) == 1:
            return f"task {shown[0]}"
        return f"tasks {', '.join(shown)} and {rest} more" if rest else f"tasks {', '.join(shown[:-1])} and {shown[-1]}"

    def ids(self, tasks: Any) -> list[TaskId]:
        return [self.id(int(t)) for t in tasks]

    def _rows(self, weight: int, tile0: int, tiles: int, rows: int) -> str:
        matrices, first = self.program.matrices, tile0 * TILE_ROWS
        name = matrices[weight].name if 0 <= weight < len(matrices) else f"matrix {weight}"
        return f"{name} rows {first}:{min(rows, first + tiles * TILE_ROWS)}"

    def _what(self, task: Instruction) -> str:
        if isinstance(task, MatVec):
            return f"{task.stem} {self._rows(task.weight, task.tile0, task.tiles, task.rows)}"
        if isinstance(task, Attention):
            return f"attention L{task.layer} head {task.kv_head} split {task.split}"
        words = vars(task)
        if isinstance(task, StretchMatMul):
            return f"{task.stem} {self._rows(task.weight, task.tile0, task.tiles, task.rows)} runs {task.run0}:{task.run0 + task.runs}"
        if isinstance(task, StretchAttention):
            return f"{task.stem} L{task.layer} head {task.kv_head} seats {task.seat0}:{task.seat0 + SEAT_BLOCK}"
        if "seat" in words:
            layer = f" L{words['layer']}" if "layer" in words else ""
            return f"{task.stem}{layer} seat {words['seat']}"
        if "col0" in words:
            return f"{task.stem} columns {words['col0']}:{words['col0'] + words.get('count', words.get('cols', 0))}"
        return task.stem


def take_subject(program: Program, limits: Limits, report: Report) -> Subject | None:
    """The tasks of a program whose tables are sound; None if some task is not an instruction that the device knows, word by word."""
    tasks: list[Any] = [task for queue in program.queues for task in queue]
    lengths = [len(queue) for queue in program.queues]
    sm = np.repeat(np.arange(len(lengths), dtype=np.int64), lengths)
    index = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths] or [np.zeros(0, np.int64)])
    where = [(int(s), int(i)) for s, i in zip(sm.tolist(), index.tolist(), strict=True)]
    sound = _known(tasks, where, limits, report)
    if not sound:
        return None
    by_class: dict[type[Instruction], list[int]] = {}
    for number, task in enumerate(tasks):
        by_class.setdefault(type(task), []).append(number)
    words = [_words(cls, ids, tasks, where, report) for cls, ids in by_class.items()]
    found = [w for w in words if w is not None]
    return Subject(program, tasks, sm, index, found) if len(found) == len(words) else None


def _known(tasks: list[Any], where: list[TaskId], limits: Limits, report: Report) -> bool:
    classes = set(instructions().values())
    kinds = {type(task) for task in tasks}
    strange = kinds - classes
    without = {cls for cls in kinds & classes if cls.stem not in limits.handlers}
    if strange or without:
        for task, at in zip(tasks, where, strict=True):
            if type(task) in strange or type(task) in without:
                name = type(task).stem if type(task) in without else type(task).__name__
                report.add("handler", f"task {at[0]}.{at[1]} ({name}): its instruction has no device code", [at])
    return not strange


def _words(cls: type[Instruction], ids: list[int], tasks: list[Any], where: list[TaskId], report: Report) -> Words | None:
    names = [f.name for f in fields(cls)]
    read = attrgetter(*names)
    rows = [read(tasks[i]) for i in ids]
    ranges = [WORD_RANGE[f.ctype] for f in word_fields(cls) if f.name in names]
    kinds = {kind for row in rows for kind in set(map(type, row))}
    if kinds <= {int}:
        table = _table(rows)
        if table is not None:
            low, high = (np.array(bound) for bound in zip(*ranges, strict=True))
            if bool(((table >= low) & (table <= high)).all()):
                return Words(cls, np.array(ids, dtype=np.int64), {name: table[:, i] for i, name in enumerate(names)})
    for number, row in zip(ids, rows, strict=True):
        for name, value, (low_word, high_word) in zip(names, row, ranges, strict=True):
            if type(value) is not int or not low_word <= value <= high_word:
                sm, index = where[number]
                said = f"task {sm}.{index} ({cls.stem}): its word {name} must be an integer from {low_word} to {high_word}"
                report.add("bounds", said, [(sm, index)])
    return None


def _table(rows: list[tuple[int, ...]]) -> Ints | None:
    try:
        return np.array(rows, dtype=np.int64)
    except OverflowError:
        return None
