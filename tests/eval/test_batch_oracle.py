"""The oracle of batches, on the reference machine: true models pass, and a wrong row among many is found."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from amk.eval.batch_oracle import judge_batch, together
from amk.eval.oracle import Finding, Plan, Reference, make_reference, rounding_points
from amk.isa.batch import deinterleave
from amk.isa.gemm import Gemm
from amk.isa.instruction import F32, Memory
from amk.isa.matmul import MatMul
from amk.models.model import Model
from amk.models.registry import resolve
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.targets import small_target
from amk.schedule.validate import ValidProgram, validate
from amk.tests.models.conftest import FAMILY_CONFIGS, save_tiny
from amk.vm.reference import ReferenceVM

MODEL = resolve("toy-2L")
PLAN = Plan(prompt=6, steps=20, late=(60, 127), late_steps=6)
SEAT = 5  # the row that is wrong
Sums = Callable[[MatMul, Memory, F32, slice], tuple[F32, Any]]


def proven(model: Model, batch: int = 8) -> ValidProgram:
    valid = validate(lower(model.spec, Config(), small_target(4), batch=batch, context=256))
    assert isinstance(valid, ValidProgram)
    return valid


def reference_of(model: Model, proof: ValidProgram, plan: Plan) -> Reference:
    return make_reference(model.spec, model.eager("fp32"), plan, rounding_points(proof.program))


@pytest.fixture(scope="module")
def proof() -> ValidProgram:
    return proven(MODEL)


@pytest.fixture(scope="module")
def reference(proof: ValidProgram) -> Reference:
    return reference_of(MODEL, proof, PLAN)


@pytest.fixture(scope="module")
def true_finding(proof: ValidProgram, reference: Reference) -> Finding:
    return judge_batch(ReferenceVM(proof, MODEL.weights), reference)


class OneRowShifted(ReferenceVM):
    """Row 5 is decoded one position too late."""

    def decode_batch(self, tokens: Any, positions: Any, **options: Any) -> Any:
        return super().decode_batch(tokens, [p + (row == 5) for row, p in enumerate(positions)], **options)


class OneRowStrays(ReferenceVM):
    """Row 5 takes another token than its best after step 7 of the first 20; where that leads to has nothing in common with the source."""

    def decode_batch(self, tokens: Any, positions: Any, **options: Any) -> Any:
        decoded = super().decode_batch(tokens, positions, **options)
        if options.get("steps") != PLAN.steps:
            return decoded
        chosen = [list(row) for row in decoded.tokens]
        chosen[SEAT][7] = (chosen[SEAT][7] + 1) % MODEL.spec.vocab
        decoded.logits[8:, SEAT] = math.nan
        return replace(decoded, tokens=tuple(map(tuple, chosen)))


class OneRowScaled(ReferenceVM):
    """V of row 5 is 3 % too large in layer 1."""

    def read_kv(self, layer: int, stop: int, row: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = super().read_kv(layer, stop, row)
        return keys, values * (1.03 if (layer, row) == (1, SEAT) else 1)


def noise(share: float) -> Callable[[Sums], Sums]:
    """Gaussian noise of `share` in the seat's x: what as much in the matrix's columns is."""

    def of(true: Sums) -> Sums:
        def sums(task: MatMul, memory: Memory, x: F32, columns: slice) -> tuple[F32, Any]:
            moved = x.copy()
            moved[:, SEAT] *= 1 + share * np.random.default_rng(0).standard_normal(len(x), dtype=np.float32)
            return true(task, memory, moved, columns)

        return sums

    return of


def squares(factor: float) -> Callable[[Sums], Sums]:
    """The squares that the seat's norm adds up come to `factor` of what they are."""

    def of(true: Sums) -> Sums:
        def sums(task: MatMul, memory: Memory, x: F32, columns: slice) -> tuple[F32, Any]:
            y, added = true(task, memory, x, columns)
            return y, np.where(np.arange(task.batch) == SEAT, factor * added, added)

        return sums

    return of


def residual(factor: float) -> Callable[[Sums], Sums]:
    """The seat's residual stream is added as `factor` of what it is."""

    def of(true: Sums) -> Sums:
        def sums(task: MatMul, memory: Memory, x: F32, columns: slice) -> tuple[F32, Any]:
            assert isinstance(task, Gemm)
            y, added = true(task, memory, x, columns)
            for tile, rows in enumerate(task.tile_slices()):
                y[rows, SEAT] += (factor - 1) * deinterleave(memory.read(task._residual(memory.machine, tile)), task.batch)[:, SEAT]
            return y, added

        return sums

    return of


@pytest.mark.parametrize(
    ("matrix", "change"),
    [
        *((name, noise(0.03)) for name in ("head", "L1.down", "L1.gate_up", "L1.o")),
        ("head", squares(1.04)), ("L1.gate_up", squares(1.04)), ("L1.down", residual(0.97)), ("L1.o", residual(0.97)),
    ],
    ids=["noise-head", "noise-down", "noise-gate_up", "noise-o", "squares-head", "squares-gate_up", "residual-down", "residual-o"],
)  # fmt: skip
def test_one_seat_that_is_wrong_at_the_end_of_the_model_is_found(
    matrix: str, change: Callable[[Sums], Sums], proof: ValidProgram, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no later layer's KV rows show it: of the last layer and the head."""
    changed, true = next(i for i, m in enumerate(proof.program.matrices) if m.name == matrix), MatMul.slice_sums
    wrong = change(true)

    def sums(task: MatMul, memory: Memory, x: F32, columns: slice) -> tuple[F32, Any]:
        return (wrong if task.weight == changed else true)(task, memory, x, columns)

    monkeypatch.setattr(MatMul, "slice_sums", sums)
    finding = judge_batch(ReferenceVM(proof, MODEL.weights), reference)
    assert not finding.correct and finding.tolerance_used > 1.5
    assert all(text.startswith(f"row {SEAT}: logit error") for text in finding.failures)


@pytest.mark.parametrize("seed", [2, 6])
def test_rows_that_differ_from_the_source_at_one_near_tie_alike_are_correct(seed: int, tmp_path: Path) -> None:
    """Rows of the same tokens are no independent draws. Logits of this model lie close together."""
    model = resolve(str(save_tiny("qwen2 windows", tmp_path / "model", torch.bfloat16)))
    own = proven(model)
    reference = reference_of(model, own, Plan(prompt=8, steps=40, late=(60, 107), late_steps=6, seed=seed))
    finding = judge_batch(ReferenceVM(own, model.weights), reference)
    assert finding.correct, finding.failures
    assert finding.near_ties >= own.program.machine.batch
    assert finding.tolerance_used <= 0.5


@pytest.mark.parametrize("family", ["smollm2", "llama3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_yardstick_rounds_where_products_of_a_batch_do(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that adds in nearly the same order then errs as expected at every position, wild ones too."""
    monkeypatch.setitem(FAMILY_CONFIGS, "smollm2", FAMILY_CONFIGS["smollm2"] | {"hidden_size": 144})
    model = resolve(str(save_tiny(family, tmp_path / "model", dtype)))
    own = proven(model, 16)
    reference = reference_of(model, own, Plan(prompt=8, steps=16, late=(60,), late_steps=2, seed=1))
    finding = judge_batch(ReferenceVM(own, model.weights), reference)
    assert finding.correct, finding.failures
    assert finding.tolerance_used <= 0.5


@pytest.mark.parametrize("wrong", [(), (2,), (0, 3)])
def test_of_many_rows_the_first_that_fails_is_told_and_the_largest_share_counts(wrong: tuple[int, ...]) -> None:
    def finding(row: int) -> Finding:
        told = (f"what is wrong in {row}",) if row in wrong else ()
        return Finding(not told, 0.1 * row, float(row), 1 - 0.1 * row, 0.2 + bool(told) * row, row, (row, 100), told)

    found = together([finding(row) for row in range(4)])
    assert found.correct == (not wrong) and found.near_ties == 6 and found.positions == (0, 100, 1, 100, 2, 100, 3, 100)
    assert found.tolerance_used == pytest.approx(0.2 + max(wrong, default=0)) and found.max_abs_err == 3
    assert found.rel_err == pytest.approx((0.14 / 4) ** 0.5) and found.top1_agreement == pytest.approx(0.85)
    assert found.failures == {(): (), (2,): ("row 2: what is wrong in 2",), (0, 3): ("row 0 and 1 more: what is wrong in 0",)}[wrong]


def test_the_true_model_uses_at_most_half_of_the_tolerance(true_finding: Finding) -> None:
    assert true_finding.correct, true_finding.failures
    assert true_finding.tolerance_used <= 0.5


def test_every_row_is_judged_at_every_late_position_and_rows_of_the_same_one_begin_apart(true_finding: Finding) -> None:
    """Four steps at each: two of the plan's six are left for rows to begin up to two tokens later."""
    rows = [true_finding.positions[at : at + 28] for at in range(0, len(true_finding.positions), 28)]
    late = [(60, 127), (127, 60), (61, 128), (128, 61), (62, 129), (129, 62), (60, 127), (127, 60)]
    assert rows == [(*range(20), *range(a, a + 4), *range(b, b + 4)) for a, b in late]


def test_one_wrong_row_is_found(proof: ValidProgram, reference: Reference) -> None:
    assert not judge_batch(OneRowShifted(proof, MODEL.weights), reference).correct


def test_one_row_that_leaves_the_track_is_judged_on_it_again(proof: ValidProgram, reference: Reference, true_finding: Finding) -> None:
    finding = judge_batch(OneRowStrays(proof, MODEL.weights), reference)
    assert finding.positions == true_finding.positions
    assert [text.endswith("at position 7") for text in finding.failures] == [True, True]  # not the source's token, nor the best of its own
    assert true_finding.top1_agreement == 1  # no other row leaves it


def test_wrong_kv_rows_of_one_row_are_found(proof: ValidProgram, reference: Reference) -> None:
    (told,) = judge_batch(OneRowScaled(proof, MODEL.weights), reference).failures
    assert told.startswith(f"row {SEAT}: error of the V rows of layer 1")
