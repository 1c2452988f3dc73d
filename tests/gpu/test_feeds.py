"""The three weight feeds on the live card: each correct, none changing a bit, each ending by itself when it hangs; and Turing's way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from amk.eval.oracle import default_plan, judge, make_reference, rounding_points
from amk.isa.weight_format import FORMATS
from amk.models.model import Model, quantised_model
from amk.schedule.targets import TARGETS
from amk.tests.gpu.machines import card, llama, machine, named, program, proven
from amk.tests.gpu.test_batch import batch_machine
from amk.tests.gpu.test_correct import PLAN, accept, judged
from amk.tests.gpu.test_robust import ACTORS, TOKENS, outputs
from amk.vm.cuda import CudaVM
from amk.vm.interface import LaunchFailed

pytestmark = pytest.mark.cuda
FEEDS = ("bulk", "cp_async", "plain")
TURING = {"TURING": 1}


def by(feed: str, **changes: Any) -> dict[str, Any]:
    """The default config with a feed; `changes` are keys of the config, those of `kernel_knobs` joined."""
    return changes | {"kernel_knobs": {"weight_feed": feed} | changes.get("kernel_knobs", {})}


def model(kind: str) -> Model:
    if kind.startswith("quantised"):
        return quantised_model(llama(kind, "float16", head_dim=64), FORMATS[kind.removeprefix("quantised ")])
    dtypes = {"fp16": "float16", "fp32": "float32"}
    return llama(kind, dtypes[kind], num_attention_heads=8, num_key_value_heads=2, head_dim=64) if kind in dtypes else named(kind)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("name", ["toy", "small"])
def test_built_in_models_are_correct(name: str, feed: str, record_property: Any) -> None:
    chosen = named(name)
    context = min(1024, chosen.spec.max_context)
    accept(judged(chosen, by(feed), default_plan(chosen.spec, context, "cuda"), context), record_property)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("kind", ["fp16", "fp32", "quantised int8", "quantised int4-g32-asym", "quantised fp8"])
def test_every_element_type_is_correct_at_late_positions(kind: str, feed: str, record_property: Any) -> None:
    accept(judged(model(kind), by(feed)), record_property)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"threads_per_block": 128},
        {"smem_bytes_per_block": 16384, "kernel_knobs": {"stage_bytes": 16384}},
        {"smem_bytes_per_block": 32768, "kernel_knobs": {"stage_bytes": 8192}},
        {"pipelining_depth": 12, "kernel_knobs": {"stage_bytes": 8192, "cache_hint": "none"}},
        {"fusion_grouping": [], "kernel_knobs": {"reduction_slots": 8, "sync": "tags"}},
        {"kernel_knobs": {"throttled_depth": 1, "high_watermark": 1}},
        {
            "smem_bytes_per_block": 32768,
            "pipelining_depth": 4,
            "kernel_knobs": {"stage_bytes": 8192, "throttled_depth": 2, "high_watermark": 3},
        },
    ],
    ids=[
        "default",
        "128-threads",
        "one-stage",
        "four-stages",
        "deep",
        "unfused-without-hints",
        "throttled-at-once",
        "throttled-at-the-last",
    ],
)
@pytest.mark.parametrize("kind", ["small", "fp32"])
def test_a_feed_changes_no_bit(kind: str, config: dict[str, Any]) -> None:
    """160 tokens a launch: the ring turns over many times, and rows are streamed that the launch itself has written."""
    chosen = model(kind)
    expected = outputs(machine(chosen, by("bulk", **config)), 160)
    for feed in FEEDS[1:]:
        assert torch.equal(outputs(machine(chosen, by(feed, **config)), 160), expected), feed


@pytest.mark.parametrize("feed", FEEDS[1:])
def test_a_feed_changes_no_bit_of_a_large_model(feed: str) -> None:
    chosen = named("llama-3.2-1b-shape")
    assert torch.equal(outputs(machine(chosen, by(feed)), 24), outputs(machine(chosen, by("bulk")), 24))


@pytest.mark.parametrize("macros", [{}, {"STRESS": 1}], ids=["", "stressed"])
@pytest.mark.parametrize("batch", [8, 16])
def test_a_feed_changes_no_bit_of_a_batch(batch: int, macros: dict[str, int]) -> None:
    rows = [[row + 1, 2 * row + 5] for row in range(batch)]
    answers = []
    for feed in FEEDS:
        vm = batch_machine(named("small"), batch, by(feed), macros=macros)
        answers.append(vm.decode_batch(rows, [0] * batch, steps=60, logits=True).logits)
        vm.close()
    assert torch.equal(answers[1], answers[0]) and torch.equal(answers[2], answers[0])


@pytest.mark.parametrize("actor", ACTORS)
@pytest.mark.parametrize("feed", FEEDS[1:])
def test_a_hang_ends_by_itself_and_the_next_launch_works(feed: str, actor: str) -> None:
    stuck = machine(model("fp16"), by(feed), macros={"HANG_ACTOR": ACTORS[actor]}, spin_limit=1 << 16)
    with pytest.raises(LaunchFailed) as failure:
        stuck.decode(TOKENS, 0, steps=40)
    assert failure.value.kind == "timeout"
    assert torch.isfinite(outputs(machine(model("fp16"), by(feed)))).all()


@pytest.mark.parametrize("feed", FEEDS[1:])
def test_a_machine_works_again_after_a_hang_of_its_own(feed: str) -> None:
    vm = machine(model("fp16"), by(feed), spin_limit=1 << 16)
    expected = outputs(vm)
    vm.counters.fill_(-(2**30))  # every hint far in the past: watchers wait in vain, feeders for the end of tokens
    with pytest.raises(LaunchFailed) as failure:
        outputs(vm)
    assert failure.value.kind == "timeout"
    assert torch.equal(outputs(vm), expected)


@pytest.mark.parametrize("sync", ["counter", "tags"])
@pytest.mark.parametrize("feed", FEEDS[1:])
@pytest.mark.parametrize("kind", ["toy", "small", "quantised int4-g32-asym"])
def test_delaying_random_actors_never_changes_a_bit(kind: str, feed: str, sync: str) -> None:
    config = by(feed, smem_bytes_per_block=49152, kernel_knobs={"sync": sync})
    expected = outputs(machine(model(kind), config))
    stressed = machine(model(kind), config, macros={"STRESS": 1})
    assert all(torch.equal(outputs(stressed), expected) for _ in range(10))


@pytest.mark.parametrize("feed", FEEDS)
def test_a_build_without_memory_traffic_ends(feed: str) -> None:
    machine(model("fp16"), by(feed), macros={"DRY_FEED": 1}).decode(TOKENS, 0, steps=64)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("kind", ["small", "fp16", "fp32", "quantised int4-g32-asym", "quantised fp8"])
def test_products_of_eight_columns_are_correct(kind: str, feed: str, record_property: Any) -> None:
    """Turing's products and conversions; only with plain loads and without bf16 is this what a T4 runs."""
    accept(judged(model(kind), by(feed), macros=TURING), record_property)


@pytest.mark.parametrize("kind", ["fp16", "fp32", "small@fp16", "quantised int8"])
def test_the_program_of_a_t4_is_correct(kind: str, record_property: Any) -> None:
    """40 SMs, 64 KiB of shared memory, stages of 8 KiB, plain loads and Turing's products."""
    chosen = model(kind)
    target = replace(TARGETS["t4"], arch=card().arch)
    made = program(chosen, by("plain"), target=target)
    assert made.machine.sms == 40 and made.machine.stage_bytes < 16384
    vm = CudaVM(proven(made), chosen.weights, arch=card().arch, macros=TURING)
    accept(judge(vm, make_reference(chosen.spec, chosen.eager("fp32", "cuda"), PLAN, rounding_points(made))), record_property)
    vm.close()


@pytest.mark.parametrize("name", ["a100", "a10g", "l4"])
def test_the_program_of_an_older_card_is_correct(name: str, record_property: Any) -> None:
    """Its SMs, shared memory and cp.async, in one binary with this card's instructions."""
    chosen = named("small")
    made = program(chosen, by("cp_async"), target=replace(TARGETS[name], arch=card().arch))
    assert made.machine.sms == TARGETS[name].sms
    vm = CudaVM(proven(made), chosen.weights, arch=card().arch)
    accept(judge(vm, make_reference(chosen.spec, chosen.eager("fp32", "cuda"), PLAN, rounding_points(made))), record_property)
    vm.close()
