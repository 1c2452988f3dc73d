"""Each family: what the importer says of a checkpoint is what its transformers class computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, silu

from amk.models.model import Model
from amk.models.names import checkpoint_name
from amk.models.registry import describe, resolve
from amk.schedule.model import weight_shapes

Folder = Callable[[str], Path]


def test_weights_are_the_bits_of_the_loaded_transformers_model(family: str, tiny_folder: Folder) -> None:
    model = resolve(str(tiny_folder(family)))
    loaded = model.eager(dtype="bf16").state_dict()
    for name, shape in weight_shapes(model.spec).items():
        tensor = model.weights.tensor(name)
        assert tuple(tensor.shape) == shape and tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, loaded[checkpoint_name(name)]), name
    assert {checkpoint_name(name) for name in weight_shapes(model.spec)} == set(loaded)


def test_rope_table_is_bit_equal_to_the_loaded_model_past_the_original_length(family: str, tiny_folder: Folder) -> None:
    model = resolve(str(tiny_folder(family)))
    rows = model.spec.max_context
    cos, sin = model.eager().model.rotary_emb(torch.zeros(1), torch.arange(rows)[None])
    table = model.weights.rope_table(rows)
    assert table.dtype == torch.float32 and table.shape == (rows, model.spec.head_dim // 2, 2)
    assert torch.equal(torch.cat((table[..., 0], table[..., 0]), -1), cos[0])
    assert torch.equal(torch.cat((table[..., 1], table[..., 1]), -1), sin[0])


def test_spec_weights_and_table_give_the_logits_of_transformers(family: str, tiny_folder: Folder) -> None:
    model = resolve(str(tiny_folder(family)))
    ids = torch.randint(0, model.spec.vocab, (90,), generator=torch.Generator().manual_seed(1))
    expected = model.eager()(ids[None]).logits[0]
    error = (decode(model, ids) - expected).abs().max() / expected.abs().max()
    assert error < 1e-5


def test_describe_of_a_folder_equals_the_resolved_spec(family: str, tiny_folder: Folder) -> None:
    folder = str(tiny_folder(family))
    assert describe(folder) == resolve(folder).spec


def test_describe_of_a_folder_without_weights_reads_the_config_alone(tiny_copy: Folder) -> None:
    folder = tiny_copy("llama3.1")
    complete = describe(str(folder))
    (folder / "model.safetensors").unlink()
    assert describe(str(folder)) == complete


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_stored_dtype_of_the_weights_is_the_dtype_of_the_model(dtype: str, tiny_copy: Folder, tmp_path: Path) -> None:
    loaded = resolve(str(tiny_copy("qwen3"))).eager()
    loaded.to(getattr(torch, dtype)).save_pretrained(tmp_path / "other")
    model = resolve(str(tmp_path / "other"))
    assert model.weights.tensor("L0.q").dtype == getattr(torch, dtype)
    assert model.spec.dtype == {"float32": "fp32", "float16": "fp16"}[dtype]


def decode(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits [tokens, vocab], from nothing but the spec, the named weights and the RoPE table."""
    spec = model.spec
    weights = {name: model.weights.tensor(name).float() for name in weight_shapes(spec)}
    table = model.weights.rope_table(len(ids))
    hidden = weights["embed"][ids]
    for layer in range(spec.layers):
        own = {name.partition(".")[2]: weight for name, weight in weights.items() if name.startswith(f"L{layer}.")}
        hidden = hidden + attention(model, layer, own, norm(hidden, own["input_norm"], spec.rms_eps), table)
        inner = norm(hidden, own["post_norm"], spec.rms_eps)
        gated = silu(linear(inner, own["gate"], own.get("gate.bias"))) * linear(inner, own["up"], own.get("up.bias"))
        hidden = hidden + linear(gated, own["down"], own.get("down.bias"))
    return linear(norm(hidden, weights["final_norm"], spec.rms_eps), weights["head"])


def attention(model: Model, layer: int, own: dict[str, torch.Tensor], inner: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    spec, tokens = model.spec, len(inner)
    q, k, v = (linear(inner, own[name], own.get(f"{name}.bias")).view(tokens, -1, spec.head_dim) for name in "qkv")
    if spec.qk_norm:
        q, k = norm(q, own["q_norm"], spec.rms_eps), norm(k, own["k_norm"], spec.rms_eps)
    q, k = rotate(q, table), rotate(k, table)
    k, v = k.repeat_interleave(spec.group, 1), v.repeat_interleave(spec.group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(spec.head_dim)
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    window = spec.windows[layer] or tokens
    scores = scores.masked_fill((distance < 0) | (distance >= window), -math.inf)
    mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
    return linear(mixed.reshape(tokens, -1), own["o"], own.get("o.bias"))


def norm(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    cos, sin = table[:, None, :, 0], table[:, None, :, 1]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
