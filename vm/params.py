"""The launch parameters: one record that the host fills and the kernel takes by value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from amk.isa.abi import PTR, U32, Field, record_dtype, record_fields
from amk.isa.sampling import Sampling


@dataclass
class Params:
    """Device addresses and run-time numbers of one launch; `buffers` holds each buffer's first packet in the arena.

    `zero` is 0, which the compiler does not know (Consumer::release_chunk).
    """

    arena: PTR = 0
    image: PTR = 0
    buffers: PTR = 0
    weights: PTR = 0
    kv: PTR = 0
    constants: PTR = 0
    rope: PTR = 0
    embedding: PTR = 0
    logits: PTR = 0
    tokens_in: PTR = 0
    tokens_out: PTR = 0
    counters: PTR = 0
    claims: PTR = 0
    abort: PTR = 0
    host_abort: PTR = 0
    position: U32 = 0
    steps: U32 = 0
    epoch: U32 = 0
    forced: U32 = 0
    spin_limit: U32 = 0
    logit_rows: U32 = 1
    kv_writers: U32 = 0
    launch: U32 = 0
    by_smid: U32 = 0
    zero: U32 = 0


@dataclass
class BatchParams(Params):
    """Those of a machine of a batch: `positions` are u32, one a seat, and `position` is not used."""

    positions: PTR = 0


@dataclass
class PrefillParams(BatchParams):
    """Those of a machine that does prefill: the first `active` seats hold tokens, from `position` on; `positions` is not used."""

    active: U32 = 0


@dataclass
class DrawingParams(Params):
    """Those of a program that draws (isa.sampling.Sampling): fp32 numbers as their bits; filters that keep all tokens are 0.

    `stops` are `stop_count` tokens (i32) on the device.
    """

    removed_share: PTR = 0
    stops: PTR = 0
    temperature: U32 = 0
    min_p: U32 = 0
    least_score: U32 = 0
    top_k: U32 = 0
    seed_low: U32 = 0
    seed_high: U32 = 0
    stop_count: U32 = 0


def param_fields(batch: int, draws: bool, prefill: bool = False) -> tuple[Field, ...]:
    """The launch parameters of a program that computes `batch` tokens side by side, or draws, or does prefill."""
    if prefill:
        return record_fields(PrefillParams)
    return record_fields(DrawingParams if draws else Params if batch == 1 else BatchParams)


def param_dtype(batch: int, draws: bool, prefill: bool = False) -> np.dtype[Any]:
    return record_dtype("Params", param_fields(batch, draws, prefill))


def sampling_words(sampling: Sampling) -> dict[str, int]:
    """The parameters that `sampling` gives, `stops` excepted."""
    filters = sampling if sampling.filters else replace(sampling, top_k=0, top_p=1.0, min_p=0.0)
    numbers = {"temperature": sampling.temperature, "min_p": filters.min_p, "least_score": float(filters.least_score)}
    return {
        **{name: int(np.float32(value).view(np.uint32)) for name, value in numbers.items()},
        "removed_share": filters.removed_share,
        "top_k": filters.top_k,
        "seed_low": sampling.seed & 0xFFFFFFFF,
        "seed_high": sampling.seed >> 32,
        "stop_count": len(sampling.stop_tokens),
    }
