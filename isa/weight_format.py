"""Weight formats: what a quantised code means, how many columns share a scale, and the flag bits that tell the device."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

FORMAT_BITS = {8: 4, 4: 8}  # flag bits that say how wide a code is; neither: elements of the machine's dtype
FLOATING = 4 | 8  # both: codes are floating-point numbers of 8 bits
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

    `floating`: a weight is the number of 8 bits that its code is (E4M3: a sign, four bits of exponent, three of mantissa, no infinity),
    times the scale of its row or group; the zero is 0.
    """

    bits: int
    group: int = 0
    asymmetric: bool = False
    scale: ScaleDType = "bf16"
    floating: bool = False

    @property
    def name(self) -> str:
        """As a user writes it: int4-g128-asym, fp8. The scale's dtype is the model's business."""
        group = f"-g{self.group}" if self.group else ""
        return f"{'fp' if self.floating else 'int'}{self.bits}{group}{'-asym' if self.asymmetric else ''}"

    @property
    def flags(self) -> int:
        """The format as bits of a matrix-vector task's flags."""
        asymmetric, fp16 = ASYMMETRIC * self.asymmetric, FP16_SCALE * (self.scale == "fp16")
        return (FLOATING if self.floating else FORMAT_BITS[self.bits]) | GROUP_CODE[self.group] | asymmetric | fp16

    @property
    def zero(self) -> int:
        """The code that means 0 in a symmetric format."""
        return 0 if self.floating else 1 << (self.bits - 1)

    def groups(self, columns: int) -> int:
        """Scales of a row of `columns`."""
        return -(-columns // self.group) if self.group else 1

    def matrix_bytes(self, rows: int, columns: int) -> int:
        """Bytes that a matrix holds: codes, scales and zeros, no padding."""
        zero_bits = self.bits if self.asymmetric else 0
        return (rows * columns * self.bits + rows * self.groups(columns) * (8 * SCALE_BYTES + zero_bits) + 7) // 8


FP8, FP8_GROUPS = WeightFormat(8, floating=True), WeightFormat(8, 128, floating=True)
_INTEGERS = [WeightFormat(bits, group, asym) for bits in (8, 4) for group in GROUP_CODE for asym in (False, True)]
FORMATS = {form.name: form for form in (*_INTEGERS, FP8, FP8_GROUPS)}


@cache
def _formats_by_flags() -> dict[int, WeightFormat | None]:
    scales: tuple[ScaleDType, ...] = ("bf16", "fp16")
    known = [replace(form, scale=scale) for form in FORMATS.values() for scale in scales]
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
