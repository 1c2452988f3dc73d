"""compressed-tensors checkpoints (llm-compressor): weights that are integers (pack-quantized, int-quantized) or FP8 (float-quantized).

Activations are in 16 bits here. A checkpoint that would have them rounded is refused, but for FP8 ones that round them to 8 bits as they
come (dynamic): not doing so only leaves an error out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amk.isa.weight_format import FP8, FP8_GROUPS, WeightFormat
from amk.models.fp8_blocks import BLOCK, BlockFloats
from amk.models.packed_codes import unpacked
from amk.models.stored_matrix import SCALES, Part, Scheme, config_problems, group_of, number_codes, require_whole_groups, same_zeros
from amk.schedule.model import QuantisedMatrix

if TYPE_CHECKING:
    import torch

PACKED, PLAIN, FLOATS = "pack-quantized", ("int-quantized", "naive-quantized"), "float-quantized"
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("compressed-tensors",), "format": (PACKED, *PLAIN, FLOATS), "config_groups": None, "ignore": None,
    "kv_cache_scheme": (None,), "quantization_status": ("compressed", "frozen"), "global_compression_ratio": None, "version": None,
    "transform_config": (None, {}), "sparsity_config": (None, {}),
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
# The same where the format is FLOATS.
_GROUP_OF_FLOATS = _GROUP | {"input_activations": None, "format": (None, FLOATS)}
_FLOATS = _WEIGHTS | {
    "num_bits": (8,), "type": ("float",), "symmetric": (True,), "strategy": ("channel", "tensor", "block"), "group_size": (None,),
    "block_structure": (None, [BLOCK, BLOCK]),
}  # fmt: skip


@dataclass(frozen=True)
class FloatTensors(Scheme):
    """weight F8_E4M3 [rows, columns] and weight_scale [rows, 1], or [1] where `one_scale` serves the matrix; weight = number * scale."""

    one_scale: bool = False

    @property
    def scales(self) -> str:
        return "weight_scale"

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        return (
            Part("weight", ("F8_E4M3",), (rows, columns)),
            Part("weight_scale", SCALES, (1,) if self.one_scale else (rows, 1)),
        )

    def read(self, name: str, parts: Mapping[str, torch.Tensor], weights: WeightFormat) -> QuantisedMatrix:
        codes = number_codes(name, parts["weight"])
        scales = parts["weight_scale"].reshape(-1, 1).expand(len(codes), 1).contiguous()
        return QuantisedMatrix(weights, codes, scales, same_zeros(scales, weights))


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
        rows, columns = parts["weight_shape"].tolist() if "weight_shape" in parts else codes.shape
        return QuantisedMatrix(weights, codes[:rows, :columns].contiguous(), scales, zeros)

    def _zeros(self, stored: torch.Tensor, rows: int, weights: WeightFormat) -> torch.Tensor:
        return unpacked(stored, weights.bits, 0)[:rows] if self.packed else _codes(stored, weights)


def _codes(signed: torch.Tensor, weights: WeightFormat) -> torch.Tensor:
    import torch

    return (signed.to(torch.int16) + weights.zero).to(torch.uint8)


def compressed_tensors_scheme(config: Mapping[str, Any]) -> Scheme | list[str]:
    """The scheme of a config's quantization_config, or what is not understood about it."""
    at, groups = "quantization_config", config.get("config_groups")
    problems = config_problems(config, _KNOWN, at)
    if not isinstance(groups, Mapping) or len(groups) != 1 or not isinstance(next(iter(groups.values())), Mapping):
        return [*problems, f"config field {at}.config_groups: must be one group for all matrices, but got {groups!r:.60}"]
    name, group = next(iter(groups.items()))
    floats = config.get("format") == FLOATS
    problems += config_problems(group, _GROUP_OF_FLOATS if floats else _GROUP, f"{at}.{name}")
    weights = group.get("weights")
    if not isinstance(weights, Mapping):
        return [*problems, f"config field {at}.{name}.weights: must be an object, but got {weights!r:.60}"]
    problems += config_problems(weights, _FLOATS if floats else _WEIGHTS, f"{at}.{name}.weights")
    if floats:
        problems += _rounding_problems(group.get("input_activations"), f"{at}.{name}.input_activations")
        return problems or _floats(weights.get("strategy", "tensor"))
    stated = weights.get("group_size") if weights.get("strategy") == "group" else -1
    try:
        form = WeightFormat(int(weights.get("num_bits", 8)), group_of(stated), asymmetric=weights.get("symmetric", True) is False)
    except (ValueError, TypeError):
        return [*problems, f"config field {at}.{name}.weights.group_size: must be 32, 64 or 128, but got {stated!r}"]
    return problems or CompressedTensors(form, packed=config.get("format") == PACKED)


def _floats(strategy: str) -> Scheme:
    """How FP8 weights are stored: with a scale a row, a matrix or a block."""
    return BlockFloats(FP8_GROUPS, scales="weight_scale") if strategy == "block" else FloatTensors(FP8, one_scale=strategy == "tensor")


def _rounding_problems(activations: Any, at: str) -> list[str]:
    """What is wrong with how activations would be rounded, which is left out: with scales of the checkpoint (static) it could not be."""
    if activations is None or (
        isinstance(activations, Mapping) and activations.get("dynamic") is True and activations.get("num_bits") == 8
    ):
        return []
    return [f"config field {at}: must be null or of 8 bits and dynamic, but got {activations!r:.60}"]
