"""Machines for prefill against the source model: the rows of stretches, and what is decoded from them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from amk.eval.oracle import Plan, make_reference, rounding_points
from amk.eval.prefill_oracle import judge_prefill
from amk.models.model import Model
from amk.schedule.compile import lower
from amk.schedule.settings import STRETCHES
from amk.tests.gpu.machines import card, config_of, llama, machine, named, proven
from amk.vm.abort import Actor
from amk.vm.cuda import CudaVM
from amk.vm.interface import LaunchFailed

pytestmark = pytest.mark.cuda
# 150 tokens are whole stretches and a part of one; late ones begin within a block of KV rows, and at its edge.
PLAN = Plan(prompt=150, steps=156, late=(160, 333, 900), late_steps=76)


def pair(model: Model, batch: int, config: dict[str, Any] | None = None, context: int = 1024, **options: Any) -> tuple[CudaVM, CudaVM]:
    """The machine for prefill and the one that decodes."""
    decoder = machine(model, config, context)
    program = lower(model.spec, config_of(config or {}), card(), context=context, batch=batch, prefill=True)
    return CudaVM(proven(program), model.weights, arch=card().arch, beside=decoder, **options), decoder


def accept(model: Model, batch: int, record: Any, plan: Plan = PLAN, context: int = 1024, config: dict[str, Any] | None = None) -> None:
    prefill, decoder = pair(model, batch, config, context)
    finding = judge_prefill(
        prefill, decoder, make_reference(model.spec, model.eager("fp32", "cuda"), plan, rounding_points(prefill.program))
    )
    prefill.close()
    decoder.close()
    record("rel_err", finding.rel_err)
    record("tolerance_used", finding.tolerance_used)
    record("top1_agreement", finding.top1_agreement)
    assert finding.correct, finding.failures
    assert finding.tolerance_used <= 0.6


@pytest.mark.parametrize("batch", STRETCHES)
@pytest.mark.parametrize("name", ["toy-2L", "small"])
def test_built_in_models_are_correct(name: str, batch: int, record_property: Any) -> None:
    model = named(name)
    context = min(1024, model.spec.max_context)
    late = tuple(p for p in PLAN.late if p + PLAN.late_steps <= context)
    accept(model, batch, record_property, Plan(150, 156, late, PLAN.late_steps), context)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kv_heads", [8, 4, 2, 1], ids=["group1", "group2", "group4", "group8"])
def test_any_group_is_correct(kv_heads: int, dtype: str, record_property: Any) -> None:
    accept(llama("group", dtype, num_attention_heads=8, num_key_value_heads=kv_heads, head_dim=64), 32, record_property)


@pytest.mark.parametrize("batch", STRETCHES)
def test_odd_sizes_biases_head_norms_and_windows_are_correct(batch: int, record_property: Any) -> None:
    accept(
        llama("odd", hidden_size=432, num_attention_heads=6, num_key_value_heads=2, head_dim=24, intermediate_size=732, vocab_size=3203),
        batch,
        record_property,
    )
    accept(llama("biases", architecture="Qwen2ForCausalLM", head_dim=80), batch, record_property)
    accept(llama("head-norms", architecture="Qwen3ForCausalLM", head_dim=128), batch, record_property)
    accept(llama("window", architecture="MistralForCausalLM", head_dim=64, sliding_window=100), batch, record_property)


@pytest.mark.parametrize(
    "knobs",
    [
        {"threads_per_block": 128},
        {"kernel_knobs": {"stage_bytes": 32768}},
        {"kernel_knobs": {"sync": "tags"}},
        {"fusion_grouping": ["qkv", "gate_up"]},
        {"page_allocation": "linear"},
        {"kernel_knobs": {"weight_feed": "cp_async"}},
        {"kernel_knobs": {"weight_feed": "plain"}},
        {"pipelining_depth": 1},
    ],
    ids=["128-threads", "wide-stages", "no-hints", "norms-apart", "linear", "cp-async", "plain", "one-under-way"],
)
def test_configs_do_not_change_what_is_computed(knobs: dict[str, Any], record_property: Any) -> None:
    accept(llama("configs", head_dim=64), 32, record_property, config=knobs)


def test_many_small_products_are_correct_at_llama_1b_size(record_property: Any) -> None:
    accept(named("llama-3.2-1b-shape"), 128, record_property)


def test_4000_tokens_and_then_decoding(record_property: Any) -> None:
    accept(llama("long", head_dim=64), 128, record_property, Plan(4000, 4006, (), 0), 4096)


def test_late_actors_and_repetitions_change_no_row() -> None:
    """Waits that are late by chance (STRESS) find the same values: every order that the device takes is the program's."""
    model, tokens = llama("stress", head_dim=64), random.Random(0).choices(range(1000), k=333)
    rows = []
    for macros in ({}, {"STRESS": 1}, {"STRESS": 1}):
        prefill, decoder = pair(model, 64, macros=macros)
        for _ in range(3):
            prefill.prefill(tokens, 0)
            rows.append(decoder.read_kv(1, len(tokens)))
        prefill.close()
        decoder.close()
    for keys, values in rows[1:]:
        assert torch.equal(keys, rows[0][0]) and torch.equal(values, rows[0][1])


def test_seats_without_a_token_write_no_row() -> None:
    model = llama("padding", head_dim=64)
    prefill, decoder = pair(model, 32)
    spec = model.spec
    marked = torch.full((spec.kv_heads, decoder.context, spec.head_dim), 3.0)
    decoder.seed_kv(0, marked, marked)
    prefill.prefill([1, 2, 3], 40)
    prefill.prefill([4, 5], decoder.context - 2)
    keys, values = decoder.read_kv(0, decoder.context)
    touched = ((keys != 3).any(dim=(0, 2)) | (values != 3).any(dim=(0, 2))).nonzero().flatten().tolist()
    assert touched == [40, 41, 42, decoder.context - 2, decoder.context - 1]


HANGING = [Actor.FEEDER, Actor.CONSUMER, Actor.WATCHER, Actor.LAUNCH_END]


@pytest.mark.parametrize("actor", HANGING, ids=["feeder", "consumer", "watcher", "end"])
def test_a_wait_that_never_ends_is_reported(actor: Actor) -> None:
    """Of a stretch no task has the storer."""
    prefill, decoder = pair(llama("hang", head_dim=64), 32, macros={"HANG_ACTOR": int(actor)}, spin_limit=1 << 16)
    with pytest.raises(LaunchFailed, match="gave up"):
        prefill.prefill([1, 2, 3], 0)
    prefill.close()
    decoder.close()
