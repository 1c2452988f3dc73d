"""The oracle's second measure: the KV rows that a machine wrote, layer by layer, against the source model's.

Logits see an error only after every later layer has added its own rounding. The rows of the next layer see it before: noise in one
early matrix that moves the logits no further than rounding does still moves them by many times their expected error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amk.eval.tolerance import FP32_ERROR
from amk.models.eager import torch_dtype
from amk.schedule.model import DType

if TYPE_CHECKING:
    import torch

# (layer, stop) to K and V of rows 0..stop-1, each [kv_heads, stop, head_dim], K after norm and RoPE.
ReadRows = Callable[[int, int], "tuple[torch.Tensor, torch.Tensor]"]


@dataclass(frozen=True)
class Rows:
    """Rows start..stop-1 of the cache."""

    start: int
    stop: int


def expected_errors(rounded: ReadRows, exact: ReadRows, layers: int, rows: Rows, dtype: DType) -> torch.Tensor:
    """The relative error that rounding alone causes in each row, [layers, 2 (K, V), rows]: `rounded` are the rows of the source
    model that rounds its activations, here rounded as the cache stores them.
    """

    def stored(layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (part.to(torch_dtype(dtype)).float() for part in rounded(layer, stop))
        return keys, values

    return relative_errors(stored, exact, layers, rows).clamp(min=FP32_ERROR)


def relative_errors(found: ReadRows, exact: ReadRows, layers: int, rows: Rows) -> torch.Tensor:
    """|found - exact| / |exact| of each row over all heads, fp64 [layers, 2 (K, V), rows] on the CPU."""
    import torch

    def of_layer(layer: int) -> torch.Tensor:
        pairs = zip(found(layer, rows.stop), exact(layer, rows.stop), strict=True)
        return torch.stack([_relative(_cut(got, rows), _cut(wanted, rows)) for got, wanted in pairs])

    return torch.stack([of_layer(layer) for layer in range(layers)])


def _relative(got: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    import torch

    size: torch.Tensor = wanted.norm(dim=(0, 2)).clamp(min=torch.finfo(torch.float32).tiny)
    error: torch.Tensor = (got - wanted).norm(dim=(0, 2)) / size
    return error


def _cut(part: torch.Tensor, rows: Rows) -> torch.Tensor:
    return part[:, rows.start : rows.stop].double().cpu()


def typical_ratios(errors: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Geometric mean over positions of error energy over expected energy, for K and V of each layer; infinite if a row is not finite."""
    import torch

    logs = torch.log(errors.clamp(min=FP32_ERROR) / expected)
    ratios = torch.nan_to_num(torch.exp(2 * logs.mean(dim=2)), nan=torch.inf, posinf=torch.inf)
    return {f"{kind} rows of layer {layer}": float(ratios[layer, i]) for layer in range(len(ratios)) for i, kind in enumerate("KV")}
