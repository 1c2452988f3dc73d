"""E4M3 weights with a scale for each block of 128 by 128: transformers' fine-grained FP8 (quant_method fp8), as Qwen3's.

Activations, which such a checkpoint would have rounded to 8 bits as they come, are in 16 bits here: that only leaves an error out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amk.isa.weight_format import FP8_GROUPS, WeightFormat
from amk.models.stored_matrix import SCALES, Part, Scheme, config_problems, number_codes, same_zeros
from amk.schedule.model import QuantisedMatrix

if TYPE_CHECKING:
    import torch

BLOCK = 128
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("fp8",), "fmt": ("e4m3",), "activation_scheme": ("dynamic",), "weight_block_size": ([BLOCK, BLOCK],),
    "modules_to_not_convert": None, "ignored_layers": None, "modules_to_convert": (None,), "dequantize": (False,),
    "scale_fmt": ("float",), "expert_dtype": None,
}  # fmt: skip


@dataclass(frozen=True)
class BlockFloats(Scheme):
    """weight F8_E4M3 [rows, columns] and `scales` [rows / 128, columns / 128], rounded up; weight = number * scale of its block."""

    scales: str = "weight_scale_inv"

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
        return Part("weight", ("F8_E4M3",), (rows, columns)), Part(self.scales, SCALES, blocks)

    def read(self, name: str, parts: Mapping[str, torch.Tensor], weights: WeightFormat) -> QuantisedMatrix:
        codes = number_codes(name, parts["weight"])
        scales = parts[self.scales].repeat_interleave(BLOCK, 0)[: len(codes)].contiguous()
        return QuantisedMatrix(weights, codes, scales, same_zeros(scales, weights))


def fp8_blocks_scheme(config: Mapping[str, Any]) -> BlockFloats | list[str]:
    """The scheme of a config's quantization_config, or what is not understood about it."""
    at = "quantization_config"
    problems = config_problems(config, _KNOWN, at)
    if "weight_block_size" not in config:  # a scale would serve the whole matrix
        problems.append(f"config field {at}.weight_block_size: must be {[BLOCK, BLOCK]}, but is missing")
    return problems or BlockFloats(FP8_GROUPS)
