"""The reference machine, task by task, against a plain decoder."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from amk.isa.matvec import MatVec
from amk.vm.interface import LaunchFailed
from amk.vm.reference import ReferenceVM, UnprovenVM
from amk.vm.scheduler import Order

FP32_ERROR = 3e-6  # relative: rounding of fp32 sums
BF16_ERROR = 0.025  # relative: activations rounded to 8 bits a few times a layer, and attention scores of a standard deviation of 4

SHAPES: dict[str, dict[str, Any]] = {
    "one query head a KV head, head_dim 8": {"heads": 4, "kv_heads": 4, "head_dim": 8},
    "groups of 3, head_dim 80, biases of q, k and v": {"heads": 6, "kv_heads": 2, "head_dim": 80, "qkv_bias": True},
    "groups of 4, head_dim 96, head norms, short window": {
        "heads": 8, "kv_heads": 2, "head_dim": 96, "qk_norm": True, "windows": (20, None),
    },
    "groups of 8, head_dim 128, other biases, long window": {
        "heads": 8, "kv_heads": 1, "head_dim": 128, "o_bias": True, "mlp_bias": True, "windows": (50, 33),
    },
    "odd sizes": {"hidden": 80, "intermediate": 92, "vocab": 77, "tied_head": False},
}  # fmt: skip


def prompt(spec: Any, count: int) -> list[int]:
    return random.Random(1).choices(range(spec.vocab), k=count)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative norm of the difference."""
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_the_plain_decoders(shape: str, dtype: str, make_spec: Any, make_proven: Any, make_source: Any, plain: Any) -> None:
    spec = make_spec(dtype, **SHAPES[shape])
    source, tokens = make_source(spec), prompt(spec, 84)
    vm = ReferenceVM(make_proven(spec, kv_block=16, kv_splits=2), source)
    decoded = vm.decode(tokens, 0, logits=True)
    assert error(decoded.logits, plain(spec, source, tokens).logits) < (FP32_ERROR if dtype == "fp32" else BF16_ERROR)


def test_fp16_logits_are_closer_than_bf16_ones(make_spec: Any, make_proven: Any, make_source: Any, plain: Any) -> None:
    spec = make_spec("fp16")
    source, tokens = make_source(spec), prompt(spec, 40)
    decoded = ReferenceVM(make_proven(spec), source).decode(tokens, 0, logits=True)
    assert error(decoded.logits, plain(spec, source, tokens).logits) < BF16_ERROR / 6


@pytest.mark.parametrize("fusion", [(), ("norm",), ("qkv",), ("gate_up",)])
def test_logits_do_not_depend_on_what_is_fused(
    fusion: tuple[str, ...], make_spec: Any, make_proven: Any, make_source: Any, plain: Any
) -> None:
    spec = make_spec(qkv_bias=True, mlp_bias=True)
    source, tokens = make_source(spec), prompt(spec, 40)
    decoded = ReferenceVM(make_proven(spec, fusion=fusion), source).decode(tokens, 0, logits=True)
    assert error(decoded.logits, plain(spec, source, tokens).logits) < FP32_ERROR


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_any_number_of_splits_continues_seeded_rows(splits: int, make_spec: Any, make_proven: Any, make_source: Any, plain: Any) -> None:
    spec = make_spec(windows=(None, 100))
    source, tokens = make_source(spec), prompt(spec, 220)
    expected = plain(spec, source, tokens)
    vm = ReferenceVM(make_proven(spec, kv_block=16, kv_splits=splits), source)
    for layer in range(spec.layers):
        vm.seed_kv(layer, expected.keys[layer][:, :200], expected.values[layer][:, :200])
    decoded = vm.decode(tokens[200:], 200, logits=True)
    assert error(decoded.logits, expected.logits[200:]) < FP32_ERROR


def test_machine_goes_on_with_its_own_choices(make_spec: Any, make_proven: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    program, source = make_proven(spec), make_source(spec)
    free = ReferenceVM(program, source).decode([3, 4], 0, steps=30, logits=True)
    forced = ReferenceVM(program, source).decode([3, 4, *free.tokens[1:-1]], 0, logits=True)
    assert free.tokens == forced.tokens == tuple(free.logits.argmax(1).tolist())
    assert torch.equal(free.logits, forced.logits)


def test_launches_continue_each_other_bit_for_bit(make_spec: Any, make_proven: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    program, source, tokens = make_proven(spec), make_source(spec), prompt(spec, 50)
    whole = ReferenceVM(program, source).decode(tokens, 0, logits=True)
    vm = ReferenceVM(program, source)
    parts = [vm.decode(tokens[a:b], a, logits=True).logits for a, b in ((0, 1), (1, 30), (30, 50))]
    assert torch.equal(whole.logits, torch.cat(parts))


@pytest.mark.parametrize("before", [1, 2, 5, 6, 7, 40])
def test_tags_wrap_between_launches_and_change_nothing(before: int, make_spec: Any, make_proven: Any, make_source: Any) -> None:
    spec = make_spec("bf16")
    program, source, tokens = make_proven(spec), make_source(spec), prompt(spec, 12)
    last_epoch = (2**32 - 1) // program.program.machine.tags
    fresh, late = ReferenceVM(program, source), ReferenceVM(program, source, first_epoch=last_epoch - before)
    for at in (0, 6):
        expected = fresh.decode(tokens[at : at + 6], at, logits=True)
        assert torch.equal(late.decode(tokens[at : at + 6], at, logits=True).logits, expected.logits)


def test_a_tag_that_nobody_publishes_is_a_timeout_and_the_machine_goes_on(make_spec: Any, make_program: Any, make_source: Any) -> None:
    spec = make_spec()
    program, source = make_program(spec), make_source(spec)
    queues = [list(queue) for queue in program.queues]
    sm, index, task = next((s, i, t) for s, q in enumerate(queues) for i, t in enumerate(q) if isinstance(t, MatVec))
    queues[sm][index] = replace(task, x_tag=program.machine.tags - 1)
    vm = UnprovenVM(replace(program, queues=tuple(map(tuple, queues))), source)
    for _ in range(2):
        with pytest.raises(LaunchFailed, match="nobody publishes") as failure:
            vm.decode([1], 0)
        assert failure.value.kind == "timeout"


def test_unreasonable_launches_are_refused_in_one_sentence(make_spec: Any, make_proven: Any, make_source: Any) -> None:
    spec = make_spec()
    vm = ReferenceVM(make_proven(spec), make_source(spec))
    rows = torch.zeros(spec.kv_heads, 10, spec.head_dim)
    assert vm.decode([0] * 2, vm.context - 2).tokens  # the last legal position
    for refused, message in (
        (lambda: vm.decode([0] * 2, vm.context - 1), "position: steps must lie within"),
        (lambda: vm.decode([0], -1), "position: steps must lie within"),
        (lambda: vm.decode([], 0), "at least one token"),
        (lambda: vm.decode([1, 2], 0, steps=1), "at least the number of tokens"),
        (lambda: vm.decode([spec.vocab], 0), f"from 0 to {spec.vocab - 1}, but got {spec.vocab}"),
        (lambda: vm.seed_kv(spec.layers, rows, rows), "layer: must be from 0 to 1, but got 2"),
        (lambda: vm.seed_kv(0, rows[:1], rows), r"keys: must be \[2, at most 256, 16\], but got \[1, 10, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize("order", [None, Order()])
def test_a_machine_works_again_after_who_hears_of_tokens_raised(order: Any, make_spec: Any, make_proven: Any, make_source: Any) -> None:
    spec = make_spec()
    program, source = make_proven(spec), make_source(spec)
    told: list[int] = []

    def hear(step: int, token: int) -> None:
        told.append(step)
        if step == 1:
            raise KeyboardInterrupt

    vm, other = (ReferenceVM(program, source, order=order) for _ in range(2))
    with pytest.raises(KeyboardInterrupt):
        vm.decode([1, 2, 3], 0, steps=6, on_token=hear)
    assert told == [0, 1]
    assert vm.decode([1, 2, 3], 0, steps=6).tokens == other.decode([1, 2, 3], 0, steps=6).tokens
