"""Which scheme a checkpoint's matrices are stored by, from the quantization_config of its config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from amk.models.awq import awq_scheme
from amk.models.compressed_tensors import compressed_tensors_scheme
from amk.models.fp8_blocks import fp8_blocks_scheme
from amk.models.gptq import gptq_scheme
from amk.models.stored_matrix import Scheme

FIELD = "quantization_config"
READERS: Mapping[str, Callable[[Mapping[str, Any]], Scheme | list[str]]] = MappingProxyType(
    {"awq": awq_scheme, "gptq": gptq_scheme, "compressed-tensors": compressed_tensors_scheme, "fp8": fp8_blocks_scheme}
)


def scheme_of(config: Mapping[str, Any]) -> Scheme | list[str] | None:
    """The scheme, None for a checkpoint that is not quantised, or one sentence for each thing that is not understood."""
    stated = config.get(FIELD)
    if stated is None:
        return None
    if not isinstance(stated, Mapping):
        return [f"config field {FIELD}: must be an object or null, but got {stated!r:.60}"]
    method = stated.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        return [f"config field {FIELD}.quant_method: must be one of {', '.join(READERS)}, but got {method!r}"]
    return READERS[method](stated)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with ordinary weights."""
    return {field: value for field, value in config.items() if field != FIELD}
