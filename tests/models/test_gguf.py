"""A GGUF file is converted exactly, or refused by the name of what transformers would have ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFWriter

from amk.models.errors import DamagedCheckpoint, Unsupported
from amk.models.model import Model
from amk.models.registry import describe, resolve

Folder = Callable[[str], Path]

_LAYER = {
    "attn_norm": "input_norm", "attn_q": "q", "attn_k": "k", "attn_v": "v", "attn_output": "o", "ffn_norm": "post_norm",
    "ffn_gate": "gate", "ffn_up": "up", "ffn_down": "down",
}  # fmt: skip


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of q or k in llama.cpp's order, where rotated pairs are neighbours."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: Model, extra: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    spec = model.spec
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(spec.vocab)
    writer.add_context_length(spec.max_context)
    writer.add_embedding_length(spec.hidden)
    writer.add_block_count(spec.layers)
    writer.add_feed_forward_length(spec.intermediate)
    writer.add_head_count(spec.heads)
    writer.add_head_count_kv(spec.kv_heads)
    writer.add_layer_norm_rms_eps(spec.rms_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(spec.head_dim)
    for key, value in (extra or {}).items():
        writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)
    for name, tensor in (gguf_tensors(model) | (tensors or {})).items():
        writer.add_tensor(name, tensor.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_tensors(model: Model) -> dict[str, torch.Tensor]:
    weights, heads = model.weights, {"q": model.spec.heads, "k": model.spec.kv_heads}
    tensors = {"token_embd.weight": weights.tensor("embed"), "output_norm.weight": weights.tensor("final_norm")}
    tensors["output.weight"] = weights.tensor("head")
    for layer in range(model.spec.layers):
        for theirs, ours in _LAYER.items():
            weight = weights.tensor(f"L{layer}.{ours}")
            tensors[f"blk.{layer}.{theirs}.weight"] = interleaved(weight, heads[ours]) if ours in heads else weight
    return tensors


def test_gguf_is_converted_once_to_the_same_model(tmp_path: Path, tiny_folder: Folder) -> None:
    model = resolve(str(tiny_folder("llama2")))
    file = write_gguf(tmp_path / "tiny.gguf", model)
    said: list[str] = []
    converted = resolve(str(file), cache_dir=tmp_path / "cache", progress=said.append)
    assert converted.spec.dtype == "fp32" and converted.spec.name == "tiny"
    for name in ("embed", "L0.q", "L1.k", "L1.down", "head"):
        assert torch.equal(converted.weights.tensor(name), model.weights.tensor(name).float()), name
    ids = torch.arange(20)[None]
    error = (converted.eager()(ids).logits - model.eager()(ids).logits).abs().max()
    assert error < 1e-3 * model.eager()(ids).logits.abs().max()
    count = len(said)
    assert resolve(str(file), cache_dir=tmp_path / "cache", progress=said.append).digest == converted.digest
    assert describe(str(file), cache_dir=tmp_path / "cache", progress=said.append) == converted.spec
    assert count > 0 and len(said) == count


@pytest.mark.parametrize(
    ("extra", "tensors", "words"),
    [
        ({"llama.rope.scaling.factor": 8.0}, {}, "llama.rope.scaling.factor"),
        ({"llama.expert_count": 8}, {}, "llama.expert_count"),
        ({"llama.attention.sliding_window": 64}, {}, "llama.attention.sliding_window"),
        ({"llama.attention.key_length": 64}, {}, "head lengths"),
        ({}, {"rope_freqs.weight": torch.ones(8)}, "rope_freqs.weight"),
    ],
)
def test_what_transformers_would_ignore_is_rejected_by_name(
    extra: dict[str, Any], tensors: dict[str, torch.Tensor], words: str, tmp_path: Path, tiny_folder: Folder
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", resolve(str(tiny_folder("llama2"))), extra, tensors)
    with pytest.raises(Unsupported, match=words):
        resolve(str(file), cache_dir=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "gguf").iterdir() if path.is_dir()]


def test_truncated_gguf_is_damaged(tmp_path: Path, tiny_folder: Folder) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", resolve(str(tiny_folder("llama2"))))
    whole = file.read_bytes()
    for kept in (0, 3, 100, len(whole) // 2, len(whole) - 8):
        file.write_bytes(whole[:kept])
        with pytest.raises(DamagedCheckpoint, match="not a readable GGUF file"):
            resolve(str(file), cache_dir=tmp_path / "cache")
