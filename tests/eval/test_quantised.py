"""The oracle on quantised programs: right against the same weights dequantised, wrong against any others."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from amk.eval.candidate import weight_notes
from amk.eval.errors import UsageError
from amk.eval.oracle import Finding, Plan, judge, make_reference, rounding_points
from amk.harness import _require_same_precision, evaluate
from amk.isa.weight_format import FORMATS
from amk.models.model import Model, quantised_model
from amk.models.quantise import dequantise
from amk.models.registry import describe, resolve
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.model import QuantisedMatrix
from amk.schedule.proven import ValidProgram
from amk.schedule.targets import small_target
from amk.schedule.validate import validate
from amk.tests.models.conftest import save_tiny
from amk.tests.models.test_quantised_checkpoints import CASES, quantised_folder
from amk.vm.reference import ReferenceVM

PLAN = Plan(prompt=8, steps=48, late=(107, 150), late_steps=4, seed=2)


def judged(model: Model, source: Model | None = None, weights: Any = None) -> Finding:
    """The finding on `model`'s program with `weights`, against the source model of `source`."""
    program = validate(lower(model.spec, Config(), small_target(4)))
    assert isinstance(program, ValidProgram), program
    reference = make_reference(model.spec, (source or model).eager("fp32"), PLAN, rounding_points(program.program))
    return judge(ReferenceVM(program, weights or model.weights), reference)


class Spoilt:
    """A model's weights with one quantised matrix changed."""

    def __init__(self, model: Model, name: str, change: Any) -> None:
        self.model, self.name, self.change = model, name, change

    def quantised(self, name: str, device: str = "cpu") -> QuantisedMatrix:
        matrix = self.model.weights.quantised(name, device)
        return self.change(matrix) if name == self.name else matrix

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        return dequantise(self.quantised(name, device)) if name == self.name else self.model.weights.tensor(name, device)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        return self.model.weights.rope_table(rows, device)


@pytest.mark.parametrize("form", ["int8", "int8-g64-asym", "int4-g32", "int4-g32-asym", "int4"])
def test_a_quantised_program_is_correct_with_half_of_the_tolerance_to_spare(form: str) -> None:
    finding = judged(resolve(f"toy-2L@{form}"))
    assert finding.correct and finding.tolerance_used <= 0.5, finding


def test_the_weights_before_quantising_are_not_what_it_is_judged_by() -> None:
    assert not judged(resolve("toy-2L@int4-g32"), source=resolve("toy-2L")).correct


@pytest.mark.parametrize("name", ["L0.q", "L1.down", "head"])
@pytest.mark.parametrize(
    "change",
    [
        lambda m: replace(m, zeros=m.zeros + 1),
        lambda m: replace(m, scales=m.scales.roll(1, 0)),
        lambda m: replace(m, codes=m.codes ^ 1),
    ],
    ids=["zeros", "scales", "codes"],
)
def test_wrong_zeros_scales_or_codes_of_one_matrix_fail(change: Any, name: str) -> None:
    model = resolve("toy-2L@int4-g32-asym")
    assert not judged(model, weights=Spoilt(model, name, change)).correct


@pytest.mark.parametrize("name", ["awq g32", "gptq 4 bits g32, zeros", "packed 4 bits g32", "int8 g32, zeros"])
def test_a_quantised_checkpoint_is_judged_like_any_other(name: str, tmp_path: Path) -> None:
    folder, _ = quantised_folder(save_tiny("llama3", tmp_path / "model"), CASES[name])
    finding = judged(resolve(str(folder)))
    assert finding.correct and finding.tolerance_used <= 0.5, finding


def test_the_verdict_says_what_layers_head_and_embedding_are_in() -> None:
    verdict = evaluate("toy-2L@int4-g32", "h200", {}, "cpu")
    assert verdict["correct"] and verdict["model"] == "toy-2L@int4-g32"
    (note,) = (note for note in verdict["notes"] if "weights" in note)
    assert "int4-g32 in the layers, int4-g32 in the head and bf16 in the embedding" in note
    assert weight_notes(describe("toy-2L")) == ()
    head = replace(quantised_model(resolve("toy-2L"), FORMATS["int8"]).spec, head_weights=None)
    assert "int8 in the layers, bf16 in the head" in weight_notes(head)[0]


def test_baselines_that_would_run_other_weights_are_refused() -> None:
    _require_same_precision(describe("toy-2L"))
    with pytest.raises(UsageError, match="toy-2L@int8"):
        _require_same_precision(describe("toy-2L@int8"))
