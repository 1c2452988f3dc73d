"""AMK's own quantiser: round to nearest, with the clipping that costs least for 4 bits; and what a quantised matrix means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amk.isa.weight_format import WeightFormat
from amk.schedule.model import QuantisedMatrix

if TYPE_CHECKING:
    import torch

MOST_FP8 = 448.0  # the largest number of E4M3
VERSION = 1  # counts what a format's name means; a change of any formula below must change it
# Shares of a group's range that 4-bit codes may span. 8-bit codes always span all of it: clipping costs more than it saves there.
CLIPS = tuple(round(1 - 0.05 * i, 2) for i in range(10))
_CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}  # bounds the temporaries


def dequantise(matrix: QuantisedMatrix) -> torch.Tensor:
    """fp32 [rows, columns]: (code - zero) * scale, or the number that the code is times the scale, which fp32 holds exactly."""
    import torch

    columns, group = matrix.codes.shape[1], matrix.weights.group or matrix.codes.shape[1]
    scales, zeros = (part.float().repeat_interleave(group, 1)[:, :columns] for part in (matrix.scales, matrix.zeros))
    if matrix.weights.floating:
        numbers: torch.Tensor = matrix.codes.view(torch.float8_e4m3fn).float() * scales
        return numbers
    values: torch.Tensor = (matrix.codes.float() - zeros) * scales
    return values


def quantise(weight: torch.Tensor, weights: WeightFormat) -> QuantisedMatrix:
    """The matrix [rows, columns] in a weight format, the same bits on every device: operations on single elements and in a fixed order."""
    import torch

    step = max(1, _CHUNK_ELEMENTS[weight.device.type] // weight.shape[1])
    parts = [_quantise_rows(weight[at : at + step], weights) for at in range(0, len(weight), step)]
    codes, scales, zeros = (torch.cat(part) for part in zip(*parts, strict=True))
    return QuantisedMatrix(weights, codes, scales, zeros)


def _quantise_rows(weight: torch.Tensor, weights: WeightFormat) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    import torch

    rows, columns = weight.shape
    group = weights.group or columns
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    if weights.floating:
        scales, numbers = _numbers(padded, weights)
        return numbers.view(rows, -1)[:, :columns].contiguous(), scales, torch.zeros_like(scales, dtype=torch.uint8)
    low, high = padded.amin(-1).clamp(max=0), padded.amax(-1).clamp(min=0)
    best: tuple[torch.Tensor, ...] = ()
    for clip in CLIPS if weights.bits == 4 else (1.0,):
        scales, zeros = _scales(low * clip, high * clip, weights)
        codes = _codes(padded, scales, zeros, weights)
        error = _sum(((codes - zeros[..., None]) * scales.float()[..., None] - padded).square())
        found = (error, codes, scales, zeros)
        best = tuple(_choose(error < best[0], new, old) for new, old in zip(found, best, strict=True)) if best else found
    _, codes, scales, zeros = best
    return codes.view(rows, -1)[:, :columns].to(torch.uint8), scales, zeros.to(torch.uint8)


def _numbers(groups: torch.Tensor, weights: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales, and codes [rows, groups, n]: a group's largest magnitude becomes the largest number of E4M3, the others the nearest ones."""
    import torch

    scales = (groups.abs().amax(-1) / MOST_FP8).to(_scale_dtype(weights))
    numbers = _divided(groups, scales.float()[..., None]).clamp(-MOST_FP8, MOST_FP8).to(torch.float8_e4m3fn)
    return scales, numbers.view(torch.uint8)


def _scale_dtype(weights: WeightFormat) -> torch.dtype:
    import torch

    return torch.float16 if weights.scale == "fp16" else torch.bfloat16


def _choose(better: torch.Tensor, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.where(better[..., None] if new.dim() > better.dim() else better, new, old)


def _scales(low: torch.Tensor, high: torch.Tensor, weights: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in their own dtype and zeros as fp32 such that codes span low to high."""
    import torch

    kind = _scale_dtype(weights)
    most = float((1 << weights.bits) - 1)
    if not weights.asymmetric:
        scales = torch.maximum(-low, high) / (weights.zero - 1)
        # There is one code more below the zero than above. Of four bits it goes to the side that reaches further: a scale may be negative.
        scales = torch.where(high > -low, -scales, scales) if weights.bits == 4 else scales
        return scales.to(kind), torch.full_like(low, weights.zero)
    scales = ((high - low) / most).to(kind)
    return scales, _divided(-low, scales.float()).round().clamp(0, most)


def _codes(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, weights: WeightFormat) -> torch.Tensor:
    # A symmetric 8-bit code never is 0: its range is as wide below the zero as above. Four bits are too few to give one away.
    least = 1 if weights.bits == 8 and not weights.asymmetric else 0
    return (_divided(values, scales.float()[..., None]).round() + zeros[..., None]).clamp(least, (1 << weights.bits) - 1)


def _divided(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """values / scales, and 0 where a scale is 0: of a group of zeros, or of values too small for its dtype."""
    import torch

    return torch.where(scales != 0, values / torch.where(scales != 0, scales, 1.0), 0.0)


def _sum(values: torch.Tensor) -> torch.Tensor:
    """Sums over the last axis by halves: sums in the library's own order differ from device to device."""
    import torch

    length = 1 << (values.shape[-1] - 1).bit_length()
    values = torch.nn.functional.pad(values, (0, length - values.shape[-1]))
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]
