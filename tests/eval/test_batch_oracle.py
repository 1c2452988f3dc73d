"""The oracle of batches, on the reference machine: true models pass, and a wrong row among many is found."""

from __future__ import annotations

from typing import Any

import pytest

from amk.eval.batch_oracle import judge_batch
from amk.eval.oracle import Plan, Reference, make_reference, rounding_points
from amk.models.registry import resolve
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.targets import small_target
from amk.schedule.validate import ValidProgram, validate
from amk.vm.reference import ReferenceVM

MODEL = resolve("toy-2L")
PLAN = Plan(prompt=6, steps=20, late=(60, 127), late_steps=6)


@pytest.fixture(scope="module")
def proof() -> ValidProgram:
    valid = validate(lower(MODEL.spec, Config(), small_target(4), batch=8, context=256))
    assert isinstance(valid, ValidProgram)
    return valid


@pytest.fixture(scope="module")
def reference(proof: ValidProgram) -> Reference:
    return make_reference(MODEL.spec, MODEL.eager("fp32"), PLAN, rounding_points(proof.program))


class OneRowShifted(ReferenceVM):
    """Row 5 is decoded one position too late."""

    def decode_batch(self, tokens: Any, positions: Any, **options: Any) -> Any:
        return super().decode_batch(tokens, [p + (row == 5) for row, p in enumerate(positions)], **options)


def test_the_true_model_uses_at_most_half_of_the_tolerance(proof: ValidProgram, reference: Reference) -> None:
    finding = judge_batch(ReferenceVM(proof, MODEL.weights), reference)
    assert finding.correct, finding.failures
    assert finding.tolerance_used <= 0.5
    assert {0, 60, 127, 63} <= set(finding.positions)


def test_one_wrong_row_is_found(proof: ValidProgram, reference: Reference) -> None:
    assert not judge_batch(OneRowShifted(proof, MODEL.weights), reference).correct
