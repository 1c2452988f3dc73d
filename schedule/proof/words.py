"""Each task's words agree with the tables: matrices, shapes, constants, heads, columns and counters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from amk.isa.abi import NONE
from amk.isa.attention import MAX_GROUP, Attention
from amk.isa.embed import Embed
from amk.isa.gemv_glu import GemvGlu
from amk.isa.gemv_head import GemvHead
from amk.isa.machine import KV_BLOCK_ROWS, TILE_ROWS
from amk.isa.matvec import X_NORM, MatVec
from amk.isa.rmsnorm import RmsNorm
from amk.isa.sample import Sample
from amk.isa.swiglu import SwiGlu
from amk.schedule.proof.report import Kind, Report
from amk.schedule.proof.subject import Flags, Ints, Subject, Words


@dataclass
class Checker:
    """Checks conditions over the tasks of one class; `broken` marks tasks whose footprint cannot be asked for."""

    subject: Subject
    report: Report
    broken: Flags

    def need(self, words: Words, holds: Flags, kind: Kind, said: Callable[[int], str], *, breaks: bool = False) -> None:
        """Reports each task where `holds` is False with `said(row)`, a sentence that goes on after the task's name."""
        for row in np.flatnonzero(~holds).tolist():
            task = int(words.ids[row])
            self.broken[task] |= breaks
            if self.report.full(kind):
                self.report.count(kind, 1)
            else:
                self.report.add(kind, f"{self.subject.names([task])} {said(row)}", self.subject.ids([task]))


def check_words(subject: Subject, report: Report) -> Flags:
    """Reports words that do not agree with the tables; returns which tasks have a footprint that can be asked for."""
    checker = Checker(subject, report, np.zeros(len(subject.tasks), dtype=bool))
    for words in subject.words:
        _counters(checker, words)
        if issubclass(words.cls, MatVec):
            _matvec(checker, words)
        elif words.cls is Attention:
            _attention(checker, words)
        elif words.cls is Embed:
            _embed(checker, words)
        elif words.cls is RmsNorm:
            _rmsnorm(checker, words)
        elif words.cls is SwiGlu:
            _swiglu(checker, words)
        elif words.cls is Sample:
            checker.need(words, words.column["count"] >= 1, "bounds", lambda row: "must read at least one candidate, but reads none", breaks=True)
    return ~checker.broken


def _counters(checker: Checker, words: Words) -> None:
    known = len(checker.subject.program.counters)
    for name in ("wait_counter", "done_counter"):
        at = words.column[name]
        said = _said(lambda row, at=at, name=name: f"names {name} {at[row]}, but the program has {known} counters")
        checker.need(words, (at == NONE) | (at < known), "bounds", said)


def _said(sentence: Callable[[int], str]) -> Callable[[int], str]:
    return sentence


def _matvec(checker: Checker, words: Words) -> None:
    program, column = checker.subject.program, words.column
    weight, rows, cols = column["weight"], column["rows"], column["cols"]
    known = weight < len(program.matrices)
    checker.need(words, known, "bounds", lambda row: f"names matrix {weight[row]} of {len(program.matrices)}", breaks=True)
    at = np.where(known, weight, 0)
    has_rows, has_cols = _looked_up([m.rows for m in program.matrices], at), _looked_up([m.cols for m in program.matrices], at)
    same = ~known | ((rows == has_rows) & (cols == has_cols))
    checker.need(
        words,
        same,
        "kind",
        lambda row: f"takes a matrix of {rows[row]} by {cols[row]}, but {program.matrices[at[row]].name} is {has_rows[row]} by {has_cols[row]}",
        breaks=True,
    )
    _tiles(checker, words, known & same)
    _shape(checker, words)
    _inside_constant(checker, words, "gain", cols, needed=(column["flags"] & X_NORM) > 0)
    _inside_constant(checker, words, "bias", rows, needed=column["bias"] >= 0)
    if words.cls is GemvGlu:
        interleaved = np.array([m.layout == "interleave8" and m.rows % TILE_ROWS == 0 for m in program.matrices] or [False])
        needs = "needs gate and up rows interleaved by 8 in whole tiles, but its matrix is not laid out so"
        checker.need(words, ~(known & same) | interleaved[at], "kind", lambda row: needs)
    if words.cls is GemvHead:
        vocab = program.machine.vocab
        checker.need(words, rows == vocab, "kind", lambda row: f"takes a head of {rows[row]} rows, but the vocabulary has {vocab}")


def _tiles(checker: Checker, words: Words, agreed: Flags) -> None:
    tile0, tiles = words.column["tile0"], words.column["tiles"]
    has = -(-words.column["rows"] // TILE_ROWS)
    inside = (tile0 >= 0) & (tiles >= 1) & (tile0 + tiles <= has)
    said = _said(lambda row: f"takes tiles {tile0[row]}:{tile0[row] + tiles[row]}, but its matrix has tiles 0:{has[row]}")
    checker.need(words, ~agreed | inside, "bounds", said, breaks=True)


def _shape(checker: Checker, words: Words) -> None:
    shapes = checker.subject.program.shapes
    shape, cols, flags = words.column["shape"], words.column["cols"], words.column["flags"]
    known = shape < len(shapes)
    checker.need(words, known, "bounds", lambda row: f"names shape {shape[row]} of {len(shapes)}")
    at = np.where(known, shape, 0)
    same = (cols == _looked_up([s.cols for s in shapes], at)) & (flags == _looked_up([s.flags for s in shapes], at))
    said = _said(
        lambda row: f"has {cols[row]} columns and flags {flags[row]}, but shape {shape[row]} is compiled for {shapes[at[row]].cols} and {shapes[at[row]].flags}"
    )
    checker.need(words, ~known | same, "kind", said)


def _looked_up(values: list[int], at: Ints) -> Ints:
    return np.array(values or [0], dtype=np.int64)[at]


def _inside_constant(checker: Checker, words: Words, name: str, count: Ints, needed: Flags) -> None:
    """Elements [word, word + count) must lie within one constant, where they are needed."""
    constants = sorted(checker.subject.program.constants, key=lambda c: (c.start, c.count))
    starts = np.array([c.start for c in constants], dtype=np.int64)
    stops = np.maximum.accumulate(np.array([c.start + c.count for c in constants], dtype=np.int64)) if constants else starts
    at = words.column[name]
    place = np.searchsorted(starts, at, side="right") - 1
    stop = stops[np.maximum(place, 0)] if constants else np.zeros_like(at)
    inside = (at >= 0) & (place >= 0) & (at + count <= stop)
    said = _said(lambda row: f"reads constants [{at[row]}:{at[row] + count[row]}] as its {name}, but no constant lies there")
    checker.need(words, ~needed | inside, "bounds", said)


def _attention(checker: Checker, words: Words) -> None:
    program, column = checker.subject.program, words.column
    machine, kv = program.machine, program.kv
    q0, nq, head, group = column["q0"], column["nq"], column["kv_head"], machine.heads // machine.kv_heads
    layer, split, splits, unit = column["layer"], column["split"], column["splits"], column["unit_rows"]
    checker.need(words, layer < kv.layers, "bounds", lambda row: f"is in layer {layer[row]}, but the KV cache has {kv.layers}")
    known = head < min(machine.kv_heads, kv.heads)
    checker.need(words, known, "bounds", lambda row: f"takes KV head {head[row]}, but the KV cache has {min(machine.kv_heads, kv.heads)}")
    sized = (nq >= 1) & (nq <= MAX_GROUP)
    checker.need(words, sized, "kind", lambda row: f"takes {nq[row]} query heads, but must take 1 to {MAX_GROUP}", breaks=True)
    grouped = (q0 >= head * group) & (q0 + nq <= (head + 1) * group)
    owns = _said(lambda row: f"takes query heads {q0[row]}:{q0[row] + nq[row]}, but KV head {head[row]} serves {head[row] * group}:{(head[row] + 1) * group}")
    checker.need(words, ~(known & sized) | grouped, "kind", owns)
    checker.need(words, split < splits, "bounds", lambda row: f"is split {split[row]} of {splits[row]}", breaks=True)
    whole = (unit >= KV_BLOCK_ROWS) & (unit % KV_BLOCK_ROWS == 0)
    checker.need(words, whole, "kind", lambda row: f"deals units of {unit[row]} rows, but a unit must be whole blocks of {KV_BLOCK_ROWS}", breaks=True)
    window = column["window"]
    checker.need(words, window >= 0, "bounds", lambda row: f"has a window of {window[row]} rows, but must have 0 (none) or more", breaks=True)
    dim = np.full_like(q0, machine.head_dim)
    for name in ("q_gain", "k_gain"):
        _inside_constant(checker, words, name, dim, needed=column[name] >= 0)


def _embed(checker: Checker, words: Words) -> None:
    start, cols, hidden = words.column["col0"], words.column["cols"], checker.subject.program.machine.hidden
    inside = (start >= 0) & (cols >= 1) & (start + cols <= hidden)
    said = _said(lambda row: f"gathers columns {start[row]}:{start[row] + cols[row]}, but an embedding row has {hidden}")
    checker.need(words, inside, "bounds", said, breaks=True)


def _rmsnorm(checker: Checker, words: Words) -> None:
    start, count, cols = words.column["col0"], words.column["count"], words.column["cols"]
    inside = (start >= 0) & (count >= 1) & (start + count <= cols)
    said = _said(lambda row: f"publishes columns {start[row]}:{start[row] + count[row]} of a norm over {cols[row]}")
    checker.need(words, inside, "bounds", said, breaks=True)
    aligned = (start % 16 == 0) & ((count % 16 == 0) | (start + count == cols))
    checker.need(words, aligned, "kind", lambda row: f"must begin and end at multiples of 16 columns, but takes {count[row]} from {start[row]}")
    _inside_constant(checker, words, "gain", cols, needed=np.ones(len(start), dtype=bool))


def _swiglu(checker: Checker, words: Words) -> None:
    start, count = words.column["col0"], words.column["count"]
    inside = (start >= 0) & (count >= 1)
    checker.need(words, inside, "bounds", lambda row: f"takes columns {start[row]}:{start[row] + count[row]}", breaks=True)
    narrow = checker.subject.program.machine.narrow
    checker.need(words, start % narrow == 0, "kind", lambda row: f"must begin at a whole packet of {narrow} elements, but begins at {start[row]}")
