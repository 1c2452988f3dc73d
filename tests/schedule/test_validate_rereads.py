"""Products of a batch that neither keep x nor have registers for it read it once a tile: what comes over it must wait for the last tile."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from amk.eval.soundness.explorer import explore
from amk.eval.soundness.findings import Unsafe
from amk.eval.soundness.trace import check_traces
from amk.isa import matmul
from amk.isa.abi import NONE
from amk.isa.gemm import Gemm
from amk.isa.matmul import X_KEPT, MatMul
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec
from amk.schedule.program import MatVecShape, Program
from amk.schedule.proven import ValidProgram
from amk.schedule.targets import small_target
from amk.schedule.validate import validate
from amk.tests.schedule.builder import changed, find, reshaped
from amk.tests.schedule.specs import spec
from amk.tests.vm.conftest import RandomSource
from amk.vm.interface import LaunchFailed
from amk.vm.reference import UnprovenVM
from amk.vm.scheduler import adversarial

MODEL = spec("small", 64, 1, 2, 1, 32, 64, 40, max_context=64)


@pytest.fixture
def without_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """No slice of x fits a lane's registers, as one of 1,024 columns and more would not by 16 seats."""
    monkeypatch.setattr(matmul, "KEPT_SEAT_WORDS", 0)


def program(*, kept: bool, model: ModelSpec = MODEL) -> Program:
    """One SM, so that every product has all its tiles in one task. Values have places of their own."""
    lowered = lower(model, Config(page_allocation="linear"), small_target(1), batch=8)
    if kept:
        return lowered
    changes = {}
    for at in find(lowered, MatMul):
        task = lowered.task(at)
        assert isinstance(task, MatMul)
        changes[at] = MatVecShape(task.cols, task.flags & ~X_KEPT)
    return reshaped(lowered, changes)


def over_its_own_input(whole: Program) -> Program:
    """q, k and v are published where the product's x is, which nobody else needs: the residual of o is left out."""
    products = [at for at in find(whole, Gemm) if whole.matrices[whole.task(at).weight].name.endswith(("qkv", "o"))]
    qkv, o = (whole.task(at) for at in products)
    assert isinstance(qkv, Gemm) and isinstance(o, Gemm) and qkv.tiles > 1 and o.res_buf == qkv.x_buf
    first = whole.buffers[qkv.out_buf].offset
    moved = whole.buffers[qkv.x_buf].offset - first
    inside = range(first, first + whole.machine.batch * qkv.rows)
    buffers = tuple(replace(b, offset=b.offset + moved) if b.space == "arena" and b.offset in inside else b for b in whole.buffers)
    grown = max(b.offset + b.packets for b in buffers if b.space == "arena")
    alone = changed(whole, products[1], res_buf=NONE, res_tag=0)
    return replace(alone, buffers=buffers, arena_packets=max(grown, whole.arena_packets))


def test_what_is_read_once_may_be_overwritten_by_its_reader() -> None:
    wanted = over_its_own_input(program(kept=True))
    assert not any(task.rereads(wanted.machine) for queue in wanted.queues for task in queue if isinstance(task, MatMul))
    assert isinstance(validate(wanted), ValidProgram)
    assert check_traces(wanted, Random(0), orders=2) is None


@pytest.mark.usefixtures("without_registers")
def test_what_is_read_once_a_tile_may_not_be_overwritten_by_the_first() -> None:
    whole = program(kept=False)
    assert any(task.rereads(whole.machine) for queue in whole.queues for task in queue if isinstance(task, MatMul))
    assert isinstance(validate(whole), ValidProgram) and check_traces(whole, Random(0), orders=2) is None
    wrong = over_its_own_input(whole)
    verdict = validate(wrong)
    assert isinstance(verdict, tuple) and verdict[0].kind == "race" and "before it is read" in str(verdict[0])
    for found in (check_traces(wrong, Random(0), orders=2), explore(wrong)):
        assert isinstance(found, Unsafe) and found.kind in ("race", "deadlock")


@pytest.mark.usefixtures("without_registers")
def test_a_product_that_keeps_x_needs_scratch_beside_one_of_its_size_that_does_not() -> None:
    wide = replace(MODEL, layers=2, windows=(), intermediate=256)  # the products down need more than attention
    whole = program(kept=False, model=wide)
    first, second = find(whole, Gemm, cols=wide.intermediate)
    task = whole.task(second)
    assert isinstance(task, Gemm)
    mixed = reshaped(whole, {second: MatVecShape(task.cols, task.flags | X_KEPT)})
    need = mixed.task(second).shared_bytes(mixed.machine)
    assert mixed.task(first).shared_bytes(mixed.machine) == 0 < need
    assert isinstance(validate(replace(mixed, scratch_bytes=need)), ValidProgram)
    verdict = validate(replace(mixed, scratch_bytes=need - 1))
    assert isinstance(verdict, tuple) and [(r.kind, r.tasks) for r in verdict] == [("resources", (second,))]


@pytest.mark.usefixtures("without_registers")
def test_the_reference_machine_hangs_where_the_device_would() -> None:
    vm = UnprovenVM(over_its_own_input(program(kept=False)), RandomSource(MODEL), order=adversarial(1))
    with pytest.raises(LaunchFailed, match="to carry tag"):
        vm.decode_batch([[1]] * 8, [0] * 8, steps=1)


@pytest.mark.usefixtures("without_registers")
def test_the_reference_machine_reads_again_and_finds_the_same() -> None:
    proven = validate(program(kept=False))
    assert isinstance(proven, ValidProgram)
    runs = [UnprovenVM(p, RandomSource(MODEL), order=adversarial(1)) for p in (program(kept=False), program(kept=True))]
    first, second = (vm.decode_batch([[seat] for seat in range(8)], [0] * 8, steps=2) for vm in runs)
    assert first.tokens == second.tokens
