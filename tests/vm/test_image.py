"""Programs and weights as bytes, and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, Machine, chunk_plan
from amk.isa.matvec import MatVec
from amk.isa.registry import instructions
from amk.isa.stretch import runs
from amk.isa.weight_format import FORMATS
from amk.models.quantised_weights import with_weights
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.stream import stream_of
from amk.schedule.targets import small_target
from amk.vm.image import pack_matrix, pack_program, pack_stream, same_weights, tile_places, unpack_matrix, unpack_program
from amk.vm.layout import constants, matrix_rows
from amk.vm.reference import UnprovenVM

FUSIONS: list[tuple[str, ...]] = [(), ("norm", "qkv", "gate_up")]


def some_machine(make_program: Any, make_spec: Any, dtype: str, **fields: Any) -> Machine:
    return replace(make_program(make_spec(dtype)).machine, **fields)


def test_unpacking_is_the_inverse_of_packing_for_every_instruction(make_spec: Any, make_program: Any) -> None:
    seen = set()
    for fusion, chooser in [*((fusion, "greedy") for fusion in FUSIONS), ((), "draw"), ((), "filter")]:
        program = make_program(make_spec(qkv_bias=True, windows=(None, 30)), chooser=chooser, fusion=fusion, kv_splits=2)
        frame = replace(program, queues=(), streams=(), buffers=tuple(replace(b, offset=0) for b in program.buffers))
        assert unpack_program(pack_program(program), frame) == program
        seen |= {type(task) for queue in program.queues for task in queue}
    for seats, prefill in ((8, False), (32, True)):
        batch = lower(make_spec("bf16"), Config(), small_target(4), batch=seats, prefill=prefill)
        assert unpack_program(pack_program(batch), batch) == batch
        seen |= {type(task) for queue in batch.queues for task in queue}
    rows = lower(with_weights(replace(make_spec("bf16"), hidden=512, intermediate=1024), FORMATS["int4-g64"]), Config(), small_target(1))
    assert unpack_program(pack_program(rows), rows) == rows
    seen |= {type(task) for queue in rows.queues for task in queue}
    assert seen == set(instructions().values())


def test_a_program_from_its_bytes_gives_the_same_tokens(make_spec: Any, make_program: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    program, source = make_program(spec), make_source(spec)
    unpacked = unpack_program(pack_program(program), replace(program, queues=(), streams=()))
    expected = UnprovenVM(program, source).decode([1, 2], 0, steps=20).tokens
    assert UnprovenVM(unpacked, source).decode([1, 2], 0, steps=20).tokens == expected


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (33, 136), (5, 40), (48, 24), (32, 520)])
@pytest.mark.parametrize(("warps", "stage_bytes"), [(4, 2048), (8, 8192), (8, 16384)])
def test_unpacking_a_matrix_is_the_inverse_of_packing(
    rows: int, columns: int, dtype: str, warps: int, stage_bytes: int, make_spec: Any, make_program: Any
) -> None:
    machine = some_machine(make_program, make_spec, dtype, consumer_warps=warps, stage_bytes=stage_bytes)
    plan = chunk_plan(machine, columns)
    matrix = torch.randn(rows, columns).to({"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype])
    packed = pack_matrix(matrix, plan, machine)
    assert packed.shape == (-(-rows // TILE_ROWS), plan.tile_bytes)
    assert torch.equal(unpack_matrix(packed, plan, machine, rows), matrix)


def test_a_lane_of_a_16_bit_fragment_holds_its_rows_g_and_g_plus_8(make_spec: Any, make_program: Any) -> None:
    machine = some_machine(make_program, make_spec, "bf16")
    place = torch.arange(256, dtype=torch.bfloat16).view(16, 16)  # row * 16 + column, exact in bf16
    packed = pack_matrix(place, chunk_plan(machine, 16), machine).view(torch.bfloat16).view(32, 8)
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        cells = [(g, 0), (g, 1), (g + 8, 0), (g + 8, 1), (g, 2), (g, 3), (g + 8, 2), (g + 8, 3)]
        assert packed[lane].tolist() == [row * 16 + 4 * t + column for row, column in cells]


def test_a_lane_of_an_fp32_fragment_holds_four_columns_of_a_row(make_spec: Any, make_program: Any) -> None:
    machine = some_machine(make_program, make_spec, "fp32")
    place = torch.arange(128, dtype=torch.float32).view(16, 8)
    packed = pack_matrix(place, chunk_plan(machine, 8), machine).view(torch.float32).view(32, 4)
    for lane in range(32):
        assert packed[lane].tolist() == [(lane >> 1) * 8 + 4 * (lane & 1) + column for column in range(4)]


def test_fragments_lie_by_chunk_then_warp_and_the_rest_is_zero(make_spec: Any, make_program: Any) -> None:
    machine = some_machine(make_program, make_spec, "fp32", consumer_warps=2, stage_bytes=1024)
    plan = chunk_plan(machine, 36)  # 5 fragments: warp 0 has 0, 1, 2 and warp 1 has 3, 4; a chunk holds one of each
    columns = torch.arange(36.0).repeat(3, 1)
    fragments = pack_matrix(columns, plan, machine).view(torch.float32).view(5, 16, 8)
    assert fragments[:, 0, 0].tolist() == [0, 24, 8, 32, 16]
    assert fragments[:, 3:].abs().sum() == 0
    assert fragments[3, 0].tolist() == [32, 33, 34, 35, 0, 0, 0, 0]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_stream_holds_each_sms_tiles_in_the_order_in_which_it_eats_them(
    fusion: tuple[str, ...], make_spec: Any, make_program: Any, make_source: Any
) -> None:
    spec = make_spec("bf16", intermediate=92)
    program, source = make_program(spec, fusion=fusion, n_tile=32), make_source(spec)
    stream, starts = pack_stream(program, source)
    matrices = [matrix_rows(matrix, source) for matrix in program.matrices]
    at = 0
    for sm, (queue, entries) in enumerate(zip(program.queues, program.streams, strict=True)):
        assert starts[sm] == at
        for task in (queue[index] for index in entries):
            if isinstance(task, MatVec):
                plan = chunk_plan(program.machine, task.cols)
                assert sum(task.chunk_bytes(program.machine, 0)) == task.tiles * plan.tile_bytes
                packed = stream[at : at + task.tiles * plan.tile_bytes].view(task.tiles, -1)
                expected = matrices[task.weight][16 * task.tile0 : 16 * (task.tile0 + task.tiles)]
                assert torch.equal(unpack_matrix(packed, plan, program.machine, len(expected)), expected)
                at += packed.numel()
    assert at == len(stream)


def test_a_run_of_a_tile_is_found_where_the_stream_of_the_decoder_has_it(make_spec: Any, make_program: Any, make_source: Any) -> None:
    """What a stretch's feeder copies: the bytes at a tile's place and a run's offset are the fragments of the run's columns."""
    spec = make_spec("bf16", intermediate=92)
    program, source = make_program(spec, n_tile=32), make_source(spec)
    stream, _ = pack_stream(program, source)
    places = tile_places(program)
    assert len(places) == sum(-(-matrix.rows // TILE_ROWS) for matrix in program.matrices)
    for (number, tile), at in places.items():
        matrix = program.matrices[number]
        rows = matrix_rows(matrix, source)[tile * TILE_ROWS : (tile + 1) * TILE_ROWS].to(torch.bfloat16)
        for run in runs(chunk_plan(program.machine, matrix.cols)):
            columns = rows[:, 16 * run.first : 16 * (run.first + run.count)]
            alone = replace(program.machine, consumer_warps=1, stage_bytes=FRAGMENT_BYTES * run.count)
            expected = pack_matrix(columns, chunk_plan(alone, 16 * run.count), alone).view(-1)
            assert torch.equal(stream[at + run.offset :][: len(expected)], expected)


def test_programs_that_read_the_same_weights_read_the_same_bytes(make_spec: Any, make_program: Any, make_source: Any) -> None:
    """What may be shared is equal and is taken by a machine (Stream.begins_with), and what is not equal may not be shared."""
    spec = make_spec("bf16")
    source, program = make_source(spec), make_program(spec)
    changes = [
        {field: value} for field, value in (("kv_block", 16), ("sync", "tags"), ("pipelining_depth", 1), ("page_allocation", "linear"))
    ]
    moved = [{"n_tile": 32}, {"fusion": ()}, {"fusion": ("norm",)}, {"sm_assignment": "round_robin"}, {"threads_per_block": 128}]
    moved += [{"stage_bytes": 24576}, {"stage_bytes": 32768}]  # which may cut tiles alike
    shared = 0
    for change in [*changes, *moved]:
        other = make_program(spec, **change)
        bytes_equal = all(map(torch.equal, pack_stream(program, source), pack_stream(other, source))) and torch.equal(
            constants(program, source), constants(other, source)
        )
        assert bytes_equal or not same_weights(program, other)
        assert stream_of(program).begins_with(stream_of(other)) or not same_weights(program, other)
        shared += same_weights(program, other)
    assert len(changes) <= shared < len(changes) + len(moved)
    assert not same_weights(program, replace(program, kv=replace(program.kv, rows=program.kv.rows + 16)))
