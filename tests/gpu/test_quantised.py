"""The CUDA machine with quantised weights against the source model with the same weights dequantised: every format, dtype and shape."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from amk.eval.oracle import Plan
from amk.isa.weight_format import FORMATS
from amk.models.model import Model, quantised_model
from amk.models.quantise import MOST_FP8, quantise
from amk.models.quantised_weights import ModelWeights, QuantisedWeights
from amk.tests.gpu.machines import llama, named, program
from amk.tests.gpu.test_correct import GUIDE, accept, judged

pytestmark = pytest.mark.cuda

GROUPED = [form for form in FORMATS if form.startswith("int4-g")]
PLAN = Plan(prompt=8, steps=40, late=(127, 1000), late_steps=4)


@pytest.mark.parametrize("form", FORMATS)
def test_quantising_gives_the_same_bits_on_card_and_cpu(form: str) -> None:
    weights = named("small").weights.tensor("L1.down")
    weights = torch.cat([weights * scale for scale in (1.0, 1e-3, 300.0)])
    found, expected = quantise(weights.cuda(), FORMATS[form]), quantise(weights, FORMATS[form])
    for part in ("codes", "scales", "zeros"):
        assert torch.equal(getattr(found, part).cpu(), getattr(expected, part)), part


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_correct(form: str, dtype: str, record_property: Any) -> None:
    accept(judged(quantised_model(llama("quantised", dtype, head_dim=64), FORMATS[form])), record_property)


class SmallHead:
    """Weights whose head is too small for fp8's normal numbers, but for its first column, on which no logit depends."""

    def __init__(self, weights: ModelWeights) -> None:
        self._weights = weights
        self.rope_table, self.digest = weights.rope_table, "small head"

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        tensor: torch.Tensor = self._weights.tensor(name, device).clone()
        if name == "head":
            tensor *= 7 * 2.0**-9 / MOST_FP8 / tensor.abs().max()
            tensor[:, 0] = 1.0
        if name == "final_norm":
            tensor[0] = 0.0
        return tensor

    def quantised(self, name: str, device: str = "cpu") -> Any:
        raise KeyError(name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fp8_codes_that_are_no_normal_numbers_count(dtype: str, record_property: Any) -> None:
    plain = llama("small-head", dtype, head_dim=64)
    model = quantised_model(replace(plain, weights=SmallHead(plain.weights)), FORMATS["fp8"])
    codes = model.weights.quantised("head").codes[:, 1:]
    assert int((codes & 127).max()) < 8 and float((codes & 127).float().mean()) > 0.5
    accept(judged(model), record_property)


@pytest.mark.parametrize("form", ["int8-g32", "int4-g64-asym", "fp8"])
def test_scales_in_the_other_dtype_are_correct(form: str, record_property: Any) -> None:
    model = quantised_model(llama("other-scales", head_dim=64), FORMATS[form])
    weights = replace(FORMATS[form], scale="fp16")
    spec = replace(model.spec, layer_weights=weights, head_weights=weights)
    source = llama("other-scales", head_dim=64).weights
    accept(judged(replace(model, spec=spec, weights=QuantisedWeights(source, spec))), record_property)


@pytest.mark.parametrize(
    "config",
    [
        GUIDE,
        {"threads_per_block": 128},
        {"kernel_knobs": {"stage_bytes": 32768}},
        {"kernel_knobs": {"stage_bytes": 8192}, "threads_per_block": 128},
        {"fusion_grouping": ["norm"]},
    ],
    ids=["guide", "128-threads", "wide-stages", "narrow-stages", "norm-only"],
)
@pytest.mark.parametrize("form", ["int8", "int4-g128", "int4-g32-asym", "fp8", "fp8-g128"])
def test_configs_do_not_change_what_is_computed(form: str, config: dict[str, Any], record_property: Any) -> None:
    accept(judged(named(f"small@{form}"), config), record_property)


def rows_program(form: str, dtype: str, config: dict[str, Any]) -> tuple[Model, dict[str, Any]]:
    """A model with 92 tiles of gate and up, and the config by which SMs have 4, 12, 36 and 40 of them: one round, two, and more."""
    model = quantised_model(llama("rows", dtype, hidden_size=1024, head_dim=64, intermediate_size=8 * 92), FORMATS[form])
    shares = [0] * 4 + [1] * 12 + [2] * 40 + [3] * 36
    whole = {"sm_assignment": {"gate_up": shares}} | config
    assert program(model, whole).by_rows
    return model, whole


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", GROUPED)
def test_tiles_that_warps_share_out_whole_are_correct(form: str, dtype: str, record_property: Any) -> None:
    model, config = rows_program(form, dtype, {})
    assert program(model, config).machine.stages >= 8
    accept(judged(model, config), record_property)


@pytest.mark.parametrize("form", GROUPED)
def test_tiles_that_warps_share_out_are_correct_where_the_ring_has_fewer_stages_than_there_are_warps(
    form: str, record_property: Any
) -> None:
    stage = {"kernel_knobs": {"stage_bytes": 16384}}
    ring = 4 * program(*rows_program(form, "bfloat16", stage)).machine.stage_bytes
    model, config = rows_program(form, "bfloat16", stage | {"smem_bytes_per_block": ring})
    assert program(model, config).machine.stages == 4
    accept(judged(model, config), record_property)


@pytest.mark.parametrize("head", [None, "int8-asym"])
def test_tiles_that_warps_share_out_are_correct_beside_a_head_of_another_format(head: str | None, record_property: Any) -> None:
    model, config = rows_program("int4-g64-asym", "bfloat16", {})
    spec = replace(model.spec, head_weights=FORMATS[head] if head else None)
    source = llama("rows", hidden_size=1024, head_dim=64, intermediate_size=8 * 92)
    mixed = Model(spec, QuantisedWeights(source.weights, spec), source.config, None)
    assert program(mixed, config).by_rows
    accept(judged(mixed, config), record_property)


@pytest.mark.parametrize("feed", ["cp_async", "plain"])
@pytest.mark.parametrize("form", ["int4-g128", "int4-g32-asym"])
def test_tiles_that_warps_share_out_are_correct_with_every_feed(form: str, feed: str, record_property: Any) -> None:
    accept(judged(*rows_program(form, "bfloat16", {"kernel_knobs": {"weight_feed": feed}})), record_property)


@pytest.mark.parametrize("form", ["int8", "int4-g128", "int4-g64-asym", "fp8"])
def test_a_head_in_16_bits_beside_quantised_layers_is_correct(form: str, record_property: Any) -> None:
    plain = named("small")
    spec = replace(quantised_model(plain, FORMATS[form]).spec, head_weights=None)
    accept(judged(Model(spec, QuantisedWeights(plain.weights, spec), plain.config, None)), record_property)


@pytest.mark.parametrize("form", ["int8", "int8-g128", "int4-g128", "int4-g32-asym", "fp8", "fp8-g128"])
def test_one_billion_quantised_parameters_are_correct_at_early_and_late_positions(form: str, record_property: Any) -> None:
    plan = Plan(prompt=8, steps=24, late=(127, 1023, 8000), late_steps=4)
    accept(judged(named(f"llama-3.2-1b-shape@{form}"), plan=plan, context=8192), record_property)
