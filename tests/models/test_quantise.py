"""AMK's own quantiser, and NAME@FORMAT: every code is the nearest, every value exact, every mistake one sentence."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amk.isa.weight_format import FORMATS, FP8, FP8_GROUPS, WeightFormat, format_of, known_formats
from amk.models.errors import UnknownModel, Unsupported
from amk.models.quantise import dequantise, quantise
from amk.models.registry import describe, resolve
from amk.schedule.model import QuantisedMatrix, weight_format, weight_shapes

formats = st.sampled_from(sorted(known_formats(), key=lambda f: (f.name, f.scale)))


def matrix(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)


def scales_by_column(q: QuantisedMatrix) -> torch.Tensor:
    group = q.weights.group or q.codes.shape[1]
    return q.scales.float().repeat_interleave(group, 1)[:, : q.codes.shape[1]]


@given(formats, st.integers(1, 40), st.integers(1, 300), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_each_code_is_the_nearest_to_its_weight(form: WeightFormat, rows: int, columns: int, seed: int) -> None:
    weight = matrix(rows, columns, seed)
    q = quantise(weight, form)
    assert (q.codes.shape, q.scales.shape, q.zeros.shape) == ((rows, columns), (rows, form.groups(columns)), (rows, form.groups(columns)))
    assert int(q.codes.max()) < 1 << form.bits and (form.asymmetric or bool((q.zeros == form.zero).all()))
    values, weight = dequantise(q), weight.float()
    for step in (-1, 1):
        codes = q.codes.int() + step
        allowed = (codes >= (form.bits == 8)) & (codes < 1 << form.bits)
        other = dequantise(replace(q, codes=codes.clamp(0, 255).to(torch.uint8)))
        closer = (other - weight).abs() < (values - weight).abs() * (1 - 1e-6)
        assert not bool((closer & allowed).any())


def number(code: int) -> float:
    """What a code of E4M3 is, by its definition: a sign, an exponent with a bias of 7, three bits behind the point."""
    exponent, mantissa = code >> 3 & 15, code & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if code & 128 else size


def test_codes_of_fp8_are_the_numbers_of_their_bits() -> None:
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)[None]  # the others are no numbers
    for scale in (1.0, 0.0078125, 3.0):
        q = QuantisedMatrix(FP8, codes, torch.tensor([[scale]]).bfloat16(), torch.zeros(1, 1, dtype=torch.uint8))
        assert dequantise(q)[0].tolist() == [scale * number(int(code)) for code in codes[0]]


@given(st.sampled_from([FP8, FP8_GROUPS]), st.integers(0, 5), st.sampled_from(["bf16", "fp16"]))
@settings(max_examples=20, deadline=None)
def test_fp8_spans_a_row_or_group_and_takes_the_nearest_numbers(form: WeightFormat, seed: int, scale: Any) -> None:
    weight = matrix(8, 200, seed)
    q = quantise(weight, replace(form, scale=scale))
    sizes = q.codes & 127
    assert not bool((sizes == 127).any()) and all(bool((part.amax(1) >= 0x7D).all()) for part in sizes.split(form.group or 200, 1))
    relative = (dequantise(q) - weight.float()).abs() / torch.maximum(weight.float().abs(), scales_by_column(q) * 2.0**-6)
    assert float(relative.max()) <= 2.0**-4


@given(formats.filter(lambda form: not form.floating), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_dequantised_values_are_exact(form: WeightFormat, seed: int) -> None:
    q = quantise(matrix(8, 200, seed), form)
    group = form.group or 200
    zeros = q.zeros.double().repeat_interleave(group, 1)[:, :200]
    assert torch.equal(dequantise(q).double(), (q.codes.double() - zeros) * scales_by_column(q).double())


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.floating])
def test_errors_are_within_half_a_step_unless_clipped(name: str) -> None:
    form, weight = FORMATS[name], matrix(32, 256, 3)
    q = quantise(weight, form)
    error = (dequantise(q) - weight.float()).abs()
    inside = (q.codes > (form.bits == 8)) & (q.codes < (1 << form.bits) - 1)
    assert bool((error <= 0.5001 * scales_by_column(q).abs())[inside].all())


def test_finer_formats_are_closer() -> None:
    weight = matrix(64, 512, 0)
    error = {name: float((dequantise(quantise(weight, form)) - weight.float()).norm()) for name, form in FORMATS.items()}
    for bits in (4, 8):
        by_group = [error[f"int{bits}{group}"] for group in ("-g32", "-g64", "-g128", "")]
        assert by_group == sorted(by_group)
        assert error[f"int{bits}-g64-asym"] < error[f"int{bits}-g64"]
    assert error["int8"] < error["int4-g32-asym"] / 5
    assert error["int8"] < error["fp8-g128"] < error["fp8"] < error["int4-g32-asym"] / 2


def test_clipping_beats_spanning_the_range_for_4_bits() -> None:
    weight = matrix(64, 512, 1)
    form = FORMATS["int4"]
    scales = (weight.float().abs().amax(1, keepdim=True) / 7).bfloat16()
    codes = (weight.float() / scales.float()).round().clamp(-8, 7) + 8
    plain = QuantisedMatrix(form, codes.to(torch.uint8), scales, torch.full_like(scales, 8).to(torch.uint8))
    clipped = quantise(weight, form)
    assert float((dequantise(clipped) - weight.float()).norm()) < 0.97 * float((dequantise(plain) - weight.float()).norm())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-30, -0.25, 65000.0])
def test_constant_matrices_are_finite(name: str, value: float) -> None:
    values = dequantise(quantise(torch.full((16, 96), value).bfloat16(), FORMATS[name]))
    assert bool(values.isfinite().all()) and torch.allclose(values, torch.full((16, 96), value).bfloat16().float(), rtol=0.15)


@pytest.mark.parametrize("scale", ["bf16", "fp16"])
@pytest.mark.parametrize("name", FORMATS)
def test_flags_and_names_say_the_whole_format(name: str, scale: Any) -> None:
    form = replace(FORMATS[name], scale=scale)
    assert format_of(form.flags | 3) == form and form.name == name
    assert len({f.flags for f in known_formats()}) == len(known_formats()) == 2 * len(FORMATS)


@pytest.mark.parametrize("flags", [4 | 8 | 64, 4 | 8 | 128, 16, 32, 64, 4 | 8 | 16])
def test_flags_that_name_no_format_are_refused(flags: int) -> None:
    with pytest.raises(ValueError, match="weight format"):
        format_of(flags)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int8", 8 + 16 / 128), ("fp8", 8 + 16 / 128), ("int4-g32", 4.5), ("int4-g64-asym", 4 + 20 / 64), ("int8-g128-asym", 8.1875)],
)
def test_matrix_bytes_count_codes_scales_and_zeros(name: str, bits: float) -> None:
    assert FORMATS[name].matrix_bytes(64, 128) == 64 * 128 * bits / 8


def test_a_quantised_model_keeps_its_embedding_and_quantises_everything_else_that_is_a_matrix() -> None:
    plain, model = resolve("toy-2L"), resolve("toy-2L@int4-g32-asym")
    assert model.spec == describe("toy-2L@int4-g32-asym") and model.spec.name == "toy-2L@int4-g32-asym"
    assert model.spec.tied_head and model.spec.layer_weights == model.spec.head_weights == FORMATS["int4-g32-asym"]
    for name, shape in weight_shapes(model.spec).items():
        weight = model.weights.tensor(name)
        if len(shape) == 2 and name != "embed":
            assert weight_format(model.spec, name) and torch.equal(weight, dequantise(model.weights.quantised(name)))
        else:
            assert weight_format(model.spec, name) is None and torch.equal(weight, plain.weights.tensor(name))
            with pytest.raises(KeyError):
                model.weights.quantised(name)
    assert len({model.digest, plain.digest, resolve("toy-2L@int4-g32").digest}) == 3


def test_the_source_model_has_the_dequantised_weights_and_a_head_of_its_own() -> None:
    model = resolve("toy-2L@int4-g32")
    eager = model.eager()
    assert torch.equal(eager.lm_head.weight, model.weights.tensor("head"))
    assert torch.equal(eager.model.embed_tokens.weight, model.weights.tensor("embed").float())
    assert torch.equal(eager.model.layers[1].mlp.down_proj.weight, model.weights.tensor("L1.down"))
    assert not torch.equal(eager.lm_head.weight, eager.model.embed_tokens.weight)


@pytest.mark.parametrize("name", ["toy-2L@", "toy-2L@int3", "toy-2L@int4-g16", "toy-2L@int4-asym-g32", "@nf4", "toy-2L@INT8"])
def test_an_unknown_format_is_a_usage_error_that_lists_what_there_is(name: str) -> None:
    for call in (resolve, describe):
        with pytest.raises(UnknownModel, match="int4-g128-asym") as caught:
            call(name)
        assert caught.value.exit_code == 2


def test_what_cannot_be_quantised_is_named() -> None:
    for name, word in (("toy@int8", "fp32"), ("toy-2L@int8@int4", "already")):
        for call in (resolve, describe):
            with pytest.raises(Unsupported, match=word):
                call(name)
