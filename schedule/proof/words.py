"""Each task's words agree with the tables: matrices, shapes, constants, heads, columns and counters."""

from __future__ import annotations

import numpy as np

from amk.isa.abi import NONE
from amk.isa.attention import MAX_GROUP, Attention
from amk.isa.batch import RUN
from amk.isa.embed import Embed
from amk.isa.embed_batch import EmbedBatch
from amk.isa.filter_draw import FilterDraw
from amk.isa.filter_head import FilterHead
from amk.isa.gemm import Gemm
from amk.isa.gemm_glu import GemmGlu
from amk.isa.gemm_head import GemmHead
from amk.isa.gemv_glu import GemvGlu
from amk.isa.gemv_glu_rows import rows_possible
from amk.isa.gemv_head import GemvHead
from amk.isa.machine import KV_BLOCK_ROWS, TILE_ROWS
from amk.isa.matmul import OUT_BY_SEAT, X_BY_SEAT
from amk.isa.matvec import X_NARROW, X_NORM, MatVec
from amk.isa.rmsnorm import RmsNorm
from amk.isa.sample import Sample
from amk.isa.sample_batch import SampleBatch
from amk.isa.swiglu import SwiGlu
from amk.isa.weight_format import FORMAT_FLAGS
from amk.schedule.proof.checker import VECTOR, Checker, agreed_matrix, compiled_shape, head_gains, in_vectors, inside_constant, looked_up
from amk.schedule.proof.report import Report
from amk.schedule.proof.stretch_words import check_stretch_words
from amk.schedule.proof.subject import Flags, Ints, Subject, Words


def check_words(subject: Subject, report: Report) -> Flags:
    """Reports words that do not agree with the tables; returns which tasks have a footprint that can be asked for."""
    checker = Checker(subject, report, np.zeros(len(subject.tasks), dtype=bool))
    for words in subject.words:
        _counters(checker, words)
        _batch(checker, words)
        _gated(checker, words)
        if words.cls.gated:
            if checker.subject.program.machine.prefill:
                check_stretch_words(checker, words)
        elif issubclass(words.cls, MatVec):
            _matvec(checker, words)
        elif words.cls is Attention:
            _attention(checker, words)
        elif words.cls in (Embed, EmbedBatch):
            _embed(checker, words)
        elif words.cls is RmsNorm:
            _rmsnorm(checker, words)
        elif words.cls is SwiGlu:
            _swiglu(checker, words)
        elif issubclass(words.cls, Sample | SampleBatch):
            checker.must(words, words.column["count"] >= 1, "bounds", "must read at least one candidate, but reads none")
        elif words.cls is FilterDraw:
            _filter_draw(checker, words)
    return ~checker.broken


def _counters(checker: Checker, words: Words) -> None:
    has = len(checker.subject.program.counters)
    for name in ("wait_counter", "done_counter"):
        at = words.column[name]
        said = f"names {name} {{at}}, but the program has {{has}} counters"
        checker.must(words, (at == NONE) | (at < has), "bounds", said, at=at, has=has)


def _batch(checker: Checker, words: Words) -> None:
    """A machine of one token runs instructions of one token; that of a batch those of its batch, and attention, which has one seat."""
    batch = checker.subject.program.machine.batch
    tasks = np.ones(len(words.ids), dtype=bool)
    found = words.column["batch"] if words.cls.batched else np.where(tasks, batch if words.cls is Attention else 1, 0)
    checker.must(words, found == batch, "kind", "computes {found} tokens at once, but the machine {batch}", found=found, batch=batch)


def _gated(checker: Checker, words: Words) -> None:
    """A machine that does prefill runs gated instructions alone, and no other machine runs any: data without tags could look like a tag."""
    prefill = checker.subject.program.machine.prefill
    machine = "that does prefill" if prefill else "of sequences side by side"
    checker.must(words, np.full(len(words.ids), words.cls.gated == prefill), "kind", f"has no place on a machine {machine}")


def _matmul(checker: Checker, words: Words) -> None:
    """x is narrow, interleaved values are whole runs, and what a product writes by seat has no residual."""
    flags, cols = words.column["flags"], words.column["cols"]
    by_seat, normalised = (flags & X_BY_SEAT) > 0, (flags & X_NORM) > 0
    checker.must(words, (flags & X_NARROW) > 0, "kind", "reads fp32 packets, but products of a batch read narrow ones")
    whole = ~normalised | (cols % TILE_ROWS == 0)
    checker.must(words, whole, "kind", "normalises {cols} columns, but they must be a multiple of {run}", cols=cols, run=TILE_ROWS)
    even = ~by_seat | (cols % RUN == 0)
    checker.must(words, even, "kind", "reads {cols} columns by seat, but they must be a multiple of {run}", cols=cols, run=RUN)
    checker.need(words, (flags & FORMAT_FLAGS) == 0, "kind", "decodes quantised weights, but products of a batch take elements")
    if words.cls is Gemm:
        apart, residual, rows = (flags & OUT_BY_SEAT) > 0, words.column["res_buf"] != NONE, words.column["rows"]
        checker.need(words, ~(apart & residual), "kind", "writes by seat, but has a residual, which is interleaved")
        said = "writes {rows} interleaved rows, but they must be a multiple of {run}"
        checker.must(words, apart | (rows % TILE_ROWS == 0), "kind", said, rows=rows, run=TILE_ROWS)
    else:
        checker.need(words, (flags & OUT_BY_SEAT) == 0, "kind", "writes by seat, but must not")


def _one_vector(checker: Checker, words: Words) -> None:
    """x comes in fp32 packets where it is normalised, and two at a time."""
    flags, cols, machine = words.column["flags"], words.column["cols"], checker.subject.program.machine
    narrow, normalised = (flags & X_NARROW) > 0, (flags & X_NORM) > 0
    checker.need(words, ~(narrow & normalised), "kind", "normalises narrow packets, but products of one token normalise fp32 ones")
    pair = np.where(narrow, 2 * machine.narrow, 2)
    checker.need(words, cols % pair == 0, "kind", "reads {cols} columns, but they must fill pairs of packets, {pair}", cols=cols, pair=pair)


def _matvec(checker: Checker, words: Words) -> None:
    matrices, column = checker.subject.program.matrices, words.column
    rows, cols = column["rows"], column["cols"]
    known, agreed, at = agreed_matrix(checker, words)
    (_matmul if words.cls.batched else _one_vector)(checker, words)
    _tiles(checker, words, agreed)
    _weights(checker, words, known, at)
    compiled_shape(checker, words, column["flags"])
    inside_constant(checker, words, "gain", cols, needed=(column["flags"] & X_NORM) > 0)
    in_vectors(checker, words, "gain", VECTOR if words.cls.batched else VECTOR // 2)
    inside_constant(checker, words, "bias", rows, needed=column["bias"] >= 0)
    if words.cls.by_rows:
        _rows(checker, words)
    if issubclass(words.cls, GemvGlu | GemmGlu):
        interleaved = np.array([m.layout == "interleave8" and m.rows % TILE_ROWS == 0 for m in matrices] or [False])[at]
        checker.need(words, ~agreed | interleaved, "kind", "needs gate and up rows interleaved by 8 in whole tiles, but its matrix is not")
    if issubclass(words.cls, GemvHead | GemmHead | FilterHead):
        vocab = checker.subject.program.machine.vocab
        said = "takes a head of {rows} rows, but the vocabulary has {vocab}"
        checker.need(words, rows == vocab, "kind", said, rows=rows, vocab=vocab)


def _tiles(checker: Checker, words: Words, agreed: Flags) -> None:
    tile0, tiles = words.column["tile0"], words.column["tiles"]
    has = -(-words.column["rows"] // TILE_ROWS)
    inside = (tile0 >= 0) & (tiles >= 1) & (tile0 + tiles <= has)
    said = "takes tiles {tile0}:{stop}, but its matrix has tiles 0:{has}"
    checker.must(words, ~agreed | inside, "bounds", said, tile0=tile0, stop=tile0 + tiles, has=has)


def _weights(checker: Checker, words: Words, known: Flags, at: Ints) -> None:
    """The format that a task decodes is the one in which its matrix is streamed."""
    matrices = checker.subject.program.matrices
    found, has = words.column["flags"] & FORMAT_FLAGS, looked_up([m.weights.flags if m.weights else 0 for m in matrices], at)
    said = "decodes weights of format {found}, but matrix {at} is streamed in format {has} (flag bits of isa.weight_format)"
    checker.must(words, ~known | (found == has), "kind", said, found=found, at=at, has=has)


def _rows(checker: Checker, words: Words) -> None:
    """A warp that takes a whole tile waits for one chunk, and its code knows codes of 4 bits in groups. It depends on few words, so
    equal ones are asked once.
    """
    machine, cols, flags = checker.subject.program.machine, words.column["cols"], words.column["flags"]
    keys = list(zip(cols.tolist(), flags.tolist(), strict=True))
    asked = {key: rows_possible(machine, *key) for key in set(keys)}
    said = (
        "shares out tiles of {cols} columns in format {flags}, but they must be one chunk of 4-bit codes in groups, as many for each warp"
    )
    holds = np.array([asked[key] for key in keys], dtype=bool)
    checker.need(words, holds, "kind", said, cols=cols, flags=flags & FORMAT_FLAGS)


def _attention(checker: Checker, words: Words) -> None:
    program, column = checker.subject.program, words.column
    layer, split, splits, unit, window = (column[name] for name in ("layer", "split", "splits", "unit_rows", "window"))
    said = "is in layer {layer}, but the KV cache has {has}"
    checker.need(words, layer < program.kv.layers, "bounds", said, layer=layer, has=program.kv.layers)
    checker.must(words, split < splits, "bounds", "is split {split} of {splits}", split=split, splits=splits)
    whole = (unit >= KV_BLOCK_ROWS) & (unit % KV_BLOCK_ROWS == 0)
    said = "deals units of {unit} rows, but a unit must be whole blocks of {block}"
    checker.must(words, whole, "kind", said, unit=unit, block=KV_BLOCK_ROWS)
    checker.must(words, window >= 0, "bounds", "has a window of {window} rows, but must have 0 (none) or more", window=window)
    _heads(checker, words)
    head_gains(checker, words)


def _heads(checker: Checker, words: Words) -> None:
    machine, kv = checker.subject.program.machine, checker.subject.program.kv
    q0, nq, head, group = words.column["q0"], words.column["nq"], words.column["kv_head"], machine.heads // machine.kv_heads
    has = min(machine.kv_heads, kv.heads)
    checker.need(words, head < has, "bounds", "takes KV head {head}, but the KV cache has {has}", head=head, has=has)
    sized = (nq >= 1) & (nq <= MAX_GROUP)
    checker.must(words, sized, "kind", "takes {nq} query heads, but must take 1 to {most}", nq=nq, most=MAX_GROUP)
    first, stop = head * group, (head + 1) * group
    grouped = (q0 >= first) & (q0 + nq <= stop) | (head >= has) | ~sized
    said = "takes query heads {q0}:{q1}, but KV head {head} serves {first}:{stop}"
    checker.need(words, grouped, "kind", said, q0=q0, q1=q0 + nq, head=head, first=first, stop=stop)


def _embed(checker: Checker, words: Words) -> None:
    start, cols, hidden = words.column["col0"], words.column["cols"], checker.subject.program.machine.hidden
    inside = (start >= 0) & (cols >= 1) & (start + cols <= hidden)
    said = "gathers columns {start}:{stop}, but an embedding row has {hidden}"
    checker.must(words, inside, "bounds", said, start=start, stop=start + cols, hidden=hidden)
    reach = int((start + cols).max())
    if reach < hidden:  # device code finds a token's row at so many times `hidden` elements
        said = f"embed tasks gather columns up to {reach}, but must gather all {hidden} of an embedding row"
        checker.report.add("bounds", said, checker.subject.ids(words.ids.tolist()))
    if words.cls is EmbedBatch:
        whole = (start % TILE_ROWS == 0) & (cols % TILE_ROWS == 0)
        said = "must begin and end at multiples of {run} columns, but takes {cols} from {start}"
        checker.must(words, whole, "kind", said, start=start, cols=cols, run=TILE_ROWS)


def _rmsnorm(checker: Checker, words: Words) -> None:
    start, count, cols = words.column["col0"], words.column["count"], words.column["cols"]
    inside = (start >= 0) & (count >= 1) & (start + count <= cols)
    said = "publishes columns {start}:{stop} of a norm over {cols}"
    checker.must(words, inside, "bounds", said, start=start, stop=start + count, cols=cols)
    aligned = (start % TILE_ROWS == 0) & ((count % TILE_ROWS == 0) | (start + count == cols))
    said = "must begin and end at multiples of 16 columns, but takes {count} from {start}"
    checker.need(words, aligned, "kind", said, start=start, count=count)
    inside_constant(checker, words, "gain", cols, needed=np.ones(len(start), dtype=bool))


def _swiglu(checker: Checker, words: Words) -> None:
    start, count, narrow = words.column["col0"], words.column["count"], checker.subject.program.machine.narrow
    checker.must(words, (start >= 0) & (count >= 1), "bounds", "takes columns {start}:{stop}", start=start, stop=start + count)
    said = "must begin at a whole packet of {narrow} elements, but begins at {start}"
    checker.need(words, start % narrow == 0, "kind", said, start=start, narrow=narrow)


def _filter_draw(checker: Checker, words: Words) -> None:
    tiles, has = words.column["tiles"], -(-checker.subject.program.machine.vocab // TILE_ROWS)
    checker.must(words, tiles == has, "bounds", "reads {tiles} tiles of scores, but the vocabulary has {has}", tiles=tiles, has=has)
