"""KV rows in the blocks of 16 that the device streams: K as fragments of the score product, V as fragments of the output product."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amk.isa.machine import KV_BLOCK_ROWS, Machine

if TYPE_CHECKING:
    import torch


def pack_rows(machine: Machine, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Blocks uint8 [heads, blocks, kv_block_bytes] of K and V rows [heads, n, head_dim]; rows and dims beyond are zero.

    16-bit: of a 16x16 piece, lane (g, t) holds K rows g and g + 8 at dims 4t..4t+3, and V dims g and g + 8 at rows 2t, 2t+1, 2t+8, 2t+9
    (isa/device/attention_rows.cuh, k_index and v_index). fp32: plain rows.
    """
    import torch

    heads, n, dim = keys.shape
    blocks = -(-n // KV_BLOCK_ROWS)
    dtype = element_dtype(machine)

    def padded(rows: torch.Tensor) -> torch.Tensor:
        full = rows.new_zeros((heads, blocks * KV_BLOCK_ROWS, machine.padded_head_dim), dtype=dtype)
        full[:, :n, :dim] = rows.to(dtype)
        return full.view(heads, blocks, KV_BLOCK_ROWS, machine.padded_head_dim)

    halves = [padded(keys), padded(values)]
    if machine.dtype != "fp32":
        halves = [_k_fragments(halves[0]), _v_fragments(halves[1])]
    return torch.cat([half.reshape(heads, blocks, -1) for half in halves], dim=2).view(torch.uint8)


def unpack_rows(machine: Machine, packed: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows 0..n-1 of K and V [heads, n, head_dim], in the dtype that is stored, from the blocks of `pack_rows`."""
    heads, blocks = packed.shape[:2]
    halves = packed.contiguous().view(element_dtype(machine)).view(heads, blocks, 2, KV_BLOCK_ROWS, machine.padded_head_dim)
    keys, values = halves[:, :, 0], halves[:, :, 1]
    if machine.dtype != "fp32":
        keys, values = _k_rows(keys), _v_rows(values)
    rows = (part.reshape(heads, blocks * KV_BLOCK_ROWS, machine.padded_head_dim) for part in (keys, values))
    k, v = (part[:, :n, : machine.head_dim] for part in rows)
    return k, v


def element_dtype(machine: Machine) -> torch.dtype:
    """The torch dtype of the machine's elements: the embedding, KV rows and weights that are not quantised."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[machine.dtype]


def _k_fragments(k: torch.Tensor) -> torch.Tensor:
    """[h, b, 16 rows, d] to [h, b, d / 16, g, t, pair, row half, 2]."""
    h, b, _, d = k.shape
    pieces = k.reshape(h, b, 2, 8, d // 16, 4, 2, 2)  # h b hi g | piece t pair e
    return pieces.permute(0, 1, 4, 3, 5, 6, 2, 7).contiguous()


def _v_fragments(v: torch.Tensor) -> torch.Tensor:
    """[h, b, 16 rows, d] to [h, b, d / 16, g (dim), t (row), row half, dim half, 2 rows]."""
    h, b, _, d = v.shape
    pieces = v.reshape(h, b, 2, 4, 2, d // 16, 2, 8)  # h b rowhalf t e | piece dimhalf g
    return pieces.permute(0, 1, 5, 7, 3, 2, 6, 4).contiguous()


def _k_rows(k: torch.Tensor) -> torch.Tensor:
    """The inverse of `_k_fragments`: [h, b, 16 rows, d]."""
    h, b, _, d = k.shape
    pieces = k.reshape(h, b, d // 16, 8, 4, 2, 2, 2)  # h b piece g t pair hi e
    return pieces.permute(0, 1, 6, 3, 2, 4, 5, 7).reshape(h, b, 16, d)


def _v_rows(v: torch.Tensor) -> torch.Tensor:
    """The inverse of `_v_fragments`: [h, b, 16 rows, d]."""
    h, b, _, d = v.shape
    pieces = v.reshape(h, b, d // 16, 8, 4, 2, 2, 2)  # h b piece g t rowhalf dimhalf e
    return pieces.permute(0, 1, 5, 4, 7, 2, 6, 3).reshape(h, b, 16, d)
