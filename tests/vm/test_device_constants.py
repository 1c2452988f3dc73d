"""Facts that Python and the device code both write down are the same: constants, enums, structs, and how a tile is cut."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from amk.isa import abi, attention, batch, filter_draw, filter_head, machine, matmul, matvec, sampling, stretch, weight_format
from amk.isa.attention import Attention
from amk.isa.machine import Machine, chunk_plan
from amk.isa.registry import instructions, task_dtype
from amk.isa.weight_format import WeightFormat, known_formats
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.resources import REDUCTION_FLOATS, SERVICE_WARPS, block_threads, shared_layout
from amk.schedule.targets import small_target
from amk.tests.vm.device_text import Scope, enumerators, struct_dtype
from amk.vm.abort import ACTORS, END_WORD, FAILURES, WAITS, AbortCode, Actor, WaitKind
from amk.vm.cuda import program_image
from amk.vm.source import ELEMENT, IMAGE_HEAD_BYTES, TEST_MACROS, batch_constants, constants, group
from amk.vm.trace import EVENT_DTYPE, TASK_BEGINS

DEVICE = "isa/device/"
# What a constant needs to be known lies in these.
SHARED = tuple(DEVICE + name for name in ("types.cuh", "element.cuh", "block.cuh", "weight_format.cuh", "plan.cuh", "attention_rows.cuh"))


# ---- numbers

NUMBERS: dict[str, dict[str, float]] = {
    "isa/device/attention_rows.cuh": {
        "KV_BLOCK_ROWS": machine.KV_BLOCK_ROWS,
        "PARTIAL_HEAD": attention.PARTIAL_HEAD,
        "LOG2E": attention.LOG2E,
    },
    "isa/device/block.cuh": {
        "TILE_ROWS": machine.TILE_ROWS,
        "FRAGMENT_BYTES": machine.FRAGMENT_BYTES,
        "SLOT_ROW": REDUCTION_FLOATS,
        "NONE": abi.NONE,
    },
    "isa/device/fixed_point.cuh": {"DIGITS": matvec.DIGITS},
    "isa/device/matmul.cuh": {"X_BY_SEAT": matmul.X_BY_SEAT, "OUT_BY_SEAT": matmul.OUT_BY_SEAT, "X_KEPT": matmul.X_KEPT},
    "isa/device/plan.cuh": {"X_NARROW": matvec.X_NARROW, "X_NORM": matvec.X_NORM},
    "isa/device/sampling.cuh": {
        "FINITE": float(sampling.FINITE),
        "LEAST_EXPONENT": float(sampling.LEAST_EXPONENT),
        "ROOT_HALF_BITS": sampling.ROOT_HALF_BITS,
    },
    "isa/device/stretch.cuh": {"GROUP_TILES": stretch.GROUP_TILES, "GROUP_ROWS": stretch.GROUP_ROWS},
    "isa/device/sync.cuh": {"END_WORD": END_WORD},
    "isa/device/trace.cuh": {"TRACE_TASK_BEGINS": TASK_BEGINS},
    "isa/device/weight_format.cuh": {
        "W_INT8": weight_format.FORMAT_BITS[8],
        "W_INT4": weight_format.FORMAT_BITS[4],
        "W_ASYMMETRIC": weight_format.ASYMMETRIC,
        "W_FP16_SCALE": weight_format.FP16_SCALE,
        "SCALES_BYTES": machine.TILE_ROWS * weight_format.SCALE_BYTES,
    },
    "isa/filter_draw.cuh": {
        "QUEUE_TILES": filter_draw.QUEUE_TILES,
        "BINS": filter_draw.BINS,
        "SHARED_WORDS": filter_draw.SHARED_WORDS,
    },
    "isa/filter_head.cuh": {"ROW_PACKETS": filter_head.ROW_PACKETS, "TILE_PACKETS": filter_head.TILE_PACKETS},
    "isa/stretch_attention.cuh": {"STRETCH_SEATS": batch.SEAT_BLOCK},
}


@pytest.mark.parametrize(("path", "name"), [(path, name) for path, names in NUMBERS.items() for name in names])
def test_a_number_is_the_same_on_the_device(path: str, name: str) -> None:
    found, meant = Scope(path, {}, SHARED).value(name), NUMBERS[path][name]
    assert found == meant or (isinstance(meant, float) and np.float32(found) == np.float32(meant))


def test_a_number_that_is_gone_is_missed() -> None:
    with pytest.raises(AssertionError, match="plan.cuh must define the constant X_WIDE"):
        Scope("isa/device/plan.cuh", {}, SHARED).value("X_WIDE")


# ---- enums

ENUMS: dict[tuple[str, str], dict[str, int]] = {
    ("isa/device/sync.cuh", "AbortCode"): {"ABORT_NONE": 0} | {f"ABORT_{code.name}": code for code in AbortCode},
    ("isa/device/sync.cuh", "Actor"): {actor.name: actor for actor in Actor},
    ("isa/device/sync.cuh", "WaitKind"): {f"WAIT_{kind.name}": kind for kind in WaitKind},
    ("isa/device/element.cuh", "Element"): {f"ELEMENT_{dtype.upper()}": number for dtype, number in ELEMENT.items()},
}


@pytest.mark.parametrize(("path", "name"), ENUMS)
def test_an_enum_has_the_same_names_and_numbers_on_the_device(path: str, name: str) -> None:
    assert enumerators(path, name) == ENUMS[path, name]


def test_every_word_of_the_abort_record_has_a_text() -> None:
    assert (set(FAILURES), set(ACTORS), set(WAITS)) == (set(AbortCode), {0, *Actor}, {0, *WaitKind})


# ---- structs


def layout(dtype: np.dtype[Any]) -> dict[str, tuple[str, int]]:
    """Type and offset of each field."""
    assert dtype.fields is not None
    return {name: (str(field[0]), int(field[1])) for name, field in dtype.fields.items()}


def test_an_event_of_a_trace_lies_as_the_host_reads_it() -> None:
    found = struct_dtype("isa/device/trace.cuh", "TraceEvent")
    assert (layout(found), found.itemsize) == (layout(EVENT_DTYPE), EVENT_DTYPE.itemsize)


def test_every_task_begins_with_the_fields_that_all_actors_read() -> None:
    head = layout(struct_dtype("isa/device/block.cuh", "TaskHead"))
    for cls in instructions().values():
        assert head.items() <= layout(task_dtype(cls)).items(), cls.__name__


def test_the_kernel_finds_in_an_image_what_the_host_put_there(make_spec: Any) -> None:
    head = struct_dtype("vm/device/kernel.cu", "ImageHead")
    assert head.itemsize == IMAGE_HEAD_BYTES
    program = lowered(make_spec("bf16"))
    offsets = torch.arange(len(program.queues)) * 1000 + 16
    image = program_image(program, SimpleNamespace(offsets=offsets))  # type: ignore[arg-type]  # all that it asks of weights
    for sm, (queue, entries) in enumerate(zip(program.queues, program.streams, strict=True)):
        found = image[sm, :IMAGE_HEAD_BYTES].view(head)[0]
        appends = any(isinstance(task, Attention) and task.split == 0 for task in queue)
        said = [int(found[name]) for name in ("tasks", "entries", "weights", "appends_rows")]
        assert said == [len(queue), len(entries), 1000 * sm + 16, appends]


# ---- what follows from a program's sizes


def lowered(spec: Any, rows: int = 1, prefill: bool = False) -> Program:
    return lower(spec, Config(), small_target(4), batch=rows, prefill=prefill)


def given(program: Program) -> dict[str, Any]:
    """What the source of a program defines before the device code."""
    sizes = constants(program, shared_layout(program), TEST_MACROS) | batch_constants(program)
    return sizes | {"ELEMENT": ELEMENT[program.machine.dtype], "GATED": int(program.machine.prefill), "TURING": 0, "__CUDA_ARCH__": 900}


def of_every_program(m: Machine, program: Program) -> dict[str, dict[str, int]]:
    return {
        "isa/device/element.cuh": {
            "ELEMENT_BYTES": m.element_bytes,
            "NARROW": m.narrow,
            "FRAGMENT_COLUMNS": m.fragment_columns,
        },
        "isa/device/block.cuh": {"BLOCK_THREADS": block_threads(m)},
        "isa/device/trace.cuh": {"TRACE_WARPS": m.consumer_warps + SERVICE_WARPS},
        "isa/device/attention_rows.cuh": {
            "KV_BLOCK_BYTES": m.kv_block_bytes,
            "KV_BLOCKS_PER_CHUNK": m.kv_blocks_per_chunk,
            "PARTIAL_ROW": m.padded_head_dim + attention.PARTIAL_HEAD,
            "TWO_PART": m.dtype != "fp32" and group(program) <= attention.TWO_PART_GROUP,
        },
    }


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("heads", [2, 8, 16])
def test_sizes_of_a_program_are_the_same_on_the_device(dtype: str, heads: int, make_spec: Any) -> None:
    program = lowered(make_spec(dtype, heads=heads, kv_heads=2))
    for path, names in of_every_program(program.machine, program).items():
        scope = Scope(path, given(program), SHARED)
        assert {name: scope.value(name) for name in names} == names


def test_sizes_of_a_batch_are_the_same_on_the_device(make_spec: Any) -> None:
    program = lowered(make_spec("bf16"), 16)
    assert Scope("isa/device/batch.cuh", given(program), SHARED).value("SEAT_BLOCKS") == 16 // batch.SEAT_BLOCK
    assert Scope("isa/device/matmul.cuh", {"SEAT_BLOCKS": 1}).value("SETS") == batch.MOST_SEATS // batch.SEAT_BLOCK


@pytest.mark.parametrize("rows", [32, 128])
def test_sizes_of_a_stretch_are_the_same_on_the_device(rows: int, make_spec: Any) -> None:
    program = lowered(make_spec("bf16"), rows, prefill=True)
    m, scope = program.machine, Scope("isa/device/stretch.cuh", given(program), SHARED)
    assert scope.value("SEAT_BLOCKS") == rows // batch.SEAT_BLOCK
    assert scope.value("FRAGMENT_ROW_BYTES") == stretch.fragment_row_bytes(m)
    assert stretch.slot_bytes(m, scope.value("SLOT_FRAGMENTS")) == m.slot_bytes


# ---- how a tile is cut

FORMATS: list[WeightFormat | None] = [None, *sorted(known_formats(), key=lambda form: form.flags)]
COLUMNS = (64, 576, 1000, 1536, 2048, 8192, 14336)


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: f"{form.name} {form.scale}" if form else "elements")
def test_a_tile_is_cut_in_the_same_way_on_the_device(form: WeightFormat | None, make_spec: Any) -> None:
    program = lowered(make_spec("bf16"))
    flags = form.flags if form else 0
    for warps, stage_bytes in ((4, 10240), (8, 20480), (16, 36864)):
        m = replace(program.machine, consumer_warps=warps, stage_bytes=stage_bytes)
        sizes = given(program) | {"FLAGS": flags, "CONSUMER_WARPS": warps, "STAGE_BYTES": stage_bytes}
        weights = Scope("isa/device/weight_format.cuh", sizes, SHARED)
        for columns in COLUMNS:
            plan = chunk_plan(m, columns, form)
            piece = {"COLUMNS": plan.piece.columns, "PIECE_BYTES": plan.piece.bytes, "TAIL_BYTES": plan.piece.tail}
            assert {name: weights.value(name) for name in piece} == piece
            last = plan.chunks - 1
            cut = {
                "LOW": plan.low,
                "HIGH": plan.high,
                "HIGH_WARPS": plan.high_warps,
                "PER_CHUNK": plan.per_chunk,
                "CHUNKS": plan.chunks,
                "FULL_BYTES": plan.chunk_bytes(0) if last else plan.per_chunk * warps * plan.piece.bytes + plan.piece.tail,
                "LAST_BYTES": plan.chunk_bytes(last),
            }
            tile = Scope("isa/device/plan.cuh", sizes | {"COLUMNS": columns, "W": weights}, SHARED)
            assert {name: tile.value(name) for name in cut} == cut


@pytest.mark.parametrize("form", FORMATS[1:], ids=lambda form: f"{form.name} {form.scale}")
def test_a_format_is_what_its_flags_say_on_the_device(form: WeightFormat) -> None:
    scope = Scope("isa/device/weight_format.cuh", {"FLAGS": form.flags, "WIDE": False}, SHARED)
    meant = {"BITS": form.bits, "GROUP": form.group, "ASYMMETRIC": form.asymmetric, "FP16_SCALE": form.scale == "fp16"}
    assert {name: scope.value(name) for name in meant} == meant


def test_scratch_of_a_fixed_point_slice_is_that_of_its_digits_on_the_device(make_spec: Any) -> None:
    program = lowered(make_spec("bf16", layer_weights=weight_format.FORMATS["int8"]))
    scope = Scope("isa/device/fixed_point.cuh", given(program), SHARED)
    products = [task for queue in program.queues for task in queue if isinstance(task, matvec.MatVec) and task.in_integers]
    assert products
    for task in products:
        plan = task.plan(program.machine)
        plane = scope["plane_bytes"](plan.high * plan.piece.columns)
        assert task.shared_bytes(program.machine) == matvec.DIGITS * plan.warps * plane
