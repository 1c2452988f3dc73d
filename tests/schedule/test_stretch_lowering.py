"""What every program of a stretch must give, whatever the model and the config."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise, product

import pytest

from amk.isa.abi import NONE
from amk.isa.registry import decode, encode
from amk.isa.seat_norm import SeatNorm
from amk.isa.seat_qkv import SeatQkv
from amk.isa.stretch import runs
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_matmul import StretchMatMul
from amk.schedule.compile import compile_program, effective_config, lower
from amk.schedule.config import parse_config
from amk.schedule.cost import latency_us, streamed_bytes
from amk.schedule.digest import schedule_id
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec, weight_shapes
from amk.schedule.program import Buffer, Program
from amk.schedule.resources import SharedLayout, shared_layout
from amk.schedule.settings import STRETCHES
from amk.schedule.targets import TARGETS, small_target
from amk.tests.schedule.configs import random_config
from amk.tests.schedule.specs import BIASED, LARGE, LLAMA_1B, QWEN3, TINY, WINDOWED, random_spec

SEEDS = range(24)
SPECS = (TINY, WINDOWED, BIASED)


def spec_of(seed: int) -> ModelSpec:
    """A random model that can be prefilled: 16-bit elements, and columns of heads that are whole fragments."""
    spec = random_spec(seed)
    return replace(spec, dtype="fp16" if seed % 2 else "bf16", head_dim=spec.head_dim * (2 if spec.q_rows % 16 else 1))


def config_of(seed: int) -> Config:
    return replace(random_config(seed), smem_bytes_per_block=0, stage_bytes=0, fusion=("qkv", "gate_up"), weight_feed="auto")


def random_program(seed: int) -> Program:
    """A random model with a random config on 1 to 7 SMs."""
    batch = STRETCHES[seed % len(STRETCHES)]
    return lower(spec_of(seed), config_of(seed), small_target(1 + seed % 7), batch=batch, prefill=True)


def products(program: Program) -> list[StretchMatMul]:
    return [task for queue in program.queues for task in queue if isinstance(task, StretchMatMul)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_run_of_every_tile_of_every_matrix_is_done_once(seed: int) -> None:
    program = random_program(seed)
    done = Counter(
        (task.weight, tile, run)
        for task in products(program)
        for tile in range(task.tile0, task.tile0 + task.tiles)
        for run in range(task.run0, task.run0 + task.runs)
    )
    plans = {task.weight: runs(task.plan(program.machine)) for task in products(program)}
    wanted = ((i, tile, run) for i, m in enumerate(program.matrices) for tile in range(-(-m.rows // 16)) for run in range(len(plans[i])))
    assert done == Counter(wanted)
    for plan, matrix in ((plans[i], matrix) for i, matrix in enumerate(program.matrices)):
        assert sorted(f for run in plan for f in range(run.first, run.first + run.count)) == list(range(-(-matrix.cols // 16)))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_seat_and_head_of_every_layer_is_done_once_and_the_last_layer_makes_rows_alone(seed: int) -> None:
    program, spec = random_program(seed), spec_of(seed)
    tasks = [task for queue in program.queues for task in queue]
    seats = range(program.machine.batch)
    assert Counter((t.layer, t.seat) for t in tasks if isinstance(t, SeatQkv)) == Counter(product(range(spec.layers), seats))
    assert {t.layer for t in tasks if isinstance(t, SeatQkv) and t.q_buf == NONE} == {spec.layers - 1}
    attention = Counter((t.layer, t.kv_head, t.seat0) for t in tasks if isinstance(t, StretchAttention))
    assert attention == Counter(product(range(spec.layers - 1), range(spec.kv_heads), seats[::8]))
    norms = [t for t in tasks if isinstance(t, SeatNorm)]
    assert Counter(t.seat for t in norms) == Counter(dict.fromkeys(seats, 2 * spec.layers - 1))
    assert sum(t.res_buf == NONE for t in norms) == len(seats)


@pytest.mark.parametrize("seed", SEEDS)
def test_tasks_fit_their_records_chunks_their_slots_and_scratch_the_layout(seed: int) -> None:
    program = random_program(seed)
    machine, tasks = program.machine, [task for queue in program.queues for task in queue]
    assert all(decode(encode(task)) == task for task in tasks)
    assert max(max(task.chunk_bytes(machine, 0), default=0) for task in tasks) <= machine.slot_bytes
    assert program.scratch_bytes == max(task.shared_bytes(machine) for task in tasks)
    for buffer, access in ((program.buffers[a.buffer], a) for t in tasks for a in (*t.reads(machine, 0), *t.writes(machine, 0))):
        assert 0 <= access.start < access.stop <= buffer.packets and access.kind == buffer.kind and access.gated


@pytest.mark.parametrize("seed", SEEDS)
def test_each_task_waits_for_all_of_the_phase_before_and_of_none_other(seed: int) -> None:
    """Phases follow each other in a chain: each reads what the one before has written, and waits for all of it."""
    program = random_program(seed)
    tasks = [task for queue in program.queues for task in queue]
    arrivals = Counter(task.done_counter for task in tasks if task.done_counter != NONE)
    waits = {(task.wait_counter, task.wait_count) for task in tasks if task.wait_counter != NONE}
    assert waits == set(arrivals.items()) and len(arrivals) == len(program.counters)
    writer = {access.tag: task.done_counter for task in tasks for access in task.writes(program.machine, 0)}
    for task in tasks:
        assert task.wait_counter == max((writer[a.tag] for a in task.reads(program.machine, 0)), default=NONE)
        assert task.wait_counter == NONE or task.done_counter in (task.wait_counter + 1, NONE)


@pytest.mark.parametrize("seed", SEEDS)
def test_values_share_whole_slots_when_nobody_wants_the_older_one(seed: int) -> None:
    program = random_program(seed)
    span = _lifetimes(program)
    for a, b in product(program.buffers, repeat=2):
        apart = a.offset + a.packets <= b.offset or b.offset + b.packets <= a.offset
        assert a.offset % 1024 == 0
        if not apart and a is not b:
            assert (a.offset, a.packets, a.kind) == (b.offset, b.packets, b.kind)
            first, second = sorted((span[a.name], span[b.name]))
            residual = a.name.endswith(".h") and b.name.endswith(".h")
            assert first[1] < second[0] or residual and first[1] == second[0]


def _lifetimes(program: Program) -> dict[str, tuple[int, int]]:
    """Of each buffer the phase that writes it and the last one that reads it, by the tags of the phases' last values."""
    machine = program.machine
    tasks = [task for queue in program.queues for task in queue]
    phase = {id(task): task.wait_counter if task.wait_counter != NONE else -1 for task in tasks}
    made: dict[str, tuple[int, int]] = {}
    for task in tasks:
        for access in task.writes(machine, 0):
            made[program.buffers[access.buffer].name] = (phase[id(task)], 0)
    for task in tasks:
        for access in task.reads(machine, 0):
            name = program.buffers[access.buffer].name
            made[name] = (made[name][0], max(made[name][1], phase[id(task)]))
    return made


def test_linear_pages_share_nothing_and_others_need_no_more_for_more_layers() -> None:
    linear = lower(TINY, Config(page_allocation="linear"), small_target(), batch=32, prefill=True)
    ranges = sorted((b.offset, b.offset + b.packets) for b in linear.buffers)
    assert all(a[1] <= b[0] for a, b in pairwise(ranges))
    deep = [lower(replace(TINY, layers=n, windows=()), Config(), small_target(), batch=32, prefill=True) for n in (3, 9)]
    assert deep[0].arena_packets == deep[1].arena_packets < linear.arena_packets


@pytest.mark.parametrize("spec", (*SPECS, *LARGE), ids=lambda s: s.name)
@pytest.mark.parametrize("batch", STRETCHES)
def test_a_ring_of_several_slots_fits_beside_the_rest_on_an_h200(spec: ModelSpec, batch: int) -> None:
    program = compile_program(spec, Config(), TARGETS["h200"], context=256, batch=batch, prefill=True)
    assert isinstance(program, Program), program
    machine = program.machine
    longest = batch == 128 and machine.stage_bytes > 20480  # its runs are of 6 fragments and more
    assert machine.stages == machine.inflight >= (3 if longest else 4)
    assert shared_layout(program).total <= TARGETS["h200"].shared_bytes < shared_layout(program).total + machine.slot_bytes


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_weights_constants_and_cut_are_the_decoders(spec: ModelSpec) -> None:
    for fusion in (("qkv", "gate_up"), ("norm", "qkv", "gate_up")):
        one, program = (lower(spec, Config(fusion=fusion), small_target(), batch=b, prefill=b > 1) for b in (1, 64))
        assert program.matrices == one.matrices[: len(program.matrices)]
        assert program.constants == one.constants[: len(program.constants)]
        assert program.machine.stage_bytes == one.machine.stage_bytes and program.kv == one.kv


def test_the_layout_has_places_for_tiles_and_no_reduction_slots() -> None:
    program = lower(LLAMA_1B, Config(), TARGETS["h200"], context=256, batch=128, prefill=True)
    layout = shared_layout(program)
    entries = max(map(len, program.streams))
    assert layout.barriers - layout.places == 32 * entries and layout.places % 16 == 0
    assert layout.tasks - layout.reduction < 64
    beside: SharedLayout = shared_layout(lower(LLAMA_1B, Config(), TARGETS["h200"], context=256))
    assert beside.places == beside.barriers


def test_the_effective_config_realises_the_same_program() -> None:
    program = lower(TINY, Config(), small_target(), batch=32, prefill=True)
    effective = effective_config(Config(), program)
    effective["pipelining_depth"] = effective["kernel_knobs"]["throttled_depth"] = 12
    parsed = parse_config(effective)
    assert isinstance(parsed, Config)
    assert schedule_id(lower(TINY, parsed, small_target(), batch=32, prefill=True)) == schedule_id(program)


def test_an_assignment_of_the_decoders_units_leaves_the_stretch_alone() -> None:
    explicit = Config(sm_assignment=(("o", (0, 1, 2, 3)),))
    placed, plain = (lower(TINY, config, small_target(), batch=32, prefill=True) for config in (explicit, Config()))
    assert placed.queues == plain.queues


def test_sums_and_x_of_a_model_are_of_these_sizes() -> None:
    """tiny: hidden 64; q, k, v have 32 rows (a group); 36 columns of gate and up are 5 tiles of 8, and 48 of x; a run a fragment."""
    program = lower(TINY, Config(), small_target(), batch=32, prefill=True)
    sizes = {b.name: _per_seat(b) for b in program.buffers if b.name.startswith("L0.")}
    assert sizes == {
        "L0.input_norm.h": 64,
        "L0.input_norm": 32,
        "L0.qkv": 128 * 4,
        "L0.q": 8,
        "L0.kv": 16,
        "L0.attention": 8,
        "L0.o": 128,
        "L0.post_norm.h": 64,
        "L0.post_norm": 32,
        "L0.gate_up": 24,
        "L0.down": 128 * 3,
    }


def _per_seat(buffer: Buffer) -> int:
    return buffer.packets // 32


@pytest.mark.parametrize("spec", (*SPECS, LLAMA_1B), ids=lambda s: s.name)
def test_a_stretch_reads_the_matrices_of_its_layers_once(spec: ModelSpec) -> None:
    """All but the output head, and of the last layer q, k and v alone."""
    shapes = {name: shape for name, shape in weight_shapes(spec).items() if len(shape) == 2 and name not in ("embed", "head")}
    last = f"L{spec.layers - 1}."
    wanted = {name: shape for name, shape in shapes.items() if not name.startswith(last) or name[len(last) :] in "qkv"}
    program = lower(spec, Config(), small_target(8), context=256, batch=128, prefill=True)
    element, layers = program.machine.element_bytes, spec.layers - 1
    matrices = element * sum(rows * cols for rows, cols in wanted.values())
    assert streamed_bytes(program, 0) == matrices + element * 128 * spec.hidden
    rows = sum(min(100, (window or 999) - 1) for window in spec.windows[:layers])
    assert streamed_bytes(program, 100) - streamed_bytes(program, 0) == 2 * element * rows * spec.kv_rows
    assert latency_us(program, TARGETS["h200"], 0) > 0


@pytest.mark.parametrize("n_tile", [16, 512])
def test_where_no_ring_fits_nobody_is_told_of_a_knob_that_changes_nothing(n_tile: int) -> None:
    """Tasks of a stretch are groups of tiles, whatever N_tile is."""
    config = parse_config({"tiling": {"gemv": {"N_tile": n_tile}}})
    assert isinstance(config, Config)
    found = compile_program(replace(QWEN3, dtype="fp16"), config, TARGETS["t4"], batch=32, prefill=True)
    assert isinstance(found, list) and "330 tasks" in str(found[0]) and "N_tile" not in str(found[0])
