"""The machine that a program runs on: sizes that instructions, the validator and the device code all read from one place."""

from __future__ import annotations

from dataclasses import dataclass

from amk.isa.weight_format import SCALE_BYTES, ZERO_BYTES, WeightFormat

TILE_ROWS = 16  # rows of a weight tile: the M of mma.m16n8k16
FRAGMENT_BYTES = 512  # one A fragment of a warp: 32 lanes of 16 bytes
KV_BLOCK_ROWS = 16  # KV rows that are stored together, and the unit in which old rows are streamed
KV_TAIL_BLOCKS = 2  # the newest blocks, which the tail task reads itself and nobody streams
KV_STREAM_LAG = 17  # a streamed row is at least this many tokens old (see Machine.kv_lag)
ELEMENT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Machine:
    """One block a SM with four kinds of actor; all sizes are compile-time constants of the binary.

    Actors of a SM: one feeder, `consumer_warps` consumer warps, one storer, one watcher. The ring has `stages` slots of
    `stage_bytes`; at most `inflight` of them are being copied at any time, and where `watermark` is not 0, at most `throttled`
    while so many or more are not free. `reduction_slots` tiles may be reduced ahead of the storer. Before the feeder streams KV
    rows of token t it waits for the end of token t - `kv_lag` on every SM.
    Where `slot` is not 0 a ring slot has so many bytes: of a stretch `stage_bytes` only says how the weights lie.
    `head_dim` and the rest describe the model as the attention and the norm see it; `tags` is the number of tags a token uses.
    `batch` tokens are computed side by side, each in its own seat (isa/batch.py): of as many sequences, or, where it does `prefill`,
    consecutive positions of one: a stretch.
    """

    sms: int
    consumer_warps: int
    stages: int
    stage_bytes: int
    inflight: int
    reduction_slots: int
    kv_lag: int
    dtype: str
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_eps: float
    context: int
    tags: int
    qk_norm: bool = False
    batch: int = 1
    prefill: bool = False
    slot: int = 0
    throttled: int = 0
    watermark: int = 0

    @property
    def slot_bytes(self) -> int:
        """Bytes of a ring slot."""
        return self.slot or self.stage_bytes

    @property
    def sequences(self) -> int:
        """Sequences with KV rows of their own."""
        return 1 if self.prefill else self.batch

    @property
    def element_bytes(self) -> int:
        return ELEMENT_BYTES[self.dtype]

    @property
    def fragment_columns(self) -> int:
        """K columns that one fragment of 16 rows holds: 16 for 16-bit weights, 8 for fp32."""
        return FRAGMENT_BYTES // TILE_ROWS // self.element_bytes

    @property
    def narrow(self) -> int:
        """Elements in one packet of a narrow buffer: two 16-bit elements, or one fp32."""
        return 4 // self.element_bytes

    @property
    def padded_head_dim(self) -> int:
        return self.head_dim + -self.head_dim % 16

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of KV_BLOCK_ROWS rows of K and of V of one KV head."""
        return 2 * KV_BLOCK_ROWS * self.padded_head_dim * self.element_bytes

    @property
    def kv_blocks_per_chunk(self) -> int:
        return self.stage_bytes // self.kv_block_bytes


@dataclass(frozen=True)
class Piece:
    """What a tile of 16 rows is cut into along K, and given to one warp whole: `columns` of it in `bytes` of the stream.

    Elements: one fragment. Quantised weights: the fragments of `columns` columns, then the scales of their groups (of each group
    16, rows r and r + 8 next to each other), then as many zeros if the format has them. Where a scale serves a whole row,
    scales and zeros come once a chunk instead, in the `tail` bytes at its end.
    """

    columns: int
    bytes: int
    tail: int = 0


def piece_of(machine: Machine, weights: WeightFormat | None) -> Piece:
    """The piece of a matrix in a weight format, None for elements of the machine's dtype."""
    return quantised_piece(weights) if weights else Piece(machine.fragment_columns, FRAGMENT_BYTES)


def quantised_piece(weights: WeightFormat) -> Piece:
    """The piece of a quantised matrix, on any machine. Its scales and zeros are less than a fragment."""
    fragment = 8 * FRAGMENT_BYTES // TILE_ROWS // weights.bits
    scales = TILE_ROWS * (SCALE_BYTES + (ZERO_BYTES if weights.asymmetric else 0))
    if not weights.group:
        return Piece(fragment, FRAGMENT_BYTES, scales)
    columns = max(weights.group, fragment)
    return Piece(columns, columns // fragment * FRAGMENT_BYTES + columns // weights.group * scales)


@dataclass(frozen=True)
class ChunkPlan:
    """How one tile of 16 rows by `columns` is cut into ring chunks and shared among the consumer warps.

    Warp w owns `high` pieces if w < `high_warps`, else `low`; every chunk but the last gives each warp `per_chunk`
    pieces, the last gives it what is left. Piece f of warp w is K piece `first(w) + f` of the row.
    """

    columns: int
    warps: int
    low: int
    high: int
    high_warps: int
    per_chunk: int
    chunks: int
    piece: Piece

    def pieces(self, warp: int) -> int:
        return self.high if warp < self.high_warps else self.low

    def first(self, warp: int) -> int:
        return warp * self.low + min(warp, self.high_warps)

    def columns_of(self, warp: int) -> slice:
        """The columns of x that a warp reads; those past the last are padding."""
        start = self.first(warp) * self.piece.columns
        stop = start + self.pieces(warp) * self.piece.columns
        return slice(min(start, self.columns), min(stop, self.columns))

    def pieces_in_chunk(self, chunk: int, warp: int) -> int:
        return min(self.per_chunk, self.pieces(warp) - chunk * self.per_chunk)

    def chunk_bytes(self, chunk: int) -> int:
        return self.piece.bytes * sum(self.pieces_in_chunk(chunk, w) for w in range(self.warps)) + self.piece.tail

    @property
    def tile_pieces(self) -> int:
        return self.low * self.warps + self.high_warps

    @property
    def tile_bytes(self) -> int:
        return self.piece.bytes * self.tile_pieces + self.piece.tail * self.chunks

    def chunk_order(self, chunk: int) -> list[int]:
        """K piece indices in the order in which a chunk's bytes lie in the stream: by warp, then piece."""
        at = chunk * self.per_chunk
        return [self.first(w) + at + f for w in range(self.warps) for f in range(self.pieces_in_chunk(chunk, w))]

    def stream_order(self) -> list[int]:
        """K piece indices in the order in which a tile's bytes lie in the stream, chunk after chunk."""
        return [piece for chunk in range(self.chunks) for piece in self.chunk_order(chunk)]


def chunk_plan(machine: Machine, columns: int, weights: WeightFormat | None = None) -> ChunkPlan:
    """The plan for a matrix of `columns` columns; ValueError if a stage cannot hold one piece a warp."""
    piece = piece_of(machine, weights)
    low, high_warps = divmod(-(-columns // piece.columns), machine.consumer_warps)
    high = low + (1 if high_warps else 0)
    need = piece.bytes * machine.consumer_warps
    fit = (machine.stage_bytes - piece.tail) // need
    if fit < 1:
        raise ValueError(f"stage_bytes: must hold one piece a consumer warp ({need + piece.tail} bytes), but got {machine.stage_bytes}")
    per_chunk = -(-high // -(-high // fit))
    return ChunkPlan(columns, machine.consumer_warps, low, high, high_warps, per_chunk, -(-high // per_chunk), piece)


@dataclass(frozen=True)
class KvSpan:
    """What an attention task touches in the KV cache when its query is at one position.

    Streamed blocks are [first, old); the tail reads blocks [old, newest] up to the query's own row; `units` is the number of
    streamed pieces of `unit_rows` rows, dealt to the splits in turn: split s streams units s, s + splits, ...
    """

    first: int
    old: int
    newest: int
    units: int
    active_splits: int


def kv_span(position: int, window: int, unit_rows: int, splits: int) -> KvSpan:
    """The span at `position` (0-based row of the query) with a sliding window of `window` rows (0 = none)."""
    newest = position // KV_BLOCK_ROWS
    old = max(0, newest - (KV_TAIL_BLOCKS - 1))
    first = min(old, max(0, position - window + 1) // KV_BLOCK_ROWS) if window else 0
    units = -(-(old - first) * KV_BLOCK_ROWS // unit_rows)
    return KvSpan(first, old, newest, units, max(1, min(splits, units)))


def split_blocks(span: KvSpan, split: int, unit_rows: int, splits: int) -> list[tuple[int, int]]:
    """Block ranges [start, stop) that `split` streams, one a unit, in order."""
    per_unit = unit_rows // KV_BLOCK_ROWS
    starts = (span.first + unit * per_unit for unit in range(split, span.units, splits))
    return [(start, min(start + per_unit, span.old)) for start in starts]
