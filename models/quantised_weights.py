"""A model's weights with its matrices quantised by AMK: NAME@FORMAT."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from amk.isa.weight_format import FORMATS, WeightFormat
from amk.models.errors import UnknownModel, Unsupported
from amk.models.quantise import VERSION, dequantise, quantise
from amk.schedule.model import DType, ModelSpec, QuantisedMatrix, WeightSource, weight_format

if TYPE_CHECKING:
    import torch

DTYPES: tuple[DType, ...] = ("bf16", "fp16", "fp32")


class ModelWeights(WeightSource, Protocol):
    """Weights with a content id: equal digests mean equal weights."""

    @property
    def digest(self) -> str: ...


def split_name(name: str) -> tuple[str, WeightFormat | DType | None]:
    """The model and the format or dtype of NAME@FORMAT, None where none is given; `UnknownModel` for a format that does not exist."""
    base, at, form = name.rpartition("@")
    if not at:
        return name, None
    dtype = next((dtype for dtype in DTYPES if dtype == form), None)
    if dtype is None and form not in FORMATS:
        raise UnknownModel(f"model {name}: the weight format after @ must be one of {', '.join((*DTYPES, *FORMATS))}, but is {form!r}")
    return base, dtype or FORMATS[form]


def with_weights(spec: ModelSpec, form: WeightFormat) -> ModelSpec:
    """The model with the matrices of its layers and its head in a format; `Unsupported` where it cannot be."""
    name = f"{spec.name}@{form.name}"
    if spec.quantised:
        held = (spec.layer_weights or spec.head_weights or form).name
        raise Unsupported(name, [f"weights are quantised ({held}) already: leave out @{form.name}"])
    if spec.dtype == "fp32":
        raise Unsupported(name, [f"weights must be bf16 or fp16 to be streamed as {form.name}, but are fp32"])
    stored = replace(form, scale=spec.dtype)
    return replace(spec, name=name, layer_weights=stored, head_weights=stored)


class QuantisedWeights:
    """The weights of `source`, those that `spec` gives a format quantised each time they are asked for."""

    def __init__(self, source: ModelWeights, spec: ModelSpec) -> None:
        self._source = source
        self._spec = spec

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        """The named weight on `device`: in the checkpoint's own dtype, or dequantised as fp32; KeyError if there is no such weight."""
        if weight_format(self._spec, name):
            return dequantise(self.quantised(name, device))
        tensor: torch.Tensor = self._source.tensor(name, device)
        return tensor

    def quantised(self, name: str, device: str = "cpu") -> QuantisedMatrix:
        """The named weight as codes, scales and zeros; KeyError if it has no format."""
        form = weight_format(self._spec, name)
        if form is None:
            raise KeyError(name)
        return quantise(self._source.tensor(name, device), form)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        """fp32 [rows, head_dim / 2, 2] of (cos, sin)."""
        table: torch.Tensor = self._source.rope_table(rows, device)
        return table

    @property
    def digest(self) -> str:
        forms = [self._spec.layer_weights, self._spec.head_weights]
        return hashlib.sha256(f"{VERSION}:{forms}:{self._source.digest}".encode()).hexdigest()
