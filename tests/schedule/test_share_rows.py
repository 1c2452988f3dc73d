"""Which products' tiles the warps share out whole, that nothing else changes, and that the proof refuses what the device cannot do."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from amk.dev import sanitize
from amk.eval.soundness.static_rules import static_problem
from amk.isa.abi import NONE
from amk.isa.gemv_glu import GemvGlu
from amk.isa.gemv_glu_rows import GemvGluRows, rows_possible
from amk.isa.instruction import Instruction
from amk.isa.weight_format import FORMATS
from amk.models.quantised_weights import with_weights
from amk.schedule import compile
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.proven import ValidProgram
from amk.schedule.share_rows import share_rows
from amk.schedule.targets import TARGETS, small_target
from amk.schedule.validate import validate
from amk.tests.schedule.specs import LLAMA_1B, spec
from amk.vm.build import compile_kernel
from amk.vm.source import kernel_source

MODEL = spec("rows", 1024, 2, 4, 2, 64, 736, 300)  # 92 tiles of gate and up
GROUPED = [name for name in FORMATS if name.startswith("int4-g")]


def program(form: str | None, sms: int = 8, **knobs: Any) -> Program:
    model = with_weights(MODEL, FORMATS[form]) if form else MODEL
    return lower(model, Config(**knobs), small_target(sms))


def as_glu(task: Instruction) -> Instruction:
    return GemvGlu(**{f.name: getattr(task, f.name) for f in fields(task)}) if isinstance(task, GemvGluRows) else task


def rows_everywhere(made: Program) -> Program:
    """The program with gate and up by rows, possible or not."""
    return replace(
        made, queues=tuple(tuple(GemvGluRows.of(task) if isinstance(task, GemvGlu) else task for task in queue) for queue in made.queues)
    )


def without(made: Program) -> Program:
    """The program before tiles were shared out."""
    return replace(made, queues=tuple(tuple(map(as_glu, queue)) for queue in made.queues))


def before_sharing(patch: pytest.MonkeyPatch, form: str, **knobs: Any) -> Program:
    """The program as the pass before hands it on."""
    with patch.context() as away:
        away.setattr(compile, "share_rows", lambda made: made)
        return program(form, **knobs)


def changed(made: Program, **words: int) -> Program:
    """The program with other words in its first product by rows."""
    sm, index = next((s, i) for s, queue in enumerate(made.queues) for i, task in enumerate(queue) if task.by_rows)
    queues = [list(queue) for queue in made.queues]
    queues[sm][index] = replace(queues[sm][index], **words)
    return replace(made, queues=tuple(map(tuple, queues)))


def kinds(made: Program) -> set[str]:
    verdict = validate(made)
    return set() if isinstance(verdict, ValidProgram) else {rejection.kind for rejection in verdict}


@pytest.mark.parametrize("form", GROUPED)
def test_gate_and_up_of_grouped_codes_are_shared_out_and_proven(form: str) -> None:
    made = program(form)
    assert {type(task) for queue in made.queues for task in queue if isinstance(task, GemvGlu)} == {GemvGluRows}
    assert not without(made).by_rows
    assert share_rows(without(made)) == made
    assert not kinds(made)


@pytest.mark.parametrize("sync", ["counter", "tags"])
def test_nobody_counts_the_arrivals_of_tasks_by_rows_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch, sync: str) -> None:
    made, plain = program("int4-g64", sync=sync), before_sharing(monkeypatch, "int4-g64", sync=sync)
    assert made.by_rows and not plain.by_rows
    assert made.counters == tuple(name for name in plain.counters if not name.endswith("gate_up"))
    assert (len(plain.counters) - len(made.counters)) == (made.layers if sync == "counter" else 0)

    def names(of: Program, counter: int) -> str:
        return "" if counter == NONE or of.counters[counter].endswith("gate_up") else of.counters[counter]

    def without_counters(task: Instruction) -> Instruction:
        return replace(as_glu(task), wait_counter=NONE, wait_count=0, done_counter=NONE)

    for queue, was in zip(made.queues, plain.queues, strict=True):
        for task, old in zip(queue, was, strict=True):
            assert without_counters(task) == without_counters(old)
            assert names(made, task.wait_counter) == names(plain, old.wait_counter)
            assert names(made, task.done_counter) == names(plain, old.done_counter)
            assert task.wait_count == (old.wait_count if task.wait_counter != NONE else 0)


def test_a_counter_at_which_other_tasks_arrive_too_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = before_sharing(monkeypatch, "int4-g64")
    first = next(i for i, task in enumerate(plain.queues[0]) if isinstance(task, GemvGlu))
    queues = [list(queue) for queue in plain.queues]
    queues[0][first] = replace(queues[0][first], tiles=1)
    made = share_rows(replace(plain, queues=tuple(map(tuple, queues))))
    assert made.by_rows and not made.queues[0][first].by_rows
    assert "L0.gate_up" in made.counters and "L1.gate_up" not in made.counters


@pytest.mark.parametrize("form", [None, *(name for name in FORMATS if name not in GROUPED)])
def test_other_formats_share_out_columns(form: str | None) -> None:
    assert not program(form).by_rows


@pytest.mark.parametrize(("sms", "shared"), [(92, False), (31, False), (23, True), (1, True)])
def test_at_least_half_of_the_warps_must_have_a_tile(sms: int, shared: bool) -> None:
    assert program("int4-g128", sms).by_rows == shared


def test_the_target_of_the_published_figure_shares_them_out() -> None:
    assert lower(with_weights(LLAMA_1B, FORMATS["int4-g128"]), Config(), TARGETS["h200"], context=4096).by_rows


@pytest.mark.parametrize(("stages", "shared"), [(3, False), (4, True)])
def test_the_ring_must_hold_as_many_tiles(stages: int, shared: bool) -> None:
    ring = stages * program("int4-g64", stage_bytes=16384).machine.stage_bytes
    made = program("int4-g64", stage_bytes=16384, smem_bytes_per_block=ring)
    assert made.machine.stages == stages and made.by_rows == shared


@pytest.mark.parametrize(("stage_bytes", "shared"), [(16384, True), (8192, True), (4096, False)])
def test_a_tile_must_be_one_chunk(stage_bytes: int, shared: bool) -> None:
    assert program("int4-g64", stage_bytes=stage_bytes).by_rows == shared


def test_every_warp_must_have_as_many_pieces() -> None:
    uneven = lower(with_weights(replace(MODEL, hidden=1152), FORMATS["int4-g128"]), Config(), small_target(8))  # 9 pieces for 8 warps
    assert not uneven.by_rows


def test_a_task_that_may_not_be_shared_out_is_refused() -> None:
    """By the proof and by the rules of the soundness audit, which know of it by themselves."""
    made = program("int4-g64")
    narrow = replace(made, machine=replace(made.machine, stage_bytes=made.machine.stage_bytes // 4))
    uneven = lower(with_weights(replace(MODEL, hidden=1152), FORMATS["int4-g128"]), Config(), small_target(8))
    forced = [rows_everywhere(each) for each in (uneven, *(program(form) for form in FORMATS if form not in GROUPED))]
    for refused in (narrow, *forced):
        assert "kind" in kinds(refused)
        assert static_problem(refused) is not None
    assert static_problem(made) is None
    for flags in (FORMATS["int8-g64"].flags, 16 | 32):  # the second is no format at all
        assert "kind" in kinds(changed(made, flags=flags))


def test_tiles_are_shared_out_only_where_scratch_holds_what_warps_tell_each_other() -> None:
    """Where gate and up are the widest product, scratch is as large as their digits: what lies behind those is too much."""
    tight = lower(
        with_weights(replace(MODEL, hidden=2048), FORMATS["int4-g32-asym"]),
        Config(smem_bytes_per_block=98304, stage_bytes=16384),
        small_target(8),
    )
    task = next(task for queue in tight.queues for task in queue if isinstance(task, GemvGlu))
    assert not tight.by_rows and rows_possible(tight.machine, task.cols, task.flags)
    need = GemvGluRows.of(task).shared_bytes(tight.machine)
    assert need > tight.scratch_bytes
    roomy = share_rows(replace(tight, scratch_bytes=need))
    assert roomy.by_rows and not kinds(roomy)
    assert "resources" in kinds(replace(roomy, scratch_bytes=need - 16))
    assert not share_rows(replace(tight, scratch_bytes=need - 16)).by_rows


@pytest.mark.parametrize(("cols", "flags"), [(1024, 0), (1024, 16), (1024, FORMATS["int8"].flags), (0, FORMATS["int4-g64"].flags)])
def test_what_no_tile_can_be_is_not_possible(cols: int, flags: int) -> None:
    assert not rows_possible(program("int4-g64").machine, cols, flags)


@pytest.mark.parametrize("head", [None, "int8", "int8-asym", "int4-asym", "int4-g32-asym"])
def test_kernels_build_whatever_format_the_head_is_in(head: str | None) -> None:
    """A tied head is in 16 bits beside layers of codes: its shape is compiled too, and has no tiles that could be shared out."""
    made = with_weights(MODEL, FORMATS["int4-g64-asym"])
    mixed = lower(replace(made, head_weights=FORMATS[head] if head else None), Config(), small_target(8))
    assert mixed.by_rows and not kinds(mixed)
    assert compile_kernel(kernel_source(mixed), "sm_90a").spill_store_bytes == 0


def test_the_sanitizer_looks_at_a_program_that_shares_out_tiles() -> None:
    assert sanitize.program("int4", sanitize.small(TARGETS["h200"], 4)).by_rows


def test_only_kernels_that_share_out_tiles_hold_their_code() -> None:
    assert "OP_GEMV_GLU_ROWS" in kernel_source(program("int4-g64"))
    assert not any("GLU_ROWS" in kernel_source(program(form)) for form in ("int8-g64", "int4", None))
