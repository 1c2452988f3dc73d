"""Shared memory, threads and registers of a block, and the table of cards."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from amk.isa.abi import TASK_BYTES
from amk.isa.machine import Machine
from amk.isa.weight_format import FORMATS
from amk.models.builtin import RANDOM
from amk.models.quantised_weights import with_weights
from amk.models.registry import describe, resolve
from amk.schedule.compile import compile_program, effective_config, lower
from amk.schedule.knobs import STAGE_CHOICES, Config
from amk.schedule.model import ModelSpec, matrices_bytes
from amk.schedule.program import Program
from amk.schedule.resources import block_threads, shared_layout, shared_needs
from amk.schedule.targets import TARGETS, Target, card_of, live_target, small_target
from amk.schedule.validate import Limits, ValidProgram, validate
from amk.tests.schedule.specs import LARGE, LLAMA_1B, SMALL, TOY

LIVE = {"arch": "sm_90a", "sms": 114, "shared_bytes": 232448, "memory_bytes": 2, "clock_mhz": 3}


@pytest.mark.parametrize("spec", (*SMALL, *LARGE), ids=lambda s: s.name)
def test_parts_of_shared_memory_follow_each_other_and_fit_the_card(spec: ModelSpec) -> None:
    target = TARGETS["h200"]
    program = lower(spec, Config(), target)
    needs, layout = shared_needs(program), shared_layout(program)
    assert layout.ring == 0
    assert layout.scratch - layout.ring >= needs.stages * needs.slot_bytes
    assert layout.reduction - layout.scratch >= program.scratch_bytes
    assert layout.tasks - layout.reduction >= program.machine.reduction_slots * program.machine.consumer_warps * 80
    assert layout.streams - layout.tasks >= 64 * max(map(len, program.queues))
    assert layout.buffers - layout.streams >= 2 * max(map(len, program.streams))
    assert layout.barriers == layout.places >= layout.buffers + 4 * len(program.buffers)
    assert layout.total <= target.shared_bytes < layout.total + program.machine.stage_bytes
    assert all(offset % 16 == 0 for offset in (layout.scratch, layout.reduction, layout.tasks, layout.barriers))


@pytest.mark.parametrize("smem_bytes", [0, 1 << 20])
def test_ring_of_stages_that_are_no_multiple_of_a_task_record_fits_the_card(smem_bytes: int) -> None:
    """Task records are aligned, so the ring may move them by more than its own bytes. Every room from one number of stages to the next."""
    spec = with_weights(replace(TOY, dtype="bf16"), FORMATS["int4"])
    for shared_bytes in range(65536 - 8224, 65536, 16):
        target = small_target(4, shared_bytes)
        found = compile_program(spec, Config(stage_bytes=8192, smem_bytes_per_block=smem_bytes), target)
        if isinstance(found, list):  # more was asked for than any card has; the most that it names must fit
            assert smem_bytes
            most = int(found[0].text.split("at most ")[1].split()[0])
            found = lower(spec, Config(stage_bytes=8192, smem_bytes_per_block=most), target)
        total, slot = shared_layout(found).total, found.machine.slot_bytes
        assert slot == 8224 and slot % TASK_BYTES
        assert total <= shared_bytes < total + slot + TASK_BYTES


@pytest.mark.parametrize(("batch", "slots"), [(1, 4), (8, 1), (16, 1)])
def test_reduction_slots_that_nobody_asked_for_cost_the_ring_no_stage(batch: int, slots: int) -> None:
    def machine(asked: int) -> Machine:
        return lower(LLAMA_1B, Config(reduction_slots=asked), TARGETS["h200"], context=1024, batch=batch).machine

    assert (machine(0).reduction_slots, machine(2).reduction_slots) == (slots, 2)
    assert machine(0).stages == machine(1).stages
    assert machine(8).stages < machine(0).stages or batch == 1


def test_the_effective_config_has_the_slots_of_the_program() -> None:
    for batch, asked, slots in ((1, 0, 4), (8, 0, 1), (8, 2, 2)):
        program = lower(replace(TOY, dtype="bf16"), Config(reduction_slots=asked), TARGETS["h200"], batch=batch)
        effective = effective_config(Config(reduction_slots=asked), program)
        assert effective["kernel_knobs"]["reduction_slots"] == program.machine.reduction_slots == slots


def test_ring_asked_for_is_the_ring_in_whole_stages() -> None:
    machine = lower(LLAMA_1B, Config(smem_bytes_per_block=100000), TARGETS["h200"]).machine
    assert (machine.stages, machine.stage_bytes) == (6, 16384)


def test_last_ring_that_fits_is_accepted_and_one_stage_more_is_rejected_with_the_numbers() -> None:
    most = lower(LLAMA_1B, Config(), TARGETS["h200"]).machine.stages * 16384
    assert isinstance(compile_program(LLAMA_1B, Config(smem_bytes_per_block=most, stage_bytes=16384), TARGETS["h200"]), Program)
    result = compile_program(LLAMA_1B, Config(smem_bytes_per_block=most + 16384, stage_bytes=16384), TARGETS["h200"])
    assert isinstance(result, list)
    assert f"at most {most}" in result[0].text and "232448" in result[0].text


def test_stages_shrink_where_four_of_the_usual_size_do_not_fit() -> None:
    layout = shared_layout(replace(shared_needs(lower(TOY, Config(), small_target())), stages=0))
    for room, stages, stage_bytes in ((65536, 4, 16384), (65535, 7, 8192), (32767, 3, 8192), (8192, 1, 8192)):
        machine = lower(TOY, Config(), small_target(4, layout.total + room)).machine
        assert (machine.stages, machine.stage_bytes) == (stages, stage_bytes)
    assert isinstance(compile_program(TOY, Config(), small_target(4, layout.total + 8191)), list)


@pytest.mark.parametrize(
    ("asked", "keys"),
    [
        ({"stage_bytes": 32768}, ["kernel_knobs.stage_bytes"]),
        ({"stage_bytes": 32768, "smem_bytes_per_block": 65536}, ["smem_bytes_per_block", "kernel_knobs.stage_bytes"]),
        ({"stage_bytes": 8192, "smem_bytes_per_block": 65536}, ["smem_bytes_per_block"]),
        ({"smem_bytes_per_block": 65536}, ["smem_bytes_per_block"]),
    ],
)
def test_where_no_ring_fits_the_rejection_names_what_was_asked_for(asked: dict[str, int], keys: list[str]) -> None:
    spec = describe("llama-3.2-1b-shape@fp16@int8")
    result = compile_program(spec, Config(**asked), TARGETS["t4"])  # type: ignore[arg-type]
    assert isinstance(result, list) and [problem.key for problem in result] == keys


@pytest.mark.parametrize(("batch", "prefill"), [(1, False), (8, False), (32, True)])
def test_stages_too_large_for_the_card_are_rejected_with_the_largest_that_fits(batch: int, prefill: bool) -> None:
    """Following the advice ends in a program, or in the ring's own rejection where no stage fits at all."""
    spec, seen = replace(TOY, dtype="bf16"), set()
    for shared_bytes in range(8192, 81920, 4096):
        compiled = partial(compile_program, spec, target=small_target(4, shared_bytes), batch=batch, prefill=prefill)
        found = {size: compiled(config=Config(stage_bytes=size)) for size in STAGE_CHOICES}
        most = max((size for size, result in found.items() if isinstance(result, Program)), default=0)
        size = STAGE_CHOICES[-1]
        while isinstance(result := found[size], list) and result[0].key == "kernel_knobs.stage_bytes":
            assert (smaller := int(result[0].allowed.split()[2])) < size and (smaller == most or batch > 1)
            size = smaller
        assert size == most or (most == 0 and [problem.key for problem in result] == ["smem_bytes_per_block"])
        seen.add(most)
    assert seen == {0, *STAGE_CHOICES}


@pytest.mark.parametrize(
    ("name", "gpu", "stage_bytes"),
    [
        ("smollm2-135m-shape", "h200", 32768),
        ("qwen3-0.6b-shape", "h200", 24576),
        ("llama-3.2-1b-shape", "h200", 16384),
        ("toy", "h200", 16384),
        ("smollm2-135m-shape", "a100", 16384),
    ],
)
def test_a_tile_that_the_usual_stage_would_cut_in_two_has_a_larger_one_where_that_was_measured(
    name: str, gpu: str, stage_bytes: int
) -> None:
    machine = lower(resolve(name).spec, Config(), TARGETS[gpu]).machine
    assert machine.stage_bytes == stage_bytes


@pytest.mark.parametrize(
    ("hidden", "stage_bytes"), [(512, 16384), (528, 32768), (640, 32768), (656, 16384), (1008, 16384), (1024, 24576), (1040, 16384)]
)
def test_a_larger_stage_is_taken_for_tiles_like_those_that_were_measured(hidden: int, stage_bytes: int) -> None:
    spec = replace(TOY, dtype="bf16", hidden=hidden)
    assert lower(spec, Config(), TARGETS["h200"]).machine.stage_bytes == stage_bytes


def test_stages_of_quantised_tiles_are_the_usual_ones() -> None:
    spec = resolve("smollm2-135m-shape@int8").spec
    assert 16384 <= lower(spec, Config(), TARGETS["h200"]).machine.stage_bytes < 20480


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
@pytest.mark.parametrize("name", (*RANDOM, "smollm2-135m"))
def test_default_config_of_every_built_in_model_goes_with_every_card_that_holds_it(name: str, target: Target) -> None:
    """Where there is no bf16, in fp16; the default's ring holds four stages, more than are under way."""
    spec = describe(name)
    if spec.dtype not in target.dtypes:
        refused = compile_program(spec, Config(), target)
        assert isinstance(refused, list)
        assert [r.key for r in refused] == ["model.dtype"] and "MODEL@fp16" in refused[0].text
        spec = replace(spec, dtype="fp16")
    result = compile_program(spec, Config(), target, context=min(4096, spec.max_context))
    if matrices_bytes(spec) > 0.9 * target.memory_bytes:
        assert isinstance(result, list) and "GB of memory" in result[0].text
        return
    assert isinstance(result, Program), result
    if spec.layers <= 4 or (name, target.name) == ("llama-3.2-1b-shape", "t4"):  # larger proofs take long
        assert isinstance(validate(result, Limits(shared_bytes=target.shared_bytes)), ValidProgram)
    machine = result.machine
    usual = {"smollm2-135m-shape": 32768, "smollm2-135m": 32768, "qwen3-0.6b-shape": 24576}.get(name, 16384)
    assert machine.stages >= 4 and machine.inflight == (1 if target.name == "t4" else 3)
    free = target.shared_bytes - shared_layout(result).total + machine.stages * machine.stage_bytes
    sizes = (usual, 16384, 8192) if target.feeds[0] == "bulk" else (16384, 8192)
    assert machine.stage_bytes == next(size for size in sizes if free >= 4 * size)


def test_more_tasks_than_shared_memory_holds_are_a_rejection() -> None:
    result = compile_program(replace(LLAMA_1B, max_context=64), Config(sm_assignment="round_robin"), small_target(2))
    assert isinstance(result, list)
    assert "tasks, scratch and reduction slots take" in result[0].text


def test_stage_of_a_model_with_large_heads_holds_16_kv_rows() -> None:
    wide = replace(TOY, head_dim=256)
    machine = lower(wide, Config(), small_target()).machine
    assert machine.kv_blocks_per_chunk == 1 and machine.stage_bytes == 32768


@pytest.mark.parametrize(("threads", "block"), [(128, 224), (256, 352)])
def test_threads_of_a_block(threads: int, block: int) -> None:
    assert block_threads(lower(TOY, Config(threads_per_block=threads), small_target()).machine) == block


@pytest.mark.parametrize(
    ("device", "card"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A10G", "a10g"),
        ("Tesla T4", "t4"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40", None),
        ("NVIDIA A10", None),
    ],
)
def test_device_names_of_drivers_mean_cards(device: str, card: str | None) -> None:
    assert card_of(device) == card


def test_live_card_keeps_its_own_facts_and_takes_the_bandwidth_of_its_kind() -> None:
    target = live_target("NVIDIA H100 PCIe", **LIVE)  # type: ignore[arg-type]
    assert (target.name, target.sms, target.bandwidth_gbs) == ("h100", 114, 3350)


def test_unknown_live_card_needs_a_bandwidth() -> None:
    assert live_target("NVIDIA X1", bandwidth_gbs=10.0, **LIVE).name == "auto"  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="bandwidth_gbs: must be given"):
        live_target("NVIDIA X1", **LIVE)  # type: ignore[arg-type]
