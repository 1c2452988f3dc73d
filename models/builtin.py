"""The models that have a name: their config.json, as the original checkpoints have it where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

SMOLLM2 = "smollm2-135m"


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, context: int, **fields: Any
) -> dict[str, Any]:
    sizes = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate, "vocab_size": vocab, "max_position_embeddings": context,
    }  # fmt: skip
    fixed = {"model_type": "llama", "rms_norm_eps": 1e-5, "dtype": "bfloat16", "bos_token_id": None, "eos_token_id": None}
    return sizes | fixed | fields


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip


_SMOLLM2_SHAPE = _llama(576, 30, 9, 3, 1536, 49152, 8192, rope_theta=100_000.0, tie_word_embeddings=True)

# Random-weight models. They have no stop tokens: nothing a random model says means that it is done.
RANDOM: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "toy": _llama(64, 1, 4, 2, 128, 257, 2048, head_dim=16, dtype="float32"),
    "toy-2L": _llama(64, 2, 4, 2, 128, 257, 2048, head_dim=16, tie_word_embeddings=True),
    "small": _llama(256, 3, 8, 2, 704, 1003, 4096, head_dim=64),
    "smollm2-135m-shape": _SMOLLM2_SHAPE,
    "llama-3.2-1b-shape": _llama(
        2048, 16, 32, 8, 8192, 128256, 131072,
        head_dim=64, rope_theta=500_000.0, rope_scaling=_llama3_rope(32.0), tie_word_embeddings=True,
    ),
    "llama-3.1-8b-shape": _llama(
        4096, 32, 32, 8, 14336, 128256, 131072, head_dim=128, rope_theta=500_000.0, rope_scaling=_llama3_rope(8.0),
    ),
    "qwen3-0.6b-shape": _llama(
        1024, 28, 16, 8, 3072, 151936, 40960,
        model_type="qwen3", head_dim=128, rms_norm_eps=1e-6, rope_theta=1_000_000.0, tie_word_embeddings=True,
    ),
})  # fmt: skip

# What the conversion of the SmolLM2 GGUF writes, so that the model is known before it is fetched.
SMOLLM2_CONFIG: Mapping[str, Any] = MappingProxyType(
    _SMOLLM2_SHAPE | {"rms_norm_eps": 9.999999747378752e-06, "bos_token_id": 1, "eos_token_id": 2}
)

NAMES = (*RANDOM, SMOLLM2)
