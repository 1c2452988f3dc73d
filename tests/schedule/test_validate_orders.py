"""A value of a batch is read in the order in which it was written: interleaved or by seat. The other one has the very same elements."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from amk.eval.soundness.trace import check_traces
from amk.isa.gemm import Gemm
from amk.isa.matmul import OUT_BY_SEAT, X_BY_SEAT, MatMul
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import MatVecShape, Program
from amk.schedule.proven import ValidProgram
from amk.schedule.targets import small_target
from amk.schedule.validate import validate
from amk.tests.schedule.builder import find, reshaped
from amk.tests.schedule.specs import SMALL


def otherwise(program: Program, flag: int) -> Program:
    """Every product that has the flag does without it, and there is device code for that."""
    changes = {}
    for at in find(program, Gemm):
        task = program.task(at)
        assert isinstance(task, MatMul)
        if task.flags & flag:
            changes[at] = MatVecShape(task.cols, task.flags & ~flag)
    assert changes
    return reshaped(program, changes)


@pytest.mark.parametrize("flag", [OUT_BY_SEAT, X_BY_SEAT])
def test_a_value_in_the_other_order_is_of_another_kind(flag: int) -> None:
    model = replace(SMALL[0], dtype="bf16", layers=2, windows=())
    program = lower(model, Config(), small_target(4), batch=8)
    assert isinstance(validate(program), ValidProgram) and check_traces(program, Random(0), orders=2) is None
    wrong = otherwise(program, flag)
    found, verdict = check_traces(wrong, Random(0), orders=2), validate(wrong)
    assert found is not None and found.kind == "kind"
    assert isinstance(verdict, tuple) and verdict[0].kind == "kind" and "interleaved" in str(verdict[0])
    # What is written interleaved is narrow, so it has half of the packets: those that are missing are seen too.
    assert {reason.kind for reason in verdict} == ({"kind"} if flag == X_BY_SEAT else {"kind", "coverage", "race"})
