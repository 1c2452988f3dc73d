"""Every family of models: a tiny random instance of its transformers class, read from its checkpoint, against that class."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from amk.eval.oracle import Plan, judge, make_reference, rounding_points
from amk.models.registry import resolve
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.targets import small_target
from amk.schedule.validate import ValidProgram, validate
from amk.tests.models.conftest import FAMILY_CONFIGS, save_tiny
from amk.vm.reference import ReferenceVM

# Over 40 tokens, and three positions past every window (8) and past what RoPE was scaled from (64). Logits of such a model lie close
# together, so there are enough tokens for the few near ties that are allowed.
PLAN = Plan(prompt=8, steps=104, late=(107, 150, 400), late_steps=4, seed=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_a_tiny_instance_decodes_like_its_transformers_class(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nine heads of 16: the checkpoint's own 72 columns are no multiple of 16, which the compiler needs.
    monkeypatch.setitem(FAMILY_CONFIGS, "smollm2", FAMILY_CONFIGS["smollm2"] | {"hidden_size": 144})
    model = resolve(str(save_tiny(family, tmp_path / "model", dtype)))
    program = validate(lower(model.spec, Config(), small_target(4)))
    assert isinstance(program, ValidProgram), program
    reference = make_reference(model.spec, model.eager("fp32"), PLAN, rounding_points(program.program))
    finding = judge(ReferenceVM(program, model.weights), reference)
    assert finding.correct, finding.failures
    assert finding.tolerance_used <= 0.5
    assert len(finding.positions) == 116
