"""A model's weights in another dtype: NAME@fp16, for cards that lack the checkpoint's."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

from amk.models.eager import torch_dtype
from amk.models.errors import Unsupported
from amk.models.quantised_weights import ModelWeights
from amk.schedule.model import DType, ModelSpec, QuantisedMatrix

if TYPE_CHECKING:
    import torch


def with_dtype(spec: ModelSpec, dtype: DType) -> ModelSpec:
    """The model with its weights and activations in `dtype`; `Unsupported` where they are already, or are quantised."""
    name = f"{spec.name}@{dtype}"
    if spec.quantised:
        raise Unsupported(name, [f"weights are quantised already: convert before, as in NAME@{dtype}@int8"])
    if spec.dtype == dtype:
        raise Unsupported(name, [f"weights are {dtype} already: leave out @{dtype}"])
    return replace(spec, name=name, dtype=dtype)


class ConvertedWeights:
    """The weights of `source`, each rounded to the dtype of `spec` when it is asked for; the model is what they are then."""

    def __init__(self, source: ModelWeights, spec: ModelSpec) -> None:
        self._source = source
        self._spec = spec

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        """The named weight on `device`; KeyError if there is no such weight, `Unsupported` for one that is too large for the dtype."""
        tensor: torch.Tensor = self._source.tensor(name, device).to(torch_dtype(self._spec.dtype))
        if not bool(tensor.isfinite().all()):
            raise Unsupported(self._spec.name, [f"weight {name} has values that {self._spec.dtype} cannot hold"])
        return tensor

    def quantised(self, name: str, device: str = "cpu") -> QuantisedMatrix:
        """KeyError: none of these weights is quantised."""
        raise KeyError(name)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        """fp32 [rows, head_dim / 2, 2] of (cos, sin)."""
        table: torch.Tensor = self._source.rope_table(rows, device)
        return table

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self._spec.dtype}:{self._source.digest}".encode()).hexdigest()
