"""Packets as bits: what the 32-bit value of a packet of each kind holds."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from amk.isa.instruction import Kind

Bits: TypeAlias = npt.NDArray[np.uint32]


def decode_packets(bits: Bits, kind: Kind, dtype: str) -> npt.NDArray[Any]:
    """Elements of packets as fp32; u32 packets as int64. The result never aliases `bits`."""
    if kind == "u32":
        return bits.astype(np.int64)
    if kind == "f32" or dtype == "fp32":
        return bits.copy().view(np.float32)
    if dtype == "fp16":
        return bits.view(np.float16).astype(np.float32)
    return (bits.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def encode_packets(values: npt.NDArray[Any], kind: Kind, dtype: str) -> Bits:
    """Packets that hold `values` (narrow values already rounded to `dtype`); an odd narrow count is padded with a zero."""
    if kind == "u32":
        return values.astype(np.uint32)
    x = np.ascontiguousarray(values, dtype=np.float32)
    if kind == "f32" or dtype == "fp32":
        return x.view(np.uint32)
    halves = x.astype(np.float16).view(np.uint16) if dtype == "fp16" else (x.view(np.uint32) >> 16).astype(np.uint16)
    return (np.append(halves, np.uint16(0)) if len(halves) % 2 else halves).view(np.uint32)
