"""The launch parameters: one record that the host fills and the kernel takes by value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from amk.isa.abi import PTR, U32, Field, record_dtype, record_fields


@dataclass
class Params:
    """Device addresses and run-time numbers of one launch; `buffers` holds each buffer's first packet in the arena."""

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


@dataclass
class BatchParams(Params):
    """Those of a machine of a batch: `positions` are u32, one a seat, and `position` is not used."""

    positions: PTR = 0


def param_fields(batch: int) -> tuple[Field, ...]:
    """The launch parameters of a machine that computes `batch` tokens side by side."""
    return record_fields(Params if batch == 1 else BatchParams)


def param_dtype(batch: int) -> np.dtype[Any]:
    return record_dtype("Params", param_fields(batch))
