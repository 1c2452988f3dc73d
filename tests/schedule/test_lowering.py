"""What every lowering must give, whatever the model and the config."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest

from amk.isa.abi import NONE
from amk.isa.attention import Attention
from amk.isa.matvec import X_NARROW, X_NORM, MatVec
from amk.isa.registry import decode, encode
from amk.schedule.compile import ConfigRejected, compile_program, effective_config, lower, notes
from amk.schedule.digest import schedule_id
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec, matrices_bytes, weight_shapes
from amk.schedule.program import Program
from amk.schedule.settings import Settings, resolve, splits_of
from amk.schedule.targets import TARGETS, Target, small_target
from amk.tests.schedule.configs import GUIDE, config_of, random_config
from amk.tests.schedule.specs import BIASED, LARGE, LLAMA_1B, NORMED, SMALL, TINY, TOY, WIDE_HEADS, WINDOWED, random_spec
from amk.tests.schedule.trace import trace

SEEDS = range(40)


def random_program(seed: int) -> Program:
    """A random model with a random config on 1 to 7 SMs."""
    config = replace(random_config(seed), smem_bytes_per_block=0, stage_bytes=0)
    return lower(random_spec(seed), config, small_target(1 + seed % 7))


def tasks_of(program: Program, stem: str) -> list[MatVec]:
    return [t for queue in program.queues for t in queue if isinstance(t, MatVec) and t.stem == stem]


def stems(program: Program) -> list[str]:
    return list(dict.fromkeys(task.stem for queue in program.queues for task in queue))


@pytest.mark.parametrize("seed", SEEDS)
def test_every_tile_of_every_matrix_is_done_by_exactly_one_task(seed: int) -> None:
    program = random_program(seed)
    done = Counter(
        (task.weight, tile)
        for queue in program.queues
        for task in queue
        if isinstance(task, MatVec)
        for tile in range(task.tile0, task.tile0 + task.tiles)
    )
    assert done == Counter((i, tile) for i, m in enumerate(program.matrices) for tile in range(-(-m.rows // 16)))


@pytest.mark.parametrize("seed", SEEDS)
def test_products_agree_with_their_matrix_and_their_compiled_shape(seed: int) -> None:
    program = random_program(seed)
    for queue in program.queues:
        for task in queue:
            if isinstance(task, MatVec):
                matrix, shape = program.matrices[task.weight], program.shapes[task.shape]
                assert (task.rows, task.cols) == (matrix.rows, matrix.cols)
                assert (shape.cols, shape.flags) == (task.cols, task.flags)
                assert (task.stem == "gemv_glu") == (matrix.layout == "interleave8")
                assert (task.gain >= 0) == bool(task.flags & X_NORM)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_weight_of_the_model_is_packed_exactly_once_in_its_own_shape(seed: int) -> None:
    spec, program = random_spec(seed), random_program(seed)
    shapes = weight_shapes(spec)
    matrices = [(m.sources, m.layout, m.rows) for m in program.matrices]
    constants = [(c.sources, c.layout, c.count) for c in program.constants]
    assert Counter(source for sources, _, _ in matrices + constants for source in sources) == Counter(shapes.keys() - {"embed"})
    for sources, layout, total in matrices + constants:
        rows = [shapes[source][0] for source in sources]
        assert sum(r + -r % 8 for r in rows) == total if layout == "interleave8" else sum(rows) == total
    assert all(shapes[source][1] == m.cols for m in program.matrices for source in m.sources)


@pytest.mark.parametrize("seed", SEEDS)
def test_constants_begin_at_multiples_of_four_and_do_not_overlap(seed: int) -> None:
    constants = random_program(seed).constants
    assert all(c.start % 4 == 0 for c in constants)
    assert all(a.start + a.count <= b.start for a, b in zip(constants, constants[1:], strict=False))


@pytest.mark.parametrize("seed", SEEDS)
def test_streams_name_the_streamed_tasks_in_queue_order(seed: int) -> None:
    program = random_program(seed)
    for queue, stream in zip(program.queues, program.streams, strict=True):
        assert stream == tuple(i for i, task in enumerate(queue) if task.streamed)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_kv_head_has_one_tail_and_all_its_splits(seed: int) -> None:
    spec, program = random_spec(seed), random_program(seed)
    tasks = [t for queue in program.queues for t in queue if isinstance(t, Attention)]
    for layer, head in product(range(spec.layers), range(spec.kv_heads)):
        mine = [t for t in tasks if (t.layer, t.kv_head) == (layer, head)]
        assert sorted(t.split for t in mine) == list(range(mine[0].splits))
        assert {(t.q0, t.nq, t.window) for t in mine} == {(head * spec.group, spec.group, spec.windows[layer] or 0)}
    assert len(tasks) == sum(t.splits for t in tasks if t.split == 0)


@pytest.mark.parametrize("seed", SEEDS)
def test_scratch_holds_what_every_task_needs_and_every_chunk_fits_a_stage(seed: int) -> None:
    program = random_program(seed)
    tasks = [task for queue in program.queues for task in queue]
    assert program.scratch_bytes == max(task.shared_bytes(program.machine) for task in tasks)
    position = program.machine.context - 1
    assert max(max(t.chunk_bytes(program.machine, position), default=0) for t in tasks) <= program.machine.stage_bytes


@pytest.mark.parametrize("seed", SEEDS)
def test_every_task_fits_its_record(seed: int) -> None:
    for queue in random_program(seed).queues:
        assert all(decode(encode(task)) == task for task in queue)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_packet_is_read_before_its_publish_or_overwritten_before_its_readers(seed: int) -> None:
    program = random_program(seed)
    context = random_spec(seed).max_context
    positions = sorted({0, 1, context // 2, context - 2, context - 1})
    assert trace(program, positions) == []


@pytest.mark.parametrize("spec", SMALL, ids=lambda s: s.name)
def test_small_models_run_to_their_last_position_under_the_guide_config(spec: ModelSpec) -> None:
    program = lower(spec, config_of(GUIDE), small_target(5))
    assert trace(program, (0, 40, spec.max_context - 2, spec.max_context - 1)) == []


@pytest.mark.parametrize("spec", (*SMALL, *LARGE), ids=lambda s: s.name)
def test_guide_config_and_the_default_suit_every_model_on_every_card_that_holds_it(spec: ModelSpec) -> None:
    for target in TARGETS.values():
        if spec.dtype in target.dtypes and (spec is not LARGE[-1] or target.memory_bytes > 2e10):
            for config in (config_of(GUIDE), Config()):
                assert isinstance(compile_program(spec, config, target), Program)


def test_more_sms_than_tiles_leaves_some_without_work_for_an_op() -> None:
    program = lower(TINY, Config(), small_target(64))
    assert trace(program, (0, 1, 200)) == []
    assert min(map(len, program.queues)) < max(map(len, program.queues))


def test_one_sm_can_do_everything() -> None:
    assert trace(lower(WINDOWED, Config(kv_splits=4), small_target(1)), (0, 300, 301)) == []


def test_fusions_choose_the_instructions() -> None:
    assert stems(lower(TOY, Config(), small_target())) == ["embed", "gemv", "attention", "gemv_glu", "gemv_head", "sample"]
    unfused = lower(TOY, Config(fusion=()), small_target())
    assert stems(unfused) == ["embed", "rmsnorm", "gemv", "attention", "swiglu", "gemv_head", "sample"]
    assert all(task.flags == X_NARROW for task in tasks_of(unfused, "gemv"))
    assert [m.name for m in unfused.matrices] == ["L0.q", "L0.k", "L0.v", "L0.o", "L0.gate", "L0.up", "L0.down", "head"]


def test_intermediate_that_is_no_multiple_of_eight_is_padded_in_the_interleaved_matrix_only() -> None:
    program = lower(TINY, Config(), small_target())
    by_name = {m.name: m for m in program.matrices}
    assert (by_name["L0.gate_up"].rows, by_name["L0.down"].cols) == (80, 36)
    (buffer,) = (b for b in program.buffers if b.name == "L0.gate_up")
    assert buffer.packets == 20


def test_biases_and_head_norms_reach_the_tasks() -> None:
    program = lower(BIASED, Config(), small_target())
    assert all(task.bias >= 0 for stem in ("gemv", "gemv_glu") for task in tasks_of(program, stem))
    assert all(task.bias == -1 for task in tasks_of(program, "gemv_head"))
    attention = [t for queue in lower(NORMED, Config(), small_target()).queues for t in queue if isinstance(t, Attention)]
    assert all(0 <= t.q_gain < t.k_gain for t in attention)


def test_head_tasks_publish_one_pair_each() -> None:
    program = lower(LLAMA_1B, Config(), TARGETS["h200"])
    heads = tasks_of(program, "gemv_head")
    assert sorted(task.out_start for task in heads) == [2 * i for i in range(132)]


def test_context_is_rounded_up_to_blocks_and_limited_to_the_models() -> None:
    assert lower(TINY, Config(), small_target()).kv.rows == 304
    assert lower(TINY, Config(), small_target(), context=17).machine.context == 32
    assert lower(LLAMA_1B, Config(), TARGETS["h200"]).kv.rows == 16384
    for context in (0, 305):
        assert isinstance(compile_program(TINY, Config(), small_target(), context=context), list)
    assert isinstance(compile_program(TINY, Config(), small_target(), context=304), Program)


def test_instructions_that_poll_have_no_counter_and_the_others_do() -> None:
    tasks = [task for queue in lower(TOY, Config(), small_target()).queues for task in queue]
    assert {type(task).stem for task in tasks if type(task).polls} == {"attention", "embed", "sample"}
    assert all((task.wait_counter == NONE) == type(task).polls for task in tasks)


def test_tags_style_has_no_counters() -> None:
    program = lower(TOY, Config(sync="tags"), small_target())
    assert program.counters == ()
    assert {(t.wait_counter, t.wait_count, t.done_counter) for queue in program.queues for t in queue} == {(NONE, 0, NONE)}


@pytest.mark.parametrize("seed", SEEDS)
def test_waits_ask_for_exactly_the_arrivals_of_a_token(seed: int) -> None:
    program = random_program(seed)
    arrivals: Counter[int] = Counter()
    for queue in program.queues:
        for task in queue:
            if task.done_counter != NONE:
                arrivals[task.done_counter] += task.arrivals(program.machine)
    waits = {(t.wait_counter, t.wait_count) for queue in program.queues for t in queue if t.wait_counter != NONE}
    assert waits == set(arrivals.items())
    assert set(arrivals) == set(range(len(program.counters)))


def test_equal_realised_programs_share_an_id_and_say_what_was_clipped() -> None:
    target = small_target(4, shared_bytes=101376)
    deep, deeper = Config(pipelining_depth=11), Config(pipelining_depth=12)
    programs = [lower(TOY, config, target) for config in (deep, deeper)]
    assert programs[0].machine.inflight == programs[0].machine.stages < 11
    assert schedule_id(programs[0]) == schedule_id(programs[1])
    assert notes(deep, programs[0]) == [f"pipelining_depth: 11 stages asked for, {programs[0].machine.stages} used: the ring has no more"]
    assert effective_config(deep, programs[0]) == effective_config(deeper, programs[1])
    assert notes(Config(), lower(TOY, Config(), target)) == []


def assert_realised_again(spec: ModelSpec, config: Config, target: Target, batch: int, context: int | None = None) -> Program:
    program = lower(spec, config, target, context=context, batch=batch)
    assert lower(spec, config_of(effective_config(config, program)), target, context=context, batch=batch) == program
    return program


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("seed", range(20))
def test_effective_config_realises_the_same_program(seed: int, batch: int) -> None:
    spec, target = random_spec(seed), small_target(1 + seed % 7)
    spec = spec if batch == 1 else replace(spec, dtype="bf16")
    for config in (Config(), replace(random_config(seed), smem_bytes_per_block=0, stage_bytes=0)):
        if isinstance(compile_program(spec, config, target, batch=batch), Program):
            assert_realised_again(spec, config, target, batch)


@pytest.mark.parametrize(("context", "splits"), [(16, 1), (256, 2), (330, 3), (4096, 16)])
def test_splits_that_are_no_choice_are_told_as_the_choice_that_makes_them(context: int, splits: int) -> None:
    """330 rows are three blocks of 128, for which four splits must be asked for."""
    spec, target = replace(LLAMA_1B, layers=2), TARGETS["h200"]
    program = assert_realised_again(spec, Config(), target, 1, context)
    told = effective_config(Config(), program)["kernel_knobs"]["kv_splits"]
    assert (max(splits_of(spec, Config(), target, program.machine.context, 1)), told) == (splits, 4 if splits == 3 else splits)
    for config in (Config(), Config(kv_splits=4)):
        assert_realised_again(spec, config, target, 8, context)


@pytest.mark.parametrize(
    ("spec", "config", "key"),
    [
        (replace(TOY, hidden=72), Config(), "model.hidden"),
        (replace(TOY, heads=18, kv_heads=1), Config(), "model.heads"),
        (replace(TOY, heads=3, kv_heads=2), Config(), "model.heads"),
        (replace(TOY, head_dim=12), Config(), "model.head_dim"),
        (replace(TOY, head_dim=264), Config(), "model.head_dim"),
        (replace(TOY, intermediate=126), Config(), "model.intermediate"),
        (WIDE_HEADS, Config(stage_bytes=16384), "kernel_knobs.stage_bytes"),
        (TOY, Config(smem_bytes_per_block=1 << 20), "smem_bytes_per_block"),
        (TOY, Config(sm_assignment=(("o", (0, 9, 0, 0)),)), "sm_assignment.o"),
    ],
)
def test_what_does_not_go_together_is_a_rejection_that_names_it(spec: ModelSpec, config: Config, key: str) -> None:
    result = compile_program(spec, config, small_target())
    assert isinstance(result, list)
    assert [p.key for p in result] == [key]
    with pytest.raises(ConfigRejected, match="must be"):
        lower(spec, config, small_target())


def test_largest_head_dim_and_group_are_accepted() -> None:
    assert isinstance(compile_program(replace(TOY, heads=8, kv_heads=1, head_dim=256), Config(), small_target()), Program)


def test_bf16_is_rejected_where_the_card_has_none() -> None:
    result = compile_program(replace(TOY, dtype="bf16"), Config(), TARGETS["t4"])
    assert isinstance(result, list)
    assert [str(p) for p in result] == [
        "model dtype: must be one of ('fp16', 'fp32') on t4 (sm_75); MODEL@fp16 is the model so converted, but got 'bf16'"
    ]


def test_model_that_does_not_fit_the_cards_memory_is_rejected_with_the_sizes() -> None:
    (problem,) = compile_program(LARGE[-1], Config(), TARGETS["a10g"], context=131072)  # type: ignore[misc]
    assert problem.key == "context" and "16.1 GB" in problem.text and "a10g" in problem.text


@pytest.mark.parametrize(("batch", "prefill", "sequences"), [(1, False, 1), (8, False, 8), (32, True, 1)])
def test_memory_for_weights_and_the_kv_rows_of_each_sequence_is_enough_and_a_byte_less_is_not(
    batch: int, prefill: bool, sequences: int
) -> None:
    kv_bytes = sequences * TINY.layers * 304 * TINY.kv_rows * 2 * 2  # K and V, of two bytes each
    for short in (0, 1):
        card = replace(small_target(), memory_bytes=matrices_bytes(TINY) + kv_bytes - short)
        found = resolve(TINY, Config(), card, None, batch, prefill=prefill)
        assert isinstance(found, Settings) if not short else isinstance(found, list) and [p.key for p in found] == ["context"]
