"""Machines of a batch against the source model, every row at its own position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amk.eval.batch_oracle import judge_batch
from amk.eval.oracle import Plan, make_reference, rounding_points
from amk.models.model import Model
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.tests.gpu.machines import card, config_of, llama, machine, named, proven
from amk.vm.cuda import CudaVM, DeviceWeights

pytestmark = pytest.mark.cuda
PLAN = Plan(prompt=8, steps=40, late=(127, 300, 900), late_steps=8)


def batch_machine(model: Model, batch: int, config: dict[str, Any] | None = None, context: int = 1024, **options: Any) -> CudaVM:
    program = lower(model.spec, config_of(config or {}), card(), context=context, batch=batch)
    return CudaVM(proven(program), model.weights, arch=card().arch, **options)


def accept(model: Model, batch: int, record: Any, plan: Plan = PLAN, context: int = 1024, config: dict[str, Any] | None = None) -> None:
    vm = batch_machine(model, batch, config, context)
    finding = judge_batch(vm, make_reference(model.spec, model.eager("fp32", "cuda"), plan, rounding_points(vm.program)))
    vm.close()
    record("rel_err", finding.rel_err)
    record("tolerance_used", finding.tolerance_used)
    record("top1_agreement", finding.top1_agreement)
    assert finding.correct, finding.failures
    assert finding.tolerance_used <= 0.6


@pytest.mark.parametrize("batch", [8, 16])
@pytest.mark.parametrize("name", ["toy-2L", "small"])
def test_built_in_models_are_correct_in_every_row(name: str, batch: int, record_property: Any) -> None:
    model = named(name)
    context = min(1024, model.spec.max_context)
    late = tuple(p for p in PLAN.late if p + PLAN.late_steps <= context)
    accept(model, batch, record_property, Plan(8, 40, late, 8), context)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1], ids=["group1", "group2", "group4", "group8"])
def test_any_group_is_correct(kv_heads: int, dtype: str, record_property: Any) -> None:
    accept(llama("group", dtype, num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=64), 8, record_property)


@pytest.mark.parametrize("batch", [8, 16])
def test_odd_sizes_biases_head_norms_and_windows_are_correct(batch: int, record_property: Any) -> None:
    accept(
        llama("odd", hidden_size=432, num_attention_heads=9, num_key_value_heads=3, head_dim=24, intermediate_size=732, vocab_size=3203),
        batch,
        record_property,
    )
    accept(llama("biases", architecture="Qwen2ForCausalLM", head_dim=80), batch, record_property)
    accept(llama("head-norms", architecture="Qwen3ForCausalLM", head_dim=128), batch, record_property)
    accept(llama("window", architecture="MistralForCausalLM", head_dim=64, sliding_window=100), batch, record_property)


@pytest.mark.parametrize(("hidden", "config"), [(1280, {"threads_per_block": 128}), (2816, {})], ids=["1280", "2816"])
def test_slices_that_end_within_a_chunk_are_correct(hidden: int, config: dict[str, Any], record_property: Any) -> None:
    model = llama("within", hidden_size=hidden, num_attention_heads=16, num_key_value_heads=2, head_dim=64)
    accept(model, 16, record_property, config=config)


@pytest.mark.parametrize(
    "knobs",
    [
        {"threads_per_block": 128},
        {"kernel_knobs": {"stage_bytes": 32768}},
        {"kernel_knobs": {"sync": "tags"}},
        {"tiling": {"gemv": {"N_tile": 512}}},
    ],
    ids=["128-threads", "wide-stages", "no-hints", "large-tiles"],
)
def test_configs_do_not_change_what_is_computed(knobs: dict[str, Any], record_property: Any) -> None:
    accept(named("small"), 8, record_property, config=knobs)


def test_stressed_waits_change_nothing() -> None:
    model = named("small")
    answers = []
    for macros in ({}, {"STRESS": 1}):
        vm = batch_machine(model, 8, macros=macros)
        out = vm.decode_batch([[row + 1, 2 * row + 5] for row in range(8)], [0] * 8, steps=60, logits=True)
        answers.append((out.tokens, out.logits))
        vm.close()
    assert answers[0][0] == answers[1][0]
    assert torch.equal(answers[0][1], answers[1][1])


def test_rows_do_not_touch_each_other_and_weights_are_shared() -> None:
    """A row's result does not depend on the others; the program of one token runs from the same stream and agrees."""
    model = named("small")
    one = lower(model.spec, Config(), card(), context=1024)
    weights = DeviceWeights(one, model.weights)
    alone, together = (batch_machine(model, 8, weights=weights) for _ in range(2))
    rows = [[3 * row + 1, row + 2] for row in range(8)]
    whole = together.decode_batch(rows, [0] * 8, steps=40, logits=True)
    single = alone.decode_batch(rows[:1], [0], steps=40, logits=True)
    assert torch.equal(whole.logits[:, 0], single.logits[:, 0])
    vm = CudaVM(proven(one), model.weights, arch=card().arch, weights=weights)
    reference = vm.decode([*rows[0], *whole.tokens[0][1:-1]], 0, logits=True)
    assert float((reference.logits - whole.logits[:, 0]).norm() / reference.logits.norm()) < 0.05
    for each in (alone, together, vm):
        each.close()


@pytest.mark.parametrize("batch", [8, 16])
def test_one_billion_parameters_are_correct_in_every_row(batch: int, record_property: Any) -> None:
    plan = Plan(prompt=8, steps=16, late=(127, 1023, 3000), late_steps=6)
    accept(named("llama-3.2-1b-shape"), batch, record_property, plan, 4096)


def test_a_machine_of_one_row_still_runs(record_property: Any) -> None:
    vm = machine(named("small"))
    record_property("tokens", list(vm.decode([1, 2, 3], 0, steps=20).tokens))
    vm.close()
