"""Programs with quantised weights on the reference machine: near exact against the same weights dequantised, in every order of steps."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from amk.isa.weight_format import FORMATS
from amk.models.quantised_weights import QuantisedWeights, with_weights
from amk.vm.reference import ReferenceVM
from amk.vm.scheduler import ORDERS, Order, adversarial
from amk.vm.source import kernel_source

BF16_ERROR = 0.025  # as in test_reference: activations are rounded, weights are not
TOKENS = random.Random(1).choices(range(101), k=40)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("name", FORMATS)
def test_logits_are_the_plain_decoders_of_the_dequantised_weights(
    name: str, dtype: str, make_spec: Any, make_proven: Any, make_source: Any, plain: Any
) -> None:
    spec = with_weights(make_spec(dtype, qkv_bias=True, intermediate=92), FORMATS[name])
    unquantised = make_source(spec)
    source = QuantisedWeights(unquantised, spec)
    found = ReferenceVM(make_proven(spec, kv_block=16), source).decode(TOKENS, 0, logits=True).logits
    limit = BF16_ERROR if dtype == "bf16" else BF16_ERROR / 6
    assert error(found, plain(spec, source, TOKENS).logits) < limit
    # int4 moves the logits much further than that: the machine does not fall back on the weights as they were.
    assert FORMATS[name].bits == 8 or error(found, plain(spec, unquantised, TOKENS).logits) > 2 * BF16_ERROR


@pytest.mark.parametrize(
    ("name", "has", "lacks"), [("int8", "multiply_bytes", "multiply_codes"), ("fp8-g128", "multiply_codes", "multiply_bytes")]
)
def test_a_kernel_has_the_code_of_its_own_kind_of_weights(name: str, has: str, lacks: str, make_spec: Any, make_program: Any) -> None:
    source = kernel_source(make_program(with_weights(make_spec("bf16"), FORMATS[name])))
    assert f"{has}(" in source and f"{lacks}(" not in source


def test_a_head_in_16_bits_beside_quantised_layers(make_spec: Any, make_proven: Any, make_source: Any, plain: Any) -> None:
    spec = replace(with_weights(make_spec("bf16"), FORMATS["int4-g32"]), head_weights=None)
    source = QuantisedWeights(make_source(spec), spec)
    program = make_proven(spec)
    assert [m.weights for m in program.program.matrices if m.name == "head"] == [None]
    assert error(ReferenceVM(program, source).decode(TOKENS, 0, logits=True).logits, plain(spec, source, TOKENS).logits) < BF16_ERROR


@pytest.mark.parametrize("fusion", [(), ("norm",), ("gate_up",)])
def test_logits_do_not_depend_on_what_is_fused(
    fusion: tuple[str, ...], make_spec: Any, make_proven: Any, make_source: Any, plain: Any
) -> None:
    spec = with_weights(make_spec("bf16"), FORMATS["int8-g64-asym"])
    source = QuantisedWeights(make_source(spec), spec)
    found = ReferenceVM(make_proven(spec, fusion=fusion), source).decode(TOKENS, 0, logits=True).logits
    assert error(found, plain(spec, source, TOKENS).logits) < BF16_ERROR


@pytest.mark.parametrize("name", ["int8-g128", "int4-g32-asym", "int4", "fp8"])
def test_every_order_gives_the_same_bits(name: str, make_spec: Any, make_proven: Any, make_source: Any) -> None:
    spec = with_weights(make_spec("bf16", layers=1), FORMATS[name])
    source = QuantisedWeights(make_source(spec), spec)
    program = make_proven(spec, sms=2, threads_per_block=128)
    orders: list[Order] = [Order("sequential"), *(adversarial(seed) for seed in range(1, len(ORDERS) + 1))]
    first, *others = (ReferenceVM(program, source, order=order).decode([5, 6], 0, steps=4, logits=True).logits for order in orders)
    assert all(torch.equal(first, other) for other in others)
