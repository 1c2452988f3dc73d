"""Pass 6: the tasks of every queue, with names resolved to buffers, tags, counters, matrices and constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, singledispatch

from amk.isa.abi import NONE
from amk.isa.attention import Attention
from amk.isa.draw import Draw
from amk.isa.draw_head import DrawHead
from amk.isa.embed import Embed
from amk.isa.embed_batch import EmbedBatch
from amk.isa.filter_draw import FilterDraw
from amk.isa.filter_head import TILE_PACKETS, FilterHead
from amk.isa.gemm import Gemm
from amk.isa.gemm_glu import GemmGlu
from amk.isa.gemm_head import GemmHead
from amk.isa.gemv import Gemv
from amk.isa.gemv_glu import GemvGlu
from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Instruction
from amk.isa.matvec import MatVec
from amk.isa.rmsnorm import RmsNorm
from amk.isa.sample import Sample
from amk.isa.sample_batch import SampleBatch
from amk.isa.swiglu import SwiGlu
from amk.schedule.emit_stretch import stretch_task
from amk.schedule.fuse import CANDIDATES
from amk.schedule.graph import AttentionOp, EmbedOp, Graph, MatVecOp, NormOp, Op, SampleOp, StretchOp, SwiGluOp
from amk.schedule.memory import Arena
from amk.schedule.names import Names
from amk.schedule.place import Placement, Run
from amk.schedule.program import Buffer, MatVecShape
from amk.schedule.synchronise import arrives

MATVEC: dict[str, type[MatVec]] = {cls.stem: cls for cls in (Gemv, GemvGlu, GemvHead, Gemm, GemmGlu, GemmHead, DrawHead, FilterHead)}


@dataclass(frozen=True)
class Queues:
    """Tasks of every SM in order, and of every op one task, which needs as much scratch as the others of its op."""

    queues: tuple[tuple[Instruction, ...], ...]
    samples: tuple[Instruction, ...]


def emit(graph: Graph, placement: Placement, names: Names, sms: int) -> Queues:
    """Queues in op order. Within attention the splits come before the tails on every SM: a tail waits for splits, never the other way."""
    queues: list[list[Instruction]] = [[] for _ in range(sms)]
    samples = []
    for op in graph.ops:
        runs = placement[op.name]
        tasks = list(zip(runs, _tasks(op, runs, names), strict=True))
        if isinstance(op, AttentionOp):
            tasks.sort(key=lambda pair: arrives(op, pair[0].start))
        for run, task in tasks:
            queues[run.sm].append(task)
        samples.append(tasks[0][1])
    return Queues(tuple(map(tuple, queues)), tuple(samples))


def buffers_of(graph: Graph, arena: Arena) -> tuple[Buffer, ...]:
    """A buffer for each value, then one for each seat of those that lie by seat, in the order of `Names`."""
    values = [Buffer(v.name, v.kind, arena.offsets[v.name], v.packets) for v in graph.values]
    parts = [(v, seat, v.packets // v.seats) for v in graph.values if v.seats > 1 for seat in range(v.seats)]
    seats = [Buffer(f"{v.name}@{seat}", v.kind, arena.offsets[v.name] + seat * size, size) for v, seat, size in parts]
    return (*values, *seats)


@singledispatch
def _tasks(op: Op, runs: tuple[Run, ...], names: Names) -> list[Instruction]:
    raise TypeError(f"{op.name}: no pass turns a {type(op).__name__} into tasks; add one to emit.py")


@_tasks.register
def _embed(op: EmbedOp, runs: tuple[Run, ...], names: Names) -> list[Instruction]:
    out = op.writes[0]
    make: Callable[..., Instruction] = Embed if op.batch == 1 else partial(EmbedBatch, batch=op.batch)
    token = op.reads[0].value
    return [
        make(
            token_buf=names.buffers[token],
            token_tag=names.sync.tags[token],
            out_buf=names.buffers[out],
            out_tag=names.sync.tags[out],
            col0=run.start,
            cols=run.stop - run.start,
            **names.hints(op, run.start),
        )
        for run in runs
    ]


@_tasks.register
def _norm(op: NormOp, runs: tuple[Run, ...], names: Names) -> list[Instruction]:
    x, out = op.reads[0].value, op.writes[0]
    return [
        RmsNorm(
            x_buf=names.buffers[x],
            x_tag=names.sync.tags[x],
            out_buf=names.buffers[out],
            out_tag=names.sync.tags[out],
            cols=op.cols,
            col0=run.start,
            count=run.stop - run.start,
            gain=names.constants[op.gain],
            **names.hints(op, run.start),
        )
        for run in runs
    ]


@_tasks.register
def _matvec(op: MatVecOp, runs: tuple[Run, ...], names: Names) -> list[Instruction]:
    x, out = op.reads[0].value, op.writes[0]
    residual = op.reads[1].value if len(op.reads) > 1 else None
    shape, cls, hints = names.shapes.index(MatVecShape(op.cols, op.flags)), MATVEC[op.stem], names.hints(op, 0)
    x_buf, x_tag, out_buf, out_tag = names.buffers[x], names.sync.tags[x], names.buffers[out], names.sync.tags[out]
    res_buf, res_tag = (NONE, 0) if residual is None else (names.buffers[residual], names.sync.tags[residual])
    weight, gain, bias = names.matrices[op.name], names.constant(op.gain), names.constant(op.bias)
    batch = {} if op.batch == 1 else {"batch": op.batch}
    return [
        cls(
            shape=shape,
            flags=op.flags,
            weight=weight,
            x_buf=x_buf,
            x_tag=x_tag,
            out_buf=out_buf,
            out_tag=out_tag,
            tile0=run.start,
            tiles=run.stop - run.start,
            cols=op.cols,
            rows=op.rows,
            out_start=2 * op.batch * number if out == CANDIDATES else 0,
            gain=gain,
            bias=bias,
            res_buf=res_buf,
            res_tag=res_tag,
            **batch,
            **hints,
        )
        for number, run in enumerate(runs)
    ]


@_tasks.register
def _attention(op: AttentionOp, runs: tuple[Run, ...], names: Names) -> list[Instruction]:
    q, k, v = (read.value for read in op.reads[:3])
    out, partials = op.writes[-1], op.writes[0] if op.splits > 1 else None
    tags, seats = names.sync.tags, names.seats
    part_tag = 0 if partials is None else tags[partials]

    def task(unit: int) -> Attention:
        of_seat, split = divmod(unit, op.splits)
        seat, head = divmod(of_seat, op.kv_heads)
        return Attention(
            q_buf=seats[q][seat],
            q_tag=tags[q],
            k_buf=seats[k][seat],
            k_tag=tags[k],
            v_buf=seats[v][seat],
            v_tag=tags[v],
            part_buf=NONE if partials is None else seats[partials][seat],
            part_tag=part_tag,
            out_buf=seats[out][seat],
            out_tag=tags[out],
            layer=seat * op.layers + op.layer,
            q0=head * op.group,
            nq=op.group,
            kv_head=head,
            split=split,
            splits=op.splits,
            unit_rows=names.unit_rows,
            k_start=op.k_offset + head * op.head_dim,
            v_start=op.v_offset + head * op.head_dim,
            window=op.window,
            q_gain=names.constant(op.q_gain),
            k_gain=names.constant(op.k_gain),
            **names.hints(op, unit),
        )

    return [task(run.start) for run in runs]


@_tasks.register
def _stretch(op: StretchOp, runs: tuple[Run, ...], names: Names) -> list[Instruction]:
    return [stretch_task(op, run.start, names) for run in runs]


@_tasks.register
def _swiglu(op: SwiGluOp, runs: tuple[Run, ...], names: Names) -> list[Instruction]:
    (gate, up), out = (read.value for read in op.reads), op.writes[0]
    return [
        SwiGlu(
            gate_buf=names.buffers[gate],
            gate_tag=names.sync.tags[gate],
            up_buf=names.buffers[up],
            up_tag=names.sync.tags[up],
            out_buf=names.buffers[out],
            out_tag=names.sync.tags[out],
            col0=run.start,
            count=run.stop - run.start,
            **names.hints(op, run.start),
        )
        for run in runs
    ]


@_tasks.register
def _sample(op: SampleOp, runs: tuple[Run, ...], names: Names) -> list[Instruction]:
    scores, out = op.reads[0].value, op.writes[0]
    in_buf, in_tag, out_buf, out_tag = names.buffers[scores], names.sync.tags[scores], names.buffers[out], names.sync.tags[out]
    packets, hints = names.packets[scores], names.hints(op, 0)
    if op.stem == FilterDraw.stem:
        return [FilterDraw(in_buf=in_buf, in_tag=in_tag, out_buf=out_buf, out_tag=out_tag, tiles=packets // TILE_PACKETS, **hints)]
    make = partial(SampleBatch, batch=op.batch) if op.batch > 1 else Draw if op.stem == Draw.stem else Sample
    return [make(in_buf=in_buf, in_tag=in_tag, out_buf=out_buf, out_tag=out_tag, count=packets // (2 * op.batch), **hints)]
