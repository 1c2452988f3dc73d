"""Rounding fp32 arrays to the machine's 16-bit element types."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def round_to(values: npt.NDArray[Any], dtype: str) -> F32:
    """`values` as fp32, rounded to the nearest value that `dtype` ("bf16", "fp16", "fp32") can hold; ties to even."""
    x = np.ascontiguousarray(values, dtype=np.float32)
    if dtype == "fp32":
        return x
    if dtype == "fp16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    bits = x.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) & np.uint32(0xFFFF0000)
    return np.where(np.isfinite(x), rounded.view(np.float32), x)


def two_part(values: npt.NDArray[Any], dtype: str) -> F32:
    """`values` as the sum of two elements of `dtype`: the rounded value and its rounding error, rounded again."""
    x = np.ascontiguousarray(values, dtype=np.float32)
    rounded = round_to(x, dtype)
    with np.errstate(invalid="ignore"):  # infinite where x is beyond the range of `dtype`
        return rounded if dtype == "fp32" else rounded + round_to(x - rounded, dtype)


def _exponent_of_largest(x: F32) -> float:
    """Of the power of two below the largest magnitude, -63 at least; NaN where that is no number or infinite."""
    largest = np.abs(x).max(initial=0)
    return float(max(np.frexp(largest)[1] - 1, -63)) if np.isfinite(largest) else float("nan")


def scaled_halves(values: npt.NDArray[Any]) -> F32:
    """`values` as products with weights in fp8 take them: two fp16 of each times the power of two that takes the largest magnitude, which
    counts as 2^-63 at least, to 2^14 or above."""
    x = np.ascontiguousarray(values, dtype=np.float32)
    up = np.float32(np.exp2(14 - _exponent_of_largest(x)))
    return two_part(x * up, "fp16") / up


def fixed_point(values: npt.NDArray[Any]) -> F32:
    """`values` as products in integers take them: multiples of 2^-21 of the power of two below the largest magnitude (at least 2^-63)."""
    x = np.ascontiguousarray(values, dtype=np.float32)
    unit = np.exp2(_exponent_of_largest(x) - 21)
    return np.asarray(np.rint(x / unit) * unit, dtype=np.float32)
