"""compressed-tensors checkpoints (llm-compressor) with quantised weights and 16-bit activations: pack-quantized and int-quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amk.isa.weight_format import WeightFormat
from amk.models.packed_codes import unpacked
from amk.models.stored_matrix import SCALES, Part, Scheme, config_problems, group_of, require_whole_groups, same_zeros
from amk.schedule.model import QuantisedMatrix

if TYPE_CHECKING:
    import torch

PACKED, PLAIN = "pack-quantized", ("int-quantized", "naive-quantized")
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("compressed-tensors",), "format": (PACKED, *PLAIN), "config_groups": None, "ignore": None, "kv_cache_scheme": (None,),
    "quantization_status": ("compressed", "frozen"), "global_compression_ratio": None, "version": None, "transform_config": (None, {}),
    "sparsity_config": (None, {}),
}  # fmt: skip
_GROUP: dict[str, tuple[Any, ...] | None] = {
    "targets": (["Linear"],), "weights": None, "input_activations": (None,), "output_activations": (None,),
    "format": (None, PACKED, *PLAIN),
}  # fmt: skip
_WEIGHTS: dict[str, tuple[Any, ...] | None] = {
    "num_bits": (4, 8), "type": ("int",), "symmetric": (True, False), "strategy": ("group", "channel"), "group_size": None,
    "block_structure": (None,), "dynamic": (False,), "actorder": None, "observer": None, "observer_kwargs": None, "scale_dtype": None,
    "zp_dtype": None,
}  # fmt: skip


@dataclass(frozen=True)
class CompressedTensors(Scheme):
    """weight_scale [rows, groups] beside the codes; weight = (q - zero) * scale with signed q and zero: a code is q + 2^(bits - 1).

    `packed`: weight_packed int32 [rows, columns * bits / 32] holds codes, along the columns; weight_zero_point int32
    [rows * bits / 32, groups] holds codes along the rows. Else weight and weight_zero_point are int8 q and zero.
    """

    packed: bool = True

    @property
    def scales(self) -> str:
        return "weight_scale"

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        groups, count = self.weights.groups(columns), 32 // self.weights.bits
        scales = Part("weight_scale", SCALES, (rows, groups))
        if not self.packed:
            return (
                Part("weight", ("I8",), (rows, columns)),
                scales,
                Part("weight_zero_point", ("I8",), (rows, groups), optional=not self.weights.asymmetric),
            )
        return (
            Part("weight_packed", ("I32",), (rows, -(-columns // count))),
            scales,
            Part("weight_zero_point", ("I32",), (-(-rows // count), groups), optional=not self.weights.asymmetric),
            Part("weight_shape", ("I64", "I32"), (2,), optional=True),
            Part("weight_g_idx", ("I32",), (columns,), optional=True),
        )

    def read(self, name: str, parts: Mapping[str, torch.Tensor], weights: WeightFormat) -> QuantisedMatrix:
        require_whole_groups(name, parts.get("weight_g_idx"), weights)
        scales = parts["weight_scale"]
        zeros = same_zeros(scales, weights) if not weights.asymmetric else self._zeros(parts["weight_zero_point"], len(scales), weights)
        if not self.packed:
            return QuantisedMatrix(weights, _codes(parts["weight"], weights), scales, zeros)
        codes = unpacked(parts["weight_packed"], weights.bits, 1)
        columns = int(parts["weight_shape"][1]) if "weight_shape" in parts else codes.shape[1]
        return QuantisedMatrix(weights, codes[:, :columns].contiguous(), scales, zeros)

    def _zeros(self, stored: torch.Tensor, rows: int, weights: WeightFormat) -> torch.Tensor:
        return unpacked(stored, weights.bits, 0)[:rows] if self.packed else _codes(stored, weights)


def _codes(signed: torch.Tensor, weights: WeightFormat) -> torch.Tensor:
    import torch

    return (signed.to(torch.int16) + weights.zero).to(torch.uint8)


def compressed_tensors_scheme(config: Mapping[str, Any]) -> CompressedTensors | list[str]:
    """The scheme of a config's quantization_config, or what is not understood about it."""
    at, groups = "quantization_config", config.get("config_groups")
    problems = config_problems(config, _KNOWN, at)
    if not isinstance(groups, Mapping) or len(groups) != 1 or not isinstance(next(iter(groups.values())), Mapping):
        return [*problems, f"config field {at}.config_groups: must be one group for all matrices, but got {groups!r:.60}"]
    name, group = next(iter(groups.items()))
    problems += config_problems(group, _GROUP, f"{at}.{name}")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        return [*problems, f"config field {at}.{name}.weights: must be an object, but got {weights!r:.60}"]
    problems += config_problems(weights, _WEIGHTS, f"{at}.{name}.weights")
    stated = weights.get("group_size") if weights.get("strategy") == "group" else -1
    try:
        form = WeightFormat(int(weights.get("num_bits", 8)), group_of(stated), asymmetric=weights.get("symmetric", True) is False)
    except (ValueError, TypeError):
        return [*problems, f"config field {at}.{name}.weights.group_size: must be 32, 64 or 128, but got {stated!r}"]
    return problems or CompressedTensors(form, packed=config.get("format") == PACKED)
