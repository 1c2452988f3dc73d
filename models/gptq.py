"""GPTQ checkpoints (AutoGPTQ, GPTQModel): codes packed along the columns; zeros packed along the rows, by most writers less one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amk.isa.weight_format import WeightFormat
from amk.models.errors import DamagedCheckpoint, Unsupported
from amk.models.packed_codes import unpacked
from amk.models.stored_matrix import SCALES, Part, Scheme, config_problems, group_of, require_whole_groups, same_zeros
from amk.schedule.model import QuantisedMatrix

if TYPE_CHECKING:
    import torch

_FREE = (
    "group_size", "desc_act", "static_groups", "damp_percent", "damp_auto_increment", "true_sequential", "model_name_or_path",
    "model_file_base_name", "lm_head", "meta", "dataset", "tokenizer", "batch_size", "block_name_to_quantize", "cache_block_outputs",
    "disable_exllama", "exllama_config", "max_input_length", "model_seqlen", "module_name_preceding_first_block",
    "modules_in_block_to_quantize", "pad_token_id", "use_cuda_fp16", "use_exllama", "mse", "backend", "quantizer",
)  # fmt: skip
_KNOWN: dict[str, tuple[Any, ...] | None] = dict.fromkeys(_FREE) | {
    "quant_method": ("gptq",), "bits": (4, 8), "sym": (True, False), "checkpoint_format": ("gptq", "gptq_v2", ""), "dynamic": (None, {}),
    "is_marlin_format": (False,), "pack_dtype": ("int32",),
}  # fmt: skip


@dataclass(frozen=True)
class Gptq(Scheme):
    """qweight int32 [columns * bits / 32, rows], qzeros int32 [groups, rows * bits / 32], scales [groups, rows], g_idx int32 [columns].

    weight = (code - zero) * scale. qzeros hold zero - 1 (`zero_offset` 1) unless checkpoint_format is gptq_v2. Of a symmetric
    checkpoint the zero is known, and both ways of storing it are found in the wild under the same checkpoint_format.
    """

    zero_offset: int = 1

    @property
    def scales(self) -> str:
        return "scales"

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        groups, count = self.weights.groups(columns), 32 // self.weights.bits
        return (
            Part("qweight", ("I32",), (columns // count, rows)),
            Part("qzeros", ("I32",), (groups, rows // count)),
            Part("scales", SCALES, (groups, rows)),
            Part("g_idx", ("I32",), (columns,), optional=True),
            Part("bias", SCALES, (rows,), optional=True),  # AutoGPTQ stores one of zeros for matrices that have none
        )

    def read(self, name: str, parts: Mapping[str, torch.Tensor], weights: WeightFormat) -> QuantisedMatrix:
        require_whole_groups(name, parts.get("g_idx"), weights)
        if "bias" in parts and bool(parts["bias"].any()):
            raise Unsupported(name, ["bias: the model has none here, so a stored one must be zero, but is not"])
        codes = unpacked(parts["qweight"], weights.bits, 0).T.contiguous()
        stored = unpacked(parts["qzeros"], weights.bits, 1).T.contiguous()
        scales = parts["scales"].T.contiguous()
        if weights.asymmetric:
            return QuantisedMatrix(weights, codes, scales, (stored + self.zero_offset) & ((1 << weights.bits) - 1))
        if not any(bool((stored == zero).all()) for zero in (weights.zero - 1, weights.zero)):
            found = sorted(set(stored.flatten().tolist()))[:4]
            allowed = f"{weights.zero - 1} or {weights.zero} in a symmetric checkpoint"
            raise DamagedCheckpoint(f"{name}.qzeros must all be {allowed}, but hold {found}")
        return QuantisedMatrix(weights, codes, scales, same_zeros(scales, weights))


def gptq_scheme(config: Mapping[str, Any]) -> Gptq | list[str]:
    """The scheme of a config's quantization_config, or what is not understood about it."""
    problems = config_problems(config, _KNOWN, "quantization_config")
    bits, group = config.get("bits"), config.get("group_size", -1)
    if bits not in (4, 8):
        return problems or ["config field quantization_config.bits: must be 4 or 8, but is missing"]
    try:
        weights = WeightFormat(bits, group_of(group), asymmetric=config.get("sym", True) is False)
    except ValueError:
        return [*problems, f"config field quantization_config.group_size: must be 32, 64, 128 or -1, but got {group!r}"]
    return problems or Gptq(weights, 0 if config.get("checkpoint_format") == "gptq_v2" else 1)
