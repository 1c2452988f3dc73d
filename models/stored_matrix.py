"""What the readers of quantised checkpoints share: the tensors that a matrix is stored as, and the scheme that reads them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amk.isa.weight_format import GROUP_CODE, WeightFormat
from amk.models.errors import Unsupported
from amk.schedule.model import QuantisedMatrix

if TYPE_CHECKING:
    import torch

SCALES = ("F16", "BF16")


@dataclass(frozen=True)
class Part:
    """One tensor of a quantised matrix: `name` follows the module's, `dtypes` are those of safetensors that it may have, any for none."""

    name: str
    dtypes: tuple[str, ...]
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class Scheme(ABC):
    """How a checkpoint stores its quantised matrices. `weights` is their format; the dtype of its scales is known from the tensors."""

    weights: WeightFormat

    @abstractmethod
    def parts(self, rows: int, columns: int) -> tuple[Part, ...]:
        """The tensors of a matrix [rows, columns]; the one named by `scales` holds the scales."""

    @property
    @abstractmethod
    def scales(self) -> str: ...

    @abstractmethod
    def read(self, name: str, parts: Mapping[str, torch.Tensor], weights: WeightFormat) -> QuantisedMatrix:
        """The matrix from its tensors by the names of their parts; `Unsupported` if they say what the format cannot, naming `name`."""


def config_problems(config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...] | None], where: str) -> list[str]:
    """One sentence for each field that is not known or has a value at which it means something else; None allows every value."""
    problems = []
    for field, value in config.items():
        if field not in known:
            problems.append(f"config field {where}.{field} = {value!r:.60} is not understood")
            continue
        allowed = known[field]
        if allowed is not None and not any(type(value) is type(a) and value == a for a in allowed):
            problems.append(f"config field {where}.{field}: must be {' or '.join(map(repr, allowed))}, but got {value!r:.60}")
    return problems


def group_of(value: Any) -> int:
    """Our group size for a stated one: -1 and null are the whole row. ValueError for one that no format has."""
    group = 0 if value in (-1, None) else value
    if type(group) is not int or group not in GROUP_CODE or value == 0:
        raise ValueError
    return group


def require_whole_groups(name: str, order: torch.Tensor | None, weights: WeightFormat) -> None:
    """A matrix whose columns were put into groups in another order than their own is not supported."""
    import torch

    if order is None:
        return
    columns = torch.arange(len(order), device=order.device)
    if not torch.equal(order.long(), columns // weights.group if weights.group else columns * 0):
        raise Unsupported(name, ["g_idx: groups must be neighbouring columns (act-order, desc_act with permuted groups, is not supported)"])


def number_codes(name: str, stored: torch.Tensor) -> torch.Tensor:
    """The codes of E4M3 weights; `Unsupported`, naming the matrix, if one is no number."""
    import torch

    codes = stored.view(torch.uint8)
    if bool((codes & 127 == 127).any()):
        raise Unsupported(name, ["weight: every element must be a number, but some are NaN"])
    return codes


def same_zeros(scales: torch.Tensor, weights: WeightFormat) -> torch.Tensor:
    """The zeros of a symmetric format."""
    import torch

    return torch.full(scales.shape, weights.zero, dtype=torch.uint8, device=scales.device)
