"""Codes packed in the 32-bit words of quantised checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def unpacked(words: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """uint8 codes of int32 `words` [a, b]: each word gives 32 / bits neighbours along `axis`, the first from its lowest bits.

    `order` says instead which neighbour each place of a word holds, from the lowest bits.
    """
    import torch

    count = 32 // bits
    shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
    codes = ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).to(torch.uint8)  # an arithmetic shift: its copies of the sign are cut off
    if order is not None:
        codes = codes[..., torch.tensor(order, device=words.device).argsort()]
    if axis == 0:
        return codes.permute(0, 2, 1).reshape(words.shape[0] * count, words.shape[1])
    return codes.reshape(words.shape[0], words.shape[1] * count)
