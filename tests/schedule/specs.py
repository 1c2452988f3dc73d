"""Model descriptions for tests of the compiler: real shapes written by hand, and small random ones."""

from __future__ import annotations

import random
from dataclasses import replace

from amk.isa.machine import ELEMENT_BYTES
from amk.schedule.model import DType, ModelSpec


def spec(
    name: str,
    hidden: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
    vocab: int,
    dtype: DType = "bf16",
    max_context: int = 2048,
) -> ModelSpec:
    return ModelSpec(name, "llama", dtype, hidden, layers, heads, kv_heads, head_dim, intermediate, vocab, 1e-5, max_context)


TOY = spec("toy", 64, 1, 4, 2, 16, 128, 257, "fp32", 256)
TINY = spec("tiny", 64, 2, 2, 1, 8, 36, 257, "bf16", 300)
WINDOWED = replace(spec("windowed", 128, 2, 8, 2, 16, 200, 500), windows=(64, None), max_context=512)
BIASED = replace(spec("biased", 64, 2, 6, 2, 24, 100, 333), qkv_bias=True, o_bias=True, mlp_bias=True, max_context=512)
NORMED = replace(spec("normed", 96, 2, 4, 4, 32, 96, 1000, "fp16"), qk_norm=True)
SMOLLM2 = spec("smollm2-135m", 576, 30, 9, 3, 64, 1536, 49152)
QWEN3 = replace(spec("qwen3-0.6b", 1024, 28, 16, 8, 128, 3072, 151936), qk_norm=True)
LLAMA_1B = replace(spec("llama-3.2-1b", 2048, 16, 32, 8, 64, 8192, 128256), max_context=131072)
LLAMA_8B = replace(spec("llama-3.1-8b", 4096, 32, 32, 8, 128, 14336, 128256), max_context=131072)
WIDE_HEADS = spec("wide-heads", 256, 2, 2, 1, 256, 512, 999, "fp32")
SMALL = (TOY, TINY, WINDOWED, BIASED, NORMED, WIDE_HEADS)
LARGE = (SMOLLM2, QWEN3, LLAMA_1B, LLAMA_8B)


def random_spec(seed: int) -> ModelSpec:
    """A small model of sizes that do not fit anything well."""
    rng = random.Random(seed)
    kv_heads = rng.choice((1, 2, 3))
    dtype = rng.choice(tuple(ELEMENT_BYTES))
    made = spec(
        f"random{seed}",
        hidden=16 * rng.randint(1, 12),
        layers=rng.randint(1, 3),
        heads=kv_heads * rng.choice((1, 3, 4, 8)),
        kv_heads=kv_heads,
        head_dim=8 * rng.choice((1, 2, 3, 5)),
        intermediate=4 * rng.randint(1, 75),
        vocab=rng.randint(2, 700),
        dtype=dtype,  # type: ignore[arg-type]
        max_context=rng.randint(20, 400),
    )
    qkv_bias, o_bias, mlp_bias, qk_norm = (rng.random() < 0.3 for _ in range(4))
    windows = tuple(rng.choice((None, 24, 100)) for _ in range(made.layers))
    return replace(made, windows=windows, qkv_bias=qkv_bias, o_bias=o_bias, mlp_bias=mlp_bias, qk_norm=qk_norm)
