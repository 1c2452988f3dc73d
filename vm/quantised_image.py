"""Quantised matrices as the bytes that the ring streams: codes in fragment order, scales and zeros beside them; and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, ChunkPlan
from amk.isa.weight_format import WeightFormat
from amk.schedule.model import QuantisedMatrix

if TYPE_CHECKING:
    import torch

Order: TypeAlias = "Callable[[torch.Tensor, int], torch.Tensor]"


def part_of(matrix: QuantisedMatrix, rows: slice) -> QuantisedMatrix:
    """Rows of a matrix."""
    return QuantisedMatrix(matrix.weights, matrix.codes[rows], matrix.scales[rows], matrix.zeros[rows])


def pack_quantised(matrix: QuantisedMatrix, plan: ChunkPlan) -> torch.Tensor:
    """uint8 [tiles, tile_bytes] of a matrix on its device, in the order in which the ring streams a tile.

    Pieces and their scales lie as isa.machine.Piece says. Codes are signed: each less half of their range, as a zero beside a scale is.
    A fragment is 512 bytes, four words for each lane; with g = lane >> 2 and t = lane & 3 the words hold, of 16 rows by 32 columns
    (int8), row g, columns 8t to 8t + 3; row g + 8, the same; row g, columns 8t + 4 to 8t + 7; row g + 8, the same. The bytes of a word
    are its columns in order. Of 16 rows by 64 columns (int4) they hold row g, columns 8t to 8t + 7; row g + 8, the same; both again 32
    columns on. The lower nibbles of a word are the first four of its columns, the upper ones the last four; a zero is an upper nibble.
    Of 16 rows by 32 columns (fp8) they hold row g, columns 4t to 4t + 3; row g + 8, the same; both again 16 columns on. Rows and columns
    beyond the matrix have codes and scales of zero.
    """
    import torch

    form, piece = matrix.weights, plan.piece
    codes = _padded(matrix.codes, plan.tile_pieces * piece.columns)
    tiles = codes.shape[0] // TILE_ROWS
    bytes_of, _ = _orders(form)
    fragments = bytes_of(codes, tiles).reshape(tiles, plan.tile_pieces, -1)
    chunks = []
    if form.group:
        pieces = torch.cat([fragments, *_beside(matrix, plan, tiles)], dim=2)
        chunks = [pieces[:, plan.chunk_order(c)].reshape(tiles, -1) for c in range(plan.chunks)]
    else:
        tail = torch.cat(_beside(matrix, plan, tiles), dim=2).reshape(tiles, -1)
        chunks = [part for c in range(plan.chunks) for part in (fragments[:, plan.chunk_order(c)].reshape(tiles, -1), tail)]
    return torch.cat(chunks, dim=1)


def unpack_quantised(packed: torch.Tensor, plan: ChunkPlan, weights: WeightFormat, rows: int) -> QuantisedMatrix:
    """The matrix of `rows` by plan.columns that `pack_quantised` made `packed` from."""
    import torch

    tiles, tail, at = packed.shape[0], plan.piece.tail, 0
    chunks, ends = [], []
    for chunk in range(plan.chunks):
        size = plan.chunk_bytes(chunk)
        chunks.append(packed[:, at : at + size - tail].reshape(tiles, -1, plan.piece.bytes))
        ends.append(packed[:, at + size - tail : at + size])
        at += size
    pieces = torch.cat(chunks, dim=1)[:, torch.tensor(plan.stream_order(), device=packed.device).argsort()]
    size = plan.piece.bytes // FRAGMENT_BYTES * FRAGMENT_BYTES
    _, codes_of = _orders(weights)
    codes = codes_of(pieces[:, :, :size], tiles)
    beside = pieces[:, :, size:] if weights.group else ends[0].reshape(tiles, 1, -1)
    scales, zeros = _apart(beside, weights)
    zeros = zeros if weights.asymmetric else torch.full(scales.shape, weights.zero, dtype=torch.uint8, device=packed.device)
    groups = weights.groups(plan.columns)
    return QuantisedMatrix(weights, codes[:rows, : plan.columns], scales[:rows, :groups], zeros[:rows, :groups])


def _padded(rows: torch.Tensor, columns: int) -> torch.Tensor:
    """`rows` with zeros to the right and below, up to `columns` and whole tiles."""
    import torch

    return torch.nn.functional.pad(rows, (0, columns - rows.shape[1], 0, -rows.shape[0] % TILE_ROWS))


def _int8_fragments(codes: torch.Tensor, tiles: int) -> torch.Tensor:
    """Axes [tile, row half, g, fragment, t, word pair, byte] to [tile, fragment, g, t, word pair, row half, byte]."""
    return codes.view(tiles, 2, 8, -1, 4, 2, 4).permute(0, 3, 2, 4, 5, 1, 6) ^ 0x80


def _int8_codes(fragments: torch.Tensor, tiles: int) -> torch.Tensor:
    return fragments.reshape(tiles, -1, 8, 4, 2, 2, 4).permute(0, 5, 2, 1, 3, 4, 6).reshape(tiles * TILE_ROWS, -1) ^ 0x80


def _int4_fragments(codes: torch.Tensor, tiles: int) -> torch.Tensor:
    """Axes [tile, row half, g, fragment, word pair, t, nibble, byte] to [tile, fragment, g, t, word pair, row half, two nibbles]."""
    nibbles = codes.view(tiles, 2, 8, -1, 2, 4, 2, 4).permute(0, 3, 2, 5, 4, 1, 7, 6)
    return (nibbles[..., 0] | nibbles[..., 1] << 4) ^ 0x88


def _int4_codes(fragments: torch.Tensor, tiles: int) -> torch.Tensor:
    import torch

    pairs = fragments.reshape(tiles, -1, 8, 4, 2, 2, 4) ^ 0x88
    nibbles = torch.stack([pairs & 15, pairs >> 4], dim=-1)
    return nibbles.permute(0, 5, 2, 1, 4, 3, 7, 6).reshape(tiles * TILE_ROWS, -1)


def _fp8_fragments(codes: torch.Tensor, tiles: int) -> torch.Tensor:
    """Axes [tile, row half, g, fragment, word pair, t, byte] to [tile, fragment, g, t, word pair, row half, byte]."""
    return codes.view(tiles, 2, 8, -1, 2, 4, 4).permute(0, 3, 2, 5, 4, 1, 6)


def _fp8_codes(fragments: torch.Tensor, tiles: int) -> torch.Tensor:
    return fragments.reshape(tiles, -1, 8, 4, 2, 2, 4).permute(0, 5, 2, 1, 4, 3, 6).reshape(tiles * TILE_ROWS, -1)


def _orders(weights: WeightFormat) -> tuple[Order, Order]:
    """What puts codes [rows, columns] of so many tiles into the order of fragments, and what puts them back."""
    if weights.floating:
        return _fp8_fragments, _fp8_codes
    return (_int8_fragments, _int8_codes) if weights.bits == 8 else (_int4_fragments, _int4_codes)


def _zero_bytes(zeros: torch.Tensor, weights: WeightFormat) -> torch.Tensor:
    return (zeros ^ weights.zero) << (8 - weights.bits)


def _zero_codes(zeros: torch.Tensor, weights: WeightFormat) -> torch.Tensor:
    return zeros >> (8 - weights.bits) ^ weights.zero


def _beside(matrix: QuantisedMatrix, plan: ChunkPlan, tiles: int) -> list[torch.Tensor]:
    """Bytes [tiles, pieces, n] of the scales, and of the zeros if the format has them; one piece where a scale serves a row."""
    pieces = plan.tile_pieces if matrix.weights.group else 1
    parts = [matrix.scales, *([_zero_bytes(matrix.zeros, matrix.weights)] if matrix.weights.asymmetric else [])]
    return [_by_piece(part, pieces, matrix.weights, plan, tiles) for part in parts]


def _by_piece(values: torch.Tensor, pieces: int, weights: WeightFormat, plan: ChunkPlan, tiles: int) -> torch.Tensor:
    import torch

    groups = plan.piece.columns // weights.group if weights.group else 1
    padded = _padded(values, pieces * groups)
    lanes = padded.view(tiles, 2, 8, pieces, groups).permute(0, 3, 4, 2, 1)
    return lanes.reshape(tiles, pieces, -1).contiguous().view(torch.uint8)


def _apart(beside: torch.Tensor, weights: WeightFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and zeros [rows, groups] from the bytes [tiles, pieces, n] beside the codes."""
    import torch

    tiles, pieces = beside.shape[:2]
    scale_bytes = beside.shape[2] * 2 // 3 if weights.asymmetric else beside.shape[2]
    scales = beside[:, :, :scale_bytes].contiguous().view(torch.float16 if weights.scale == "fp16" else torch.bfloat16)
    found = []
    for values in (scales, beside[:, :, scale_bytes:]):
        rows = values.reshape(tiles, pieces, -1, 8, 2).permute(0, 4, 3, 1, 2)
        found.append(rows.reshape(tiles * TILE_ROWS, -1))
    return found[0], _zero_codes(found[1], weights)
