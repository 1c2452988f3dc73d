"""The gate on the card: each mutant of weights or device code must fail the oracle."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from amk.eval.oracle import Finding, Plan, Reference, judge, make_reference, rounding_points
from amk.models.model import Model
from amk.schedule.model import weight_shapes
from amk.tests.eval.mutants import Noisy, Turned
from amk.tests.eval.test_gate import ROPES
from amk.tests.gpu.machines import card, llama, named, program, proven
from amk.vm.build import compile_kernel
from amk.vm.cuda import CudaVM
from amk.vm.source import kernel_source

pytestmark = pytest.mark.cuda
PLAN = Plan(prompt=8, steps=40, late=(127, 1000), late_steps=8)


@cache
def model(name: str) -> Model:
    return llama("gate-window", architecture="MistralForCausalLM", head_dim=64, sliding_window=60) if name == "window" else named(name)


@cache
def reference(name: str) -> Reference:
    plan = Plan(PLAN.prompt, PLAN.steps, tuple(p for p in PLAN.late if p + PLAN.late_steps <= context(name)), PLAN.late_steps)
    points = rounding_points(program(model(name), context=context(name)))
    return make_reference(model(name).spec, model(name).eager("fp32", "cuda"), plan, points)


def context(name: str) -> int:
    return min(1024, model(name).spec.max_context)


def finding(name: str, source: Any = None, edit: tuple[str, str] | None = None) -> Finding:
    m = model(name)
    p = program(m, context=context(name))
    text = kernel_source(p)
    if edit:
        assert edit[0] in text, f"the mutant must find the code it changes: {edit[0]}"
        text = text.replace(*edit)
    vm = CudaVM(proven(p), source or m.weights, arch=card().arch, binary=compile_kernel(text, card().arch))
    result = judge(vm, reference(name))
    vm.close()
    return result


def tensors(name: str, *layers: int) -> list[str]:
    """Every weight of the layers and the ones outside layers."""
    wanted = tuple(f"L{layer}." for layer in layers)
    return [n for n in weight_shapes(model(name).spec) if n.startswith(wanted) or not n.startswith("L")]


@pytest.mark.parametrize("name", ["toy", "toy-2L", "small", "window", "smollm2-135m"])
def test_the_true_model_uses_at_most_half_of_the_tolerance(name: str, record_property: Any) -> None:
    true = finding(name)
    record_property("tolerance_used", true.tolerance_used)
    assert true.correct and true.tolerance_used <= 0.5, true


@pytest.mark.parametrize(("name", "layers"), [("toy", (0,)), ("small", (0, 1, 2)), ("window", (0, 1)), ("smollm2-135m", (0, 15, 29))])
def test_noise_in_any_one_tensor_fails(name: str, layers: tuple[int, ...], record_property: Any) -> None:
    share = 0.1 if model(name).spec.layers > 4 else 0.02
    used = {tensor: finding(name, Noisy(model(name), tensor, share)) for tensor in tensors(name, *layers)}
    record_property("tolerance_used", {tensor: f.tolerance_used for tensor, f in used.items()})
    assert not [tensor for tensor, f in used.items() if f.correct]


@pytest.mark.parametrize("name", ["toy", "small", "smollm2-135m"])
@pytest.mark.parametrize("change", ROPES)
def test_wrong_rope_fails(name: str, change: str) -> None:
    assert not finding(name, Turned(model(name), ROPES[change])).correct


EDITS = {
    "newest row left out": ("if (seen % CONSUMER_WARPS == c.warp) attend_new_row(s, nq, c.lane);", ""),
    "mask off by one": ("min(KV_BLOCK_ROWS, position - block * KV_BLOCK_ROWS)", "min(KV_BLOCK_ROWS, position - 1 - block * KV_BLOCK_ROWS)"),
    "one stale row": (
        "const int at = token.position % KV_BLOCK_ROWS;",
        "const int at = (token.position == 9 ? 8 : token.position) % KV_BLOCK_ROWS;",
    ),
    "wrong score scale": ("LOG2E * rsqrtf((float)HEAD_DIM)", "LOG2E * rsqrtf((float)HEAD_DIM * 1.1f)"),
    "dropped residual": (
        "if (mine && residual) extra += s.read(residual + r, want);",
        "if (mine && residual && task.weight != RESIDUAL_WEIGHT) extra += s.read(residual + r, want);",
    ),
    "norm scale left out": ("if (first) scale = rsqrtf", "if (false) scale = rsqrtf"),
}
WIDER_WINDOW = ("position - task.window + 1) : 0;", "position - task.window) : 0;")


@pytest.mark.parametrize("name", ["toy", "small", "smollm2-135m"])
@pytest.mark.parametrize("edit", EDITS)
def test_wrong_device_code_fails(name: str, edit: str) -> None:
    old, new = EDITS[edit]
    matrices = [matrix.name for matrix in program(model(name), context=context(name)).matrices]
    o_proj = next(i for i, matrix in enumerate(matrices) if matrix.endswith(".o"))
    assert not finding(name, edit=(old, new.replace("RESIDUAL_WEIGHT", str(o_proj)))).correct


def test_a_window_off_by_one_fails() -> None:
    assert not finding("window", edit=WIDER_WINDOW).correct
