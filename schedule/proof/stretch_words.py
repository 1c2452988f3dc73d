"""The words of a stretch's tasks agree with the tables: matrices, groups of tiles, runs of K, seats, heads and constants."""

from __future__ import annotations

import numpy as np

from amk.isa.abi import NONE
from amk.isa.batch import SEAT_BLOCK
from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, chunk_plan
from amk.isa.seat_norm import SeatNorm
from amk.isa.seat_qkv import SeatQkv
from amk.isa.stretch import BY_HEAD, BY_SEAT, GROUP_TILES, MOST_SHARES, X_ORDERS, runs, slot_bytes
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_glu import StretchGlu
from amk.isa.stretch_matmul import StretchMatMul
from amk.schedule.proof.checker import VECTOR, Checker, agreed_matrix, compiled_shape, head_gains, in_vectors, inside_constant
from amk.schedule.proof.subject import Flags, Words

MOST_RUNS = 0xFFFF


def check_stretch_words(checker: Checker, words: Words) -> None:
    """Reports the words of tasks of one gated class that do not agree with the tables."""
    if issubclass(words.cls, StretchMatMul):
        _product(checker, words)
    elif words.cls is SeatNorm:
        _seat_norm(checker, words)
    elif words.cls is SeatQkv:
        _seat_qkv(checker, words)
    elif words.cls is StretchAttention:
        _attention(checker, words)


def _product(checker: Checker, words: Words) -> None:
    machine, column = checker.subject.program.machine, words.column
    known, agreed, at = agreed_matrix(checker, words)
    _group(checker, words, agreed)
    need = FRAGMENT_BYTES * machine.consumer_warps
    fits = np.full(len(words.ids), machine.stage_bytes >= need)
    said = "needs chunks of a fragment a consumer warp, {need} bytes, but a stage has {has}"
    checker.must(words, fits, "ring", said, need=need, has=machine.stage_bytes)
    if fits.all():
        _runs(checker, words, agreed)
    order, cols = column["x_order"], column["cols"]
    checker.must(words, order < len(X_ORDERS), "kind", "reads x in order {order}, but there are {has}", order=order, has=len(X_ORDERS))
    wide = np.where(order == BY_SEAT, machine.hidden, np.where(order == BY_HEAD, machine.heads * machine.head_dim, cols))
    said = "reads x of {cols} columns, but who writes it in that order gives {wide}"
    checker.need(words, cols == wide, "kind", said, cols=cols, wide=wide)
    compiled_shape(checker, words, np.zeros_like(cols))
    matrices = checker.subject.program.matrices
    plain = np.array([m.weights is None for m in matrices] or [False])[at]
    checker.need(words, ~known | plain, "kind", "takes elements, but its matrix has quantised weights")
    paired = np.array([m.layout == "interleave8" and m.rows % TILE_ROWS == 0 for m in matrices] or [False])[at]
    if words.cls is StretchGlu:
        checker.need(words, ~agreed | paired, "kind", "needs gate and up rows interleaved by 8 in whole tiles, but its matrix is not")
        inside_constant(checker, words, "bias", column["rows"], needed=column["bias"] >= 0)
    else:
        stacked = np.array([m.layout == "stack" for m in matrices] or [False])[at]
        checker.need(words, ~agreed | stacked, "kind", "gives sums of rows in order, but its matrix has gate and up rows interleaved")


def _group(checker: Checker, words: Words, agreed: Flags) -> None:
    """A group is 8 tiles from a multiple of 8 on; the last of a matrix may have fewer, and none other."""
    tile0, tiles = words.column["tile0"], words.column["tiles"]
    has = -(-words.column["rows"] // TILE_ROWS)
    whole = (tile0 % GROUP_TILES == 0) & (tile0 < has) & (tiles == np.minimum(GROUP_TILES, has - tile0))
    said = "takes tiles {tile0}:{stop} of 0:{has}, but a task takes {group} from a multiple of {group} on, or the last"
    checker.must(words, ~agreed | whole, "bounds", said, tile0=tile0, stop=tile0 + tiles, has=has, group=GROUP_TILES)


def _runs(checker: Checker, words: Words, agreed: Flags) -> None:
    """Runs of K that the matrix has: some of them for a share, all for an activation."""
    machine, column = checker.subject.program.machine, words.column
    few = agreed & _few_runs(checker, words, agreed)
    run0, count, cols, agreed = column["run0"], column["runs"], np.where(few, column["cols"], 1), few
    plans = {each: runs(chunk_plan(machine, each)) for each in np.unique(cols).tolist()}
    has = np.array([len(plans[each]) for each in cols.tolist()], dtype=np.int64)
    longest = {each: max(run.count for run in plan) for each, plan in plans.items()}
    need = np.array([slot_bytes(machine, longest[each]) for each in cols.tolist()], dtype=np.int64)
    said = "needs {need} bytes of a ring slot for the longest run of 8 tiles and its x, but a slot has {slot}"
    checker.need(words, ~agreed | (need <= machine.slot_bytes), "ring", said, need=need, slot=machine.slot_bytes)
    inside = (count >= 1) & (run0 + count <= has)
    said = "takes runs {run0}:{stop} of K, but its matrix has runs 0:{has}"
    checker.must(words, ~agreed | inside, "bounds", said, run0=run0, stop=run0 + count, has=has)
    if words.cls is StretchGlu:
        said = "activates what runs {run0}:{stop} of K give, but must take all of 0:{has}"
        checker.need(words, ~agreed | ~inside | (count == has), "coverage", said, run0=run0, stop=run0 + count, has=has)


def _few_runs(checker: Checker, words: Words, agreed: Flags) -> Flags:
    """Whether a matrix has so few runs of K that words can name them."""
    machine, cols = checker.subject.program.machine, words.column["cols"]
    plans = {each: chunk_plan(machine, each) for each in np.unique(cols[agreed]).tolist()}
    most = np.array([plans[each].chunks * plans[each].warps if ok else 0 for each, ok in zip(cols.tolist(), agreed.tolist(), strict=True)])
    few: Flags = most <= MOST_RUNS
    checker.must(words, few, "bounds", "takes a matrix of {cols} columns, whose runs of K no word can name", cols=cols)
    return few


def _seated(checker: Checker, words: Words, name: str, each: int) -> None:
    seat, has = words.column[name], checker.subject.program.machine.batch
    said = "begins at seat {seat}, but must at a multiple of {each} below {has}"
    checker.must(words, (seat % each == 0) & (seat < has), "bounds", said, seat=seat, each=each, has=has)


def _layered(checker: Checker, words: Words) -> None:
    layer, has = words.column["layer"], checker.subject.program.kv.layers
    checker.must(words, layer < has, "bounds", "is in layer {layer}, but the KV cache has {has}", layer=layer, has=has)


def _shared(checker: Checker, words: Words, needed: Flags) -> None:
    shares, said = words.column["shares"], "adds {shares} shares, but must from 1 to {most}"
    checker.must(words, ~needed | (shares >= 1) & (shares <= MOST_SHARES), "bounds", said, shares=shares, most=MOST_SHARES)


def _seat_norm(checker: Checker, words: Words) -> None:
    hidden = np.full(len(words.ids), checker.subject.program.machine.hidden, dtype=np.int64)
    _seated(checker, words, "seat", 1)
    _shared(checker, words, words.column["res_buf"] != NONE)
    inside_constant(checker, words, "gain", hidden, needed=np.ones(len(hidden), dtype=bool))
    inside_constant(checker, words, "bias", hidden, needed=words.column["bias"] >= 0)
    in_vectors(checker, words, "gain", VECTOR)
    in_vectors(checker, words, "bias", VECTOR)


def _seat_qkv(checker: Checker, words: Words) -> None:
    machine, column = checker.subject.program.machine, words.column
    _seated(checker, words, "seat", 1)
    _layered(checker, words)
    _shared(checker, words, np.ones(len(words.ids), dtype=bool))
    rows = np.full(len(words.ids), machine.head_dim * (machine.heads + 2 * machine.kv_heads), dtype=np.int64)
    inside_constant(checker, words, "bias", rows, needed=column["bias"] >= 0)
    in_vectors(checker, words, "bias", VECTOR)
    head_gains(checker, words)


def _attention(checker: Checker, words: Words) -> None:
    machine, column = checker.subject.program.machine, words.column
    _layered(checker, words)
    _seated(checker, words, "seat0", SEAT_BLOCK)
    head, window = column["kv_head"], column["window"]
    checker.must(words, head < machine.kv_heads, "bounds", "takes KV head {head}, but there are {has}", head=head, has=machine.kv_heads)
    checker.need(words, window >= 0, "bounds", "has a window of {window} rows, but must have 0 (none) or more", window=window)
