"""The CUDA machine against the source model: shapes, head sizes, groups, dtypes, positions, configs."""

from __future__ import annotations

from typing import Any

import pytest

from amk.eval.oracle import Finding, Plan, default_plan, judge, make_reference, rounding_points
from amk.models.model import Model
from amk.tests.gpu.machines import llama, machine, named

pytestmark = pytest.mark.cuda

GUIDE: dict[str, Any] = {
    "tiling": {"gemv": {"N_tile": 128}, "attention": {"kv_block": 128}}, "fusion_grouping": [], "sm_assignment": "load_balance",
    "pipelining_depth": 3, "page_allocation": "graph_color", "threads_per_block": 256, "smem_bytes_per_block": 0,
}  # fmt: skip
PLAN = Plan(prompt=8, steps=40, late=(127, 1000), late_steps=4)


def judged(model: Model, config: dict[str, Any] | None = None, plan: Plan = PLAN, context: int = 1024, **options: Any) -> Finding:
    """`options` are CudaVM's."""
    vm = machine(model, config, context, **options)
    finding = judge(vm, make_reference(model.spec, model.eager("fp32", "cuda"), plan, rounding_points(vm.program)))
    vm.close()
    return finding


def accept(finding: Finding, record: Any) -> None:
    record("rel_err", finding.rel_err)
    record("tolerance_used", finding.tolerance_used)
    record("top1_agreement", finding.top1_agreement)
    record("positions", [finding.positions[0], finding.positions[-1]])
    assert finding.correct, finding.failures
    assert finding.tolerance_used <= 0.5


@pytest.mark.parametrize("config", [{}, GUIDE], ids=["default", "guide"])
@pytest.mark.parametrize("name", ["toy", "toy-2L", "small"])
def test_built_in_models_are_correct(name: str, config: dict[str, Any], record_property: Any) -> None:
    model = named(name)
    context = min(1024, model.spec.max_context)
    accept(judged(model, config, default_plan(model.spec, context, "cuda"), context), record_property)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("head_dim", [8, 24, 80, 96, 128, 256])
def test_any_head_size_is_correct(head_dim: int, dtype: str, record_property: Any) -> None:
    accept(judged(llama(f"heads-{head_dim}", dtype, head_dim=head_dim)), record_property)


@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1], ids=["group1", "group2", "group4", "group8"])
def test_any_group_is_correct(kv_heads: int, record_property: Any) -> None:
    model = llama("group", num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=64)
    accept(judged(model), record_property)


def test_group_of_three_and_a_vocabulary_of_32003_are_correct(record_property: Any) -> None:
    model = llama("odd", num_attention_heads=9, num_key_value_heads=3, head_dim=64, hidden_size=576, vocab_size=32003)
    accept(judged(model), record_property)


def test_sliding_window_is_correct_past_its_edge(record_property: Any) -> None:
    model = llama("window", architecture="MistralForCausalLM", head_dim=64, sliding_window=100)
    accept(judged(model), record_property)


def test_biases_are_correct(record_property: Any) -> None:
    accept(judged(llama("biases", architecture="Qwen2ForCausalLM", head_dim=80)), record_property)


def test_head_norms_are_correct(record_property: Any) -> None:
    accept(judged(llama("head-norms", architecture="Qwen3ForCausalLM", head_dim=128)), record_property)


@pytest.mark.parametrize(
    "knobs",
    [
        {"threads_per_block": 128},
        {"kernel_knobs": {"stage_bytes": 32768, "kv_splits": 16}},
        {"kernel_knobs": {"sync": "tags", "stage_bytes": 8192, "reduction_slots": 4}},
        {"sm_assignment": "round_robin", "page_allocation": "linear", "tiling": {"gemv": {"N_tile": 512}}},
    ],
    ids=["128-threads", "wide-stages", "no-hints", "large-tiles"],
)
def test_configs_do_not_change_what_is_computed(knobs: dict[str, Any], record_property: Any) -> None:
    accept(judged(named("small"), knobs), record_property)


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_ring_of_fewer_stages_than_chunks_are_looked_at_at_once_changes_no_bit(stages: int) -> None:
    """A tile of 2,048 columns comes in four chunks, which consumers take without a look for each where all have landed."""
    model, knobs = llama("ring", hidden_size=2048), {"kernel_knobs": {"stage_bytes": 16384}}
    found = []
    for config in (knobs, knobs | {"smem_bytes_per_block": stages * 16384}):
        vm = machine(model, config)
        assert vm.program.machine.stages == stages or config is knobs
        found += [vm.decode([1, 5, 9], 0, steps=400, logits=True)]
        vm.close()
    wide, small = found
    assert small.tokens == wide.tokens and bool((small.logits == wide.logits).all())


def test_one_billion_parameters_are_correct_at_early_and_late_positions(record_property: Any) -> None:
    model = named("llama-3.2-1b-shape")
    plan = Plan(prompt=8, steps=24, late=(127, 1023, 8000), late_steps=4)
    finding = judged(model, plan=plan, context=8192)
    assert {0, 16, 127, 1023, 8000} <= set(finding.positions)
    accept(finding, record_property)
