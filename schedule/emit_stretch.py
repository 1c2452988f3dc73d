"""Pass 6 of a stretch: the task of each unit of its ops."""

from __future__ import annotations

from functools import singledispatch
from typing import Any

from amk.isa.batch import SEAT_BLOCK
from amk.isa.instruction import Instruction
from amk.isa.machine import TILE_ROWS
from amk.isa.seat_norm import SeatNorm
from amk.isa.seat_qkv import SeatQkv
from amk.isa.stretch import GROUP_TILES
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_glu import StretchGlu
from amk.isa.stretch_sums import StretchSums
from amk.schedule.graph import SeatNormOp, SeatQkvOp, StretchAttentionOp, StretchMatMulOp, StretchOp
from amk.schedule.names import Names, shape_of
from amk.schedule.shares import share_runs


@singledispatch
def stretch_task(op: StretchOp, unit: int, names: Names) -> Instruction:
    """The task of unit `unit` of `op`."""
    raise TypeError(f"{op.name}: no pass turns a {type(op).__name__} into tasks; add one to emit_stretch.py")


def _value(word: str, name: str, names: Names) -> dict[str, int]:
    """The words of a value: its buffer and its tag."""
    return {f"{word}_buf": names.buffers[name], f"{word}_tag": names.sync.tags[name]}


@stretch_task.register
def _seat_norm(op: SeatNormOp, unit: int, names: Names) -> Instruction:
    read = {k: v for word, r in zip(("res", "sums"), op.reads, strict=False) for k, v in _value(word, r.value, names).items()}
    return SeatNorm(
        **read,
        **_value("h", op.writes[0], names),
        **_value("x", op.writes[1], names),
        shares=op.shares,
        seat=unit,
        batch=op.batch,
        gain=names.constant(op.gain),
        bias=names.constant(op.bias),
        **names.hints(op, unit),
    )


@stretch_task.register
def _seat_qkv(op: SeatQkvOp, unit: int, names: Names) -> Instruction:
    written = {k: v for word, name in zip(("q", "kv"), op.writes, strict=False) for k, v in _value(word, name, names).items()}
    return SeatQkv(
        **_value("sums", op.reads[0].value, names),
        **written,
        shares=op.shares,
        layer=op.layer,
        seat=unit,
        batch=op.batch,
        bias=names.constant(op.bias),
        q_gain=names.constant(op.q_gain),
        k_gain=names.constant(op.k_gain),
        **names.hints(op, unit),
    )


@stretch_task.register
def _product(op: StretchMatMulOp, unit: int, names: Names) -> Instruction:
    share, group = divmod(unit, op.groups)
    own, tile0, shape = share_runs(op.runs, op.shares, share), group * GROUP_TILES, shape_of(op)
    assert shape is not None
    words: dict[str, Any] = {
        "weight": names.matrices[op.name],
        "shape": names.shapes.index(shape),
        **_value("x", op.reads[0].value, names),
        **_value("out", op.writes[0], names),
        "tile0": tile0,
        "tiles": min(GROUP_TILES, -(-op.rows // TILE_ROWS) - tile0),
        "run0": own.start,
        "runs": len(own),
        "x_order": op.x_order,
        "batch": op.batch,
        "cols": op.cols,
        "rows": op.rows,
        **names.hints(op, unit),
    }
    if op.stem == StretchGlu.stem:
        return StretchGlu(bias=names.constant(op.bias), **words)
    return StretchSums(share=share, **words)


@stretch_task.register
def _attention(op: StretchAttentionOp, unit: int, names: Names) -> Instruction:
    head, block = divmod(unit, op.batch // SEAT_BLOCK)
    return StretchAttention(
        **_value("q", op.reads[0].value, names),
        **_value("kv", op.reads[1].value, names),
        **_value("out", op.writes[0], names),
        layer=op.layer,
        kv_head=head,
        seat0=block * SEAT_BLOCK,
        batch=op.batch,
        window=op.window,
        **names.hints(op, unit),
    )
