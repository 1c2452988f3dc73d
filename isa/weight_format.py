"""Weight formats: what a quantised code means, how many columns share a scale, and the flag bits that tell the device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

FORMAT_BITS = {8: 4, 4: 8}  # flag bits that say how wide a code is; neither: elements of the machine's dtype
ASYMMETRIC = 16  # each group has a zero of its own
FP16_SCALE = 32  # scales are fp16, not bf16
GROUP_CODE = {0: 0, 32: 64, 64: 128, 128: 192}  # flag bits that say how many columns share a scale; 0: the whole row
FORMAT_FLAGS = 4 | 8 | ASYMMETRIC | FP16_SCALE | 192
SCALE_BYTES = 2
ZERO_BYTES = 1  # in the stream; the codes of a stored zero need `bits` bits

ScaleDType = Literal["bf16", "fp16"]


@dataclass(frozen=True)
class WeightFormat:
    """A weight is (code - zero) * scale. Codes are integers from 0 of `bits` bits (8 or 4).

    One scale serves `group` neighbouring columns of a row (32, 64 or 128; the last group may be shorter), or the whole row where
    `group` is 0. The zero is 2^(bits - 1) everywhere, or where `asymmetric` a code of its own beside each scale.
    """

    bits: int
    group: int = 0
    asymmetric: bool = False
    scale: ScaleDType = "bf16"

    @property
    def name(self) -> str:
        """As a user writes it: int4-g128-asym. The scale's dtype is the model's business."""
        group = f"-g{self.group}" if self.group else ""
        return f"int{self.bits}{group}{'-asym' if self.asymmetric else ''}"

    @property
    def flags(self) -> int:
        """The format as bits of a matrix-vector task's flags."""
        asymmetric, fp16 = ASYMMETRIC * self.asymmetric, FP16_SCALE * (self.scale == "fp16")
        return FORMAT_BITS[self.bits] | GROUP_CODE[self.group] | asymmetric | fp16

    @property
    def zero(self) -> int:
        """The code that means 0 in a symmetric format."""
        return 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Scales of a row of `columns`."""
        return -(-columns // self.group) if self.group else 1

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes that a matrix holds: codes, scales and zeros, no padding."""
        zero_bits = self.bits if self.asymmetric else 0
        return (rows * columns * self.bits + rows * self.groups(columns) * (8 * SCALE_BYTES + zero_bits) + 7) // 8


FORMATS = {f.name: f for bits in (8, 4) for group in GROUP_CODE for asym in (False, True) for f in [WeightFormat(bits, group, asym)]}


@cache
def _formats_by_flags() -> dict[int, WeightFormat | None]:
    scales: tuple[ScaleDType, ...] = ("bf16", "fp16")
    known: list[WeightFormat] = [WeightFormat(f.bits, f.group, f.asymmetric, scale) for f in FORMATS.values() for scale in scales]
    return {0: None} | {f.flags: f for f in known}


@cache
def known_formats() -> frozenset[WeightFormat]:
    """Every format with either kind of scale."""
    return frozenset(f for f in _formats_by_flags().values() if f)


def format_known(flags: int) -> bool:
    """Whether the format bits of a task's flags name a format."""
    return flags & FORMAT_FLAGS in _formats_by_flags()


def format_of(flags: int) -> WeightFormat | None:
    """The weight format of a task by its flags, None for elements of the machine's dtype; ValueError if there is no such format."""
    if not format_known(flags):
        raise ValueError(f"flags: must name a weight format, but their bits {flags & FORMAT_FLAGS:#x} do not")
    return _formats_by_flags()[flags & FORMAT_FLAGS]
