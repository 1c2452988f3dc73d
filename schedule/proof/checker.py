"""What checks of words are made of: conditions over all tasks of one class, and what several classes must agree with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amk.schedule.proof.report import Kind, Report
from amk.schedule.proof.subject import Flags, Ints, Subject, Words

VECTOR = 4  # elements of 16 bytes of fp32


@dataclass
class Checker:
    """Checks conditions over the tasks of one class; `broken` marks tasks whose footprint cannot be asked for."""

    subject: Subject
    report: Report
    broken: Flags

    def need(self, words: Words, holds: Flags, kind: Kind, sentence: str, **values: Ints | int) -> None:
        """Reports each task where `holds` is False: `sentence` goes on after the task's name, its {fields} are the task's `values`."""
        for row in np.flatnonzero(~holds).tolist():
            if self.report.full(kind):
                self.report.count(kind, 1)
                continue
            task = int(words.ids[row])
            told = {name: value if isinstance(value, int) else int(value[row]) for name, value in values.items()}
            self.report.add(kind, f"{self.subject.names([task])} {sentence.format(**told)}", self.subject.ids([task]))

    def must(self, words: Words, holds: Flags, kind: Kind, sentence: str, **values: Ints | int) -> None:
        """`need` of something without which the task's footprint or waits cannot be asked for."""
        self.broken[words.ids[~holds]] = True
        self.need(words, holds, kind, sentence, **values)


def agreed_matrix(checker: Checker, words: Words) -> tuple[Flags, Flags, Ints]:
    """Whether each task's matrix is there, and whether its rows and columns are the task's; and the matrix, 0 where there is none."""
    matrices, column = checker.subject.program.matrices, words.column
    weight, rows, cols = column["weight"], column["rows"], column["cols"]
    known = weight < len(matrices)
    checker.must(words, known, "bounds", "names matrix {weight}, but the program has {has}", weight=weight, has=len(matrices))
    at = np.where(known, weight, 0)
    has_rows, has_cols = looked_up([m.rows for m in matrices], at), looked_up([m.cols for m in matrices], at)
    agreed = known & (rows == has_rows) & (cols == has_cols)
    said = "takes a matrix of {rows} by {cols}, but matrix {at} is {has_rows} by {has_cols}"
    checker.must(words, ~known | agreed, "kind", said, rows=rows, cols=cols, at=at, has_rows=has_rows, has_cols=has_cols)
    return known, agreed, at


def compiled_shape(checker: Checker, words: Words, flags: Ints) -> None:
    """There is device code for the columns of a product and its flags."""
    shapes = checker.subject.program.shapes
    shape, cols = words.column["shape"], words.column["cols"]
    known = shape < len(shapes)
    checker.need(words, known, "bounds", "names shape {shape}, but the program has {has}", shape=shape, has=len(shapes))
    at = np.where(known, shape, 0)
    has_cols, has_flags = looked_up([s.cols for s in shapes], at), looked_up([s.flags for s in shapes], at)
    same = (cols == has_cols) & (flags == has_flags)
    said = "has {cols} columns and flags {flags}, but shape {at} is compiled for {has_cols} and {has_flags}"
    checker.need(words, ~known | same, "kind", said, cols=cols, flags=flags, at=at, has_cols=has_cols, has_flags=has_flags)


def looked_up(values: list[int], at: Ints) -> Ints:
    return np.array(values or [0], dtype=np.int64)[at]


def inside_constant(checker: Checker, words: Words, name: str, count: Ints, needed: Flags) -> None:
    """Elements [word, word + count) must lie within the constants, where they are needed."""
    constants = sorted(checker.subject.program.constants, key=lambda c: (c.start, c.count))
    starts = np.array([c.start for c in constants] or [0], dtype=np.int64)
    stops = np.maximum.accumulate(np.array([c.start + c.count for c in constants] or [0], dtype=np.int64))
    at = words.column[name]
    place = np.searchsorted(starts, at, side="right") - 1
    inside = (at >= 0) & (place >= 0) & (at + count <= stops[np.maximum(place, 0)])
    said = f"reads constants [{{at}}:{{stop}}] as its {name}, but no constant lies there"
    checker.need(words, ~needed | inside, "bounds", said, at=at, stop=at + count)


def in_vectors(checker: Checker, words: Words, name: str, vector: int) -> None:
    """Constants that are loaded `vector` elements at a time begin at a multiple of as many; a word below 0 names none."""
    at, said = words.column[name], f"loads its {name} in vectors, so it must be at a multiple of {{vector}}, but is at {{at}}"
    checker.need(words, (at < 0) | (at % vector == 0), "bounds", said, vector=vector, at=at)


def head_gains(checker: Checker, words: Words) -> None:
    """The gains of head norms lie within the constants: the device takes one for each head where the machine norms them."""
    machine = checker.subject.program.machine
    dim = np.full(len(words.ids), machine.head_dim, dtype=np.int64)
    for name in ("q_gain", "k_gain"):
        inside_constant(checker, words, name, dim, needed=(words.column[name] >= 0) | machine.qk_norm)
