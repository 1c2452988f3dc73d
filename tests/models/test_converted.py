"""NAME@DTYPE: the same model with its weights rounded to another dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from amk.models.checkpoint import read_checkpoint
from amk.models.converted_weights import ConvertedWeights
from amk.models.errors import Unsupported
from amk.models.model import checkpoint_model, converted_model
from amk.models.registry import describe, resolve
from amk.schedule.compile import compile_program
from amk.schedule.knobs import Config
from amk.schedule.model import DType, weight_shapes
from amk.schedule.program import Program
from amk.schedule.targets import TARGETS

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.mark.parametrize(("name", "dtype"), [("toy-2L", "fp16"), ("toy-2L", "fp32"), ("toy", "bf16")])
def test_every_weight_and_the_source_models_are_rounded_once(name: str, dtype: DType) -> None:
    model, converted = resolve(name), resolve(f"{name}@{dtype}")
    assert converted.spec == describe(f"{name}@{dtype}") == replace(model.spec, name=f"{name}@{dtype}", dtype=dtype)
    for weight in weight_shapes(model.spec):
        assert torch.equal(converted.weights.tensor(weight), model.weights.tensor(weight).to(TORCH[dtype])), weight
    embedding = converted.eager("fp32").model.embed_tokens.weight
    assert torch.equal(embedding, model.weights.tensor("embed").to(TORCH[dtype]).float())
    assert converted.digest != model.digest


def test_a_converted_checkpoints_source_model_has_the_rounded_weights(tmp_path: object) -> None:
    source = resolve("toy")
    source.eager("fp32").save_pretrained(tmp_path)
    model = checkpoint_model(read_checkpoint(tmp_path, "saved"))  # type: ignore[arg-type]
    embedding = converted_model(model, "fp16").eager("fp32").model.embed_tokens.weight
    assert torch.equal(embedding, source.weights.tensor("embed").half().float())
    assert not torch.equal(embedding, source.weights.tensor("embed"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("toy-2L@bf16", "weights are bf16 already: leave out @bf16"),
        ("toy-2L@int8@fp16", "weights are quantised already: convert before, as in NAME@fp16@int8"),
    ],
)
def test_what_cannot_be_converted_is_unsupported_with_its_remedy(name: str, reason: str) -> None:
    for refuse in (describe, resolve):
        with pytest.raises(Unsupported, match=reason):
            refuse(name)


def test_a_value_beyond_the_dtype_is_refused_by_name() -> None:
    model = resolve("toy-2L")

    class Huge:
        digest = "huge"
        quantised = rope_table = None

        def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
            return model.weights.tensor(name, device) * (1e6 if name == "L1.down" else 1)

    weights = ConvertedWeights(Huge(), replace(model.spec, dtype="fp16"))  # type: ignore[arg-type]
    weights.tensor("L0.down")
    with pytest.raises(Unsupported, match="weight L1.down has values that fp16 cannot hold"):
        weights.tensor("L1.down")


def test_a_card_without_bf16_names_the_conversion_and_takes_it() -> None:
    refused = compile_program(describe("toy-2L"), Config(), TARGETS["t4"])
    assert isinstance(refused, list) and "MODEL@fp16" in refused[0].text
    for name in ("toy-2L@fp16", "toy-2L@fp32", "toy-2L@fp16@int8"):
        assert isinstance(compile_program(describe(name), Config(), TARGETS["t4"]), Program), name
