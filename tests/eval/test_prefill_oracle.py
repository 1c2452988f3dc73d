"""The oracle of prefill, on the reference machine: true models pass, wrong stretches are found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from amk.eval.oracle import Plan, Reference, make_reference, rounding_points
from amk.eval.prefill_oracle import judge_prefill
from amk.isa.stretch_attention import StretchAttention
from amk.models.registry import resolve
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.targets import small_target
from amk.schedule.validate import ValidProgram, validate
from amk.vm.reference import ReferenceVM

MODEL = resolve("toy-2L")
BATCH = 32
PLAN = Plan(prompt=44, steps=50, late=(60, 127), late_steps=26)


def proof(batch: int) -> ValidProgram:
    valid = validate(lower(MODEL.spec, Config(), small_target(4), batch=batch, prefill=batch > 1, context=256))
    assert isinstance(valid, ValidProgram)
    return valid


@pytest.fixture(scope="module")
def reference() -> Reference:
    return make_reference(MODEL.spec, MODEL.eager("fp32"), PLAN, rounding_points(proof(BATCH).program))


def machines(kind: type[ReferenceVM] = ReferenceVM) -> tuple[ReferenceVM, ReferenceVM]:
    decoder = ReferenceVM(proof(1), MODEL.weights)
    return kind(proof(BATCH), MODEL.weights, beside=decoder), decoder


class Shifted(ReferenceVM):
    """The second stretch and those after it come one position too late."""

    def prefill(self, tokens: Any, position: int) -> None:
        super().prefill(tokens[:BATCH], position)
        if tokens[BATCH:]:
            super().prefill(tokens[BATCH:], position + BATCH + 1)


class Forgetful(ReferenceVM):
    """Seats do not see rows that are 16 or more positions old."""

    def prefill(self, tokens: Any, position: int) -> None:
        queues = tuple(tuple(replace(t, window=16) if isinstance(t, StretchAttention) else t for t in q) for q in self.program.queues)
        self.program = replace(self.program, queues=queues)
        super().prefill(tokens, position)


class Scaled(ReferenceVM):
    """V of the first stretches alone is 3 % too large in layer 1."""

    def read_kv(self, layer: int, stop: int, row: int = 0) -> tuple[Any, Any]:
        keys, values = super().read_kv(layer, stop, row)
        return keys, values * (1.03 if layer == 1 and stop < PLAN.late[0] else 1)


def test_the_true_model_uses_at_most_half_of_the_tolerance(reference: Reference) -> None:
    finding = judge_prefill(*machines(), reference)
    assert finding.correct, finding.failures
    assert finding.tolerance_used <= 0.5
    assert {43, 49, 82, 149 + 3} <= set(finding.positions)


@pytest.mark.parametrize("kind", [Shifted, Forgetful])
def test_wrong_stretches_are_found(kind: type[ReferenceVM], reference: Reference) -> None:
    assert not judge_prefill(*machines(kind), reference).correct


def test_right_rows_of_later_stretches_and_those_that_were_decoded_excuse_no_wrong_ones(reference: Reference) -> None:
    """Decoded rows, here expected to err by anything, come after those of the early stretches."""
    expected = reference.early.rows_expected.clone()
    expected[:, :, PLAN.prompt - 1 :] = 1e9
    lenient = replace(reference, early=replace(reference.early, rows_expected=expected))
    decoder = Scaled(proof(1), MODEL.weights)
    (told,) = judge_prefill(ReferenceVM(proof(BATCH), MODEL.weights, beside=decoder), decoder, lenient).failures
    assert told.startswith("error of the V rows of layer 1")
