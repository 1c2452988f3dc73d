"""The program's tables make sense on their own: machine, buffers, matrices, shapes, constants, cache, counters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from itertools import pairwise
from math import isfinite
from typing import Any

from amk.isa.batch import MOST_SEATS, SEAT_BLOCK
from amk.isa.machine import ELEMENT_BYTES, KV_BLOCK_ROWS, TILE_ROWS, Machine
from amk.isa.matmul import BATCH_FLAGS
from amk.isa.matvec import X_NARROW, X_NORM
from amk.isa.weight_format import FORMAT_FLAGS, WeightFormat, format_known, known_formats
from amk.schedule.knobs import KNOBS
from amk.schedule.program import Buffer, Constant, DeviceKnobs, KvCache, Matrix, MatVecShape, Program
from amk.schedule.proof.limits import Limits
from amk.schedule.proof.report import Region, Report
from amk.schedule.resources import block_threads

MOST = (1 << 31) - 1
STRETCH_DIMS = 4  # of a head, which a stretch's attention publishes at once
COPY_BYTES = 16  # the least copy into the ring; larger ones are multiples of it
COPY_PACKETS = COPY_BYTES // 4  # of a stretch, whose packets are 4 bytes
PACKET_KINDS = ("f32", "narrow", "u32")
LAYOUTS = ("stack", "interleave8")
AUTOMATIC = "auto"  # a value that no program has: lowering puts another in its place
KNOB_VALUES = {knob.name.rpartition(".")[2]: knob.choices for knob in KNOBS}
POSITIVE = ("sms", "consumer_warps", "stages", "stage_bytes", "inflight", "reduction_slots", "hidden", "vocab", "heads", "kv_heads")


def check_tables(program: Program, limits: Limits, report: Report) -> bool:
    """Reports what is wrong with the tables; False if tasks cannot be looked at because of it."""
    if not _types(program, report):
        return False
    before = report.found.total()
    _machine(program.machine, limits, report)
    _device(program.device, report)
    _buffers(program, report)
    _matrices(program, limits, report)
    _vectors(program, report)
    _queues(program, limits, report)
    sound = before == report.found.total()
    if sound:
        _cache(program, report)
        _threads(program.machine, limits, report)
    return sound


def _types(program: Program, report: Report) -> bool:
    sound = True
    for name, kind in (("machine", Machine), ("device", DeviceKnobs), ("kv", KvCache)):
        if not isinstance(getattr(program, name), kind):
            report.add("kind", f"program.{name} must be a {kind.__name__}, but is a {type(getattr(program, name)).__name__}")
            sound = False
    lists: tuple[tuple[str, type[Any]], ...] = (
        ("buffers", Buffer),
        ("matrices", Matrix),
        ("shapes", MatVecShape),
        ("constants", Constant),
        ("counters", str),
        ("queues", tuple),
        ("streams", tuple),
    )
    for name, kind in lists:
        value = getattr(program, name)
        if not isinstance(value, tuple) or not all(isinstance(item, kind) for item in value):
            report.add("kind", f"program.{name} must be a tuple of {kind.__name__}, but holds something else")
            sound = False
    return _integers(report, "program", program, ("arena_packets", "scratch_bytes"), 0) and sound


def _integers(report: Report, where: str, record: object, names: Iterable[str], least: int, most: int = MOST) -> bool:
    """Whether each named field is an integer in [least, most]; reports those that are not."""
    wrong = [name for name in names if not _integer(getattr(record, name), least, most)]
    for name in wrong:
        shown = _shown(getattr(record, name))
        report.add("bounds", f"{where}.{name} must be an integer from {least} to {most}, but is {shown}")
    return not wrong


def _integer(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _shown(value: object) -> str:
    if type(value) is int:
        return str(value) if abs(value) < 1 << 64 else "an integer of more than 64 bits"
    return f"a {type(value).__name__}"


def _text(report: Report, where: str, value: object, allowed: tuple[str, ...]) -> bool:
    if isinstance(value, str) and value in allowed:
        return True
    shown = repr(value[:40]) if isinstance(value, str) else _shown(value)
    report.add("kind", f"{where} must be one of {', '.join(allowed)}, but is {shown}")
    return False


def _machine(machine: Machine, limits: Limits, report: Report) -> None:
    _integers(report, "machine", machine, POSITIVE, 1)
    _integers(report, "machine", machine, ("kv_lag",), -MOST)
    if _integer(machine.sms, 1, MOST) and machine.sms > limits.sms:
        report.add("resources", f"machine.sms must be at most the card's {limits.sms}, for all blocks run at once, but is {machine.sms}")
    _text(report, "machine.dtype", machine.dtype, tuple(ELEMENT_BYTES))
    if not isinstance(machine.rms_eps, int | float) or not isfinite(machine.rms_eps) or machine.rms_eps < 0:
        report.add("kind", "machine.rms_eps must be a finite number that is not negative")
    if not _integer(machine.context, 1, limits.context):
        report.add("resources", f"machine.context must be from 1 to {limits.context} rows, but is {_shown(machine.context)}")
    if not _integer(machine.tags, 1, limits.tags):
        report.add("resources", f"machine.tags must be from 1 to {limits.tags}, but is {_shown(machine.tags)}")
    if _integers(report, "machine", machine, ("head_dim",), 2, 0xFFFF) and machine.head_dim % 2:
        report.add("kind", f"machine.head_dim must be even, because RoPE rotates its halves, but is {machine.head_dim}")
    if _integers(report, "machine", machine, ("batch",), 1, 0xFFFF) and machine.batch > 1:
        _batch(machine, report)
    if type(machine.qk_norm) is not bool:
        report.add("kind", f"machine.qk_norm must be True or False, but is {machine.qk_norm!r:.20}")
    if type(machine.prefill) is not bool or machine.prefill and machine.batch == 1:
        report.add("kind", f"machine.prefill must be False, or True for a batch of more than 1, but is {machine.prefill!r:.20}")
    if _integers(report, "machine", machine, ("slot",), 0):
        _slot(machine, report)
    if _integers(report, "machine", machine, ("throttled", "watermark"), 0):
        _throttle(machine, report)
    if machine.prefill is True:
        _stretch(machine, report)
    heads = (machine.heads, machine.kv_heads)
    if all(_integer(n, 1, MOST) for n in heads) and heads[0] % heads[1]:
        report.add("kind", f"machine.heads must be a multiple of kv_heads, but they are {heads[0]} and {heads[1]}")


def _device(knobs: DeviceKnobs, report: Report) -> None:
    """Each is a value of its knob: device code knows no others, and a watcher that awaits more than all arrivals waits forever."""
    for name in (field.name for field in fields(knobs)):
        value, allowed = getattr(knobs, name), [choice for choice in KNOB_VALUES[name] if choice != AUTOMATIC]
        if type(value) not in map(type, allowed) or value not in allowed:
            shown = repr(value[:40]) if isinstance(value, str) else _shown(value)
            report.add("kind", f"device.{name} must be one of {', '.join(map(str, allowed))}, but is {shown}")


def _batch(machine: Machine, report: Report) -> None:
    """What the products of a batch are made for: whole blocks of seats, elements of 16 bits."""
    if machine.batch % SEAT_BLOCK:
        report.add("kind", f"machine.batch must be 1 or a multiple of {SEAT_BLOCK}, but is {machine.batch}")
    if machine.batch > MOST_SEATS and machine.prefill is False:
        report.add("kind", f"machine.batch must be at most {MOST_SEATS} where it is not for prefill, but is {machine.batch}")
    if machine.dtype == "fp32":
        report.add("kind", "machine.dtype must be bf16 or fp16 for a batch, but is fp32")


def _stretch(machine: Machine, report: Report) -> None:
    """Rows that a stretch's values are made of, and a feeder that never waits for a slot which only it can fill."""
    sizes = (machine.hidden, machine.heads, machine.kv_heads, machine.head_dim, machine.inflight, machine.stages)
    if not all(_integer(n, 1, MOST) for n in sizes):
        return
    if (machine.heads + 2 * machine.kv_heads) * machine.head_dim > MOST:
        report.add("resources", f"a machine for prefill must have at most {MOST} rows of q, k and v")
    if machine.hidden % TILE_ROWS or machine.heads * machine.head_dim % TILE_ROWS or machine.head_dim % STRETCH_DIMS:
        wanted = f"hidden and heads by head_dim multiples of {TILE_ROWS}, head_dim of {STRETCH_DIMS}"
        found = f"{machine.hidden}, {machine.heads} by {machine.head_dim}"
        report.add("kind", f"a machine for prefill must have {wanted}, but has {found}")
    if machine.inflight > machine.stages:
        said = f"machine.inflight must be at most the {machine.stages} stages for prefill, but is {machine.inflight}"
        report.add("deadlock", f"{said}: a feeder so far ahead of x waits for a slot that waits for x")


def _throttle(machine: Machine, report: Report) -> None:
    """A feeder that holds back begins a copy at some time, looks at slots of the ring, and never waits for one that only it can fill."""
    if machine.watermark == machine.throttled == 0:
        return
    if 0 in (machine.watermark, machine.throttled):
        said = f"both be 0 or neither, but are {machine.throttled} and {machine.watermark}"
        report.add("deadlock", f"machine.throttled and machine.watermark must {said}: a feeder that may copy nothing waits forever")
    if _integer(machine.stages, 1, MOST) and machine.watermark >= machine.stages:
        report.add("ring", f"machine.watermark must be less than the {machine.stages} stages, but is {machine.watermark}")
    if machine.prefill is True:
        said = f"machine.watermark must be 0 for prefill, but is {machine.watermark}"
        report.add("deadlock", f"{said}: a feeder that holds back waits for copies whose x it has not asked for")


def _slot(machine: Machine, report: Report) -> None:
    """A ring slot of a size of its own: of a stretch alone, and whole copies."""
    if machine.slot and machine.prefill is not True:
        report.add("ring", f"machine.slot must be 0 but for prefill: a slot is a stage; but is {machine.slot}")
    elif machine.slot % COPY_BYTES:
        report.add("ring", f"machine.slot must be a multiple of {COPY_BYTES} bytes, but is {machine.slot}")


def _buffers(program: Program, report: Report) -> None:
    before = report.found.total()
    for number, buffer in enumerate(program.buffers):
        where = f"buffer {number} ({buffer.name})"
        known = _text(report, f"{where}: kind", buffer.kind, PACKET_KINDS) and _text(
            report, f"{where}: space", buffer.space, ("arena", "weights")
        )
        sized = _integers(report, where, buffer, ("offset", "packets"), 0)
        if known and sized and buffer.space == "arena" and buffer.offset + buffer.packets > program.arena_packets:
            region = Region(str(buffer.name), 0, buffer.packets)
            end = buffer.offset + buffer.packets
            report.add("bounds", f"{where} ends at packet {end}, but the arena has {program.arena_packets}", regions=[region])
    if program.machine.prefill is True and before == report.found.total():
        _apart(program.buffers, report)


def _apart(buffers: tuple[Buffer, ...], report: Report) -> None:
    """Of a stretch: copies take whole 16 bytes. A value's packets lie in an order of its own, so two share all of them or none."""
    for number, buffer in enumerate(buffers):
        if buffer.offset % COPY_PACKETS:
            said = f"begins at packet {buffer.offset}, but in a stretch must at a multiple of {COPY_PACKETS}: 16 bytes"
            report.add("bounds", f"buffer {number} ({buffer.name}) {said}", regions=[Region(str(buffer.name), 0, buffer.packets)])
    held = sorted((b for b in buffers if b.packets and b.space == "arena"), key=lambda b: (b.offset, b.offset + b.packets))
    for one, other in pairwise(held):
        alike = (one.offset, one.packets, one.kind) == (other.offset, other.packets, other.kind)
        if other.offset < one.offset + one.packets and not alike:
            regions = [Region(str(b.name), 0, b.packets) for b in (one, other)]
            said = f"{regions[0]} ({one.kind}) at packet {one.offset} and {regions[1]} ({other.kind}) at packet {other.offset}"
            report.add("kind", f"buffers {said} share some packets, but in a stretch must share none, or all in one kind", regions=regions)


def _matrices(program: Program, limits: Limits, report: Report) -> None:
    tiles = 0
    for number, matrix in enumerate(program.matrices):
        where = f"matrix {number} ({matrix.name})"
        _text(report, f"{where}: layout", matrix.layout, LAYOUTS)
        _weights(report, where, matrix.weights, program.machine.dtype)
        if _integers(report, where, matrix, ("rows", "cols"), 1):
            tiles += -(-matrix.rows // TILE_ROWS)
    kinds = [matrix.weights for matrix in program.matrices if isinstance(matrix.weights, WeightFormat)]
    if len({weights.floating for weights in kinds}) > 1:
        names = sorted({weights.name for weights in kinds})
        report.add("kind", f"the codes of all matrices must be integers, or all fp8, but are {' and '.join(names)}")
    if tiles > limits.tiles:
        report.add("resources", f"the matrices must have at most {limits.tiles} tiles of {TILE_ROWS} rows, but have {tiles}")
    for number, shape in enumerate(program.shapes):
        _integers(report, f"shape {number}", shape, ("cols",), 1)
        allowed = X_NARROW | X_NORM | FORMAT_FLAGS | (BATCH_FLAGS if program.machine.batch != 1 else 0)
        if _integers(report, f"shape {number}", shape, ("flags",), 0, allowed) and not format_known(shape.flags):
            report.add("kind", f"shape {number}.flags must name a weight format, but are {shape.flags}")


def _weights(report: Report, where: str, weights: object, dtype: str) -> None:
    """A format that the device decodes; quantised weights need 16-bit activations."""
    if weights is None:
        return
    if not isinstance(weights, WeightFormat) or all(weights != known for known in known_formats()):
        report.add("kind", f"{where}: weights must be None or one of the weight formats, but is {weights!r:.80}")
    elif dtype == "fp32":
        report.add("kind", f"{where}: weights in {weights.name} need a machine of bf16 or fp16, but it is fp32")


def _vectors(program: Program, report: Report) -> None:
    for number, constant in enumerate(program.constants):
        _integers(report, f"constant {number} ({constant.name})", constant, ("start", "count"), 0)
    _integers(report, "kv", program.kv, ("layers", "heads", "rows"), 0)


def _queues(program: Program, limits: Limits, report: Report) -> None:
    for name in ("queues", "streams"):
        if len(getattr(program, name)) != program.machine.sms:
            report.add("bounds", f"program.{name} must have one entry for each of machine.sms SMs, but has {len(getattr(program, name))}")
    if len(program.counters) > limits.counters:
        report.add("resources", f"a program may have at most {limits.counters} counters, but has {len(program.counters)}")


def _cache(program: Program, report: Report) -> None:
    """The cache holds the context, and the feeder waits long enough for the rows that it streams."""
    machine, kv = program.machine, program.kv
    if not kv.layers:
        return
    if kv.rows % KV_BLOCK_ROWS:
        report.add("bounds", f"kv.rows must be a multiple of {KV_BLOCK_ROWS}, but is {kv.rows}")
    if kv.rows < machine.context:
        region = Region("kv", kv.rows, machine.context)
        report.add(
            "bounds", f"the KV window of position {machine.context - 1} goes past the cache of {kv.rows} rows: {region}", regions=[region]
        )
    if kv.heads != machine.kv_heads:
        report.add("kind", f"kv.heads must be machine.kv_heads ({machine.kv_heads}), but is {kv.heads}")


def _threads(machine: Machine, limits: Limits, report: Report) -> None:
    threads = block_threads(machine)
    if threads > limits.threads:
        report.add(
            "resources", f"a block may have at most {limits.threads} threads, but {machine.consumer_warps} consumer warps need {threads}"
        )
