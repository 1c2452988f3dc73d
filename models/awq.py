"""AWQ checkpoints (the "gemm" layout of AutoAWQ): 4-bit codes packed along the output rows in an interleaved order, always with zeros."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amk.isa.weight_format import WeightFormat
from amk.models.packed_codes import unpacked
from amk.models.stored_matrix import SCALES, Part, Scheme, config_problems, group_of
from amk.schedule.model import QuantisedMatrix

if TYPE_CHECKING:
    import torch

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the neighbour that each nibble of a word holds, from the lowest
_KNOWN: dict[str, tuple[Any, ...] | None] = {
    "quant_method": ("awq",), "bits": (4,), "w_bit": (4,), "group_size": None, "q_group_size": None, "zero_point": (True,),
    "version": ("gemm", "GEMM"), "backend": ("autoawq", "gptqmodel", "auto"), "do_fuse": None, "fuse_max_seq_len": None,
    "modules_to_fuse": None, "modules_to_not_convert": None, "exllama_config": None, "meta": None,
}  # fmt: skip


@dataclass(frozen=True)
class Awq(Scheme):
    """qweight int32 [columns, rows / 8], qzeros int32 [groups, rows / 8], scales [groups, rows]; weight = (code - zero) * scale."""

    @property
    def scales(self) -> str:
        return "scales"

    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        groups = self.weights.groups(columns)
        return (
            Part("qweight", ("I32",), (columns, rows // 8)),
            Part("qzeros", ("I32",), (groups, rows // 8)),
            Part("scales", SCALES, (groups, rows)),
        )

    def read(self, name: str, parts: Mapping[str, torch.Tensor], weights: WeightFormat) -> QuantisedMatrix:
        codes, zeros = (unpacked(parts[part], 4, 1, ORDER).T.contiguous() for part in ("qweight", "qzeros"))
        return QuantisedMatrix(weights, codes, parts["scales"].T.contiguous(), zeros)


def awq_scheme(config: Mapping[str, Any]) -> Awq | list[str]:
    """The scheme of a config's quantization_config, or what is not understood about it."""
    problems = config_problems(config, _KNOWN, "quantization_config")
    group = config.get("group_size", config.get("q_group_size", 128))
    try:
        weights = WeightFormat(4, group_of(group), asymmetric=True)
    except ValueError:
        return [*problems, f"config field quantization_config.group_size: must be 32, 64, 128 or -1, but got {group!r}"]
    return problems or Awq(weights)
