"""attention: one KV head's query group over its share of the KV cache (split-KV, online softmax, the tail task merges).

Split 0 is the tail: it normalises and rotates the new K row, appends K and V to the cache, attends to the newest blocks, merges the
other active splits' partial results in split order and publishes the group's output. It also streams a share of old blocks like
every other split. Rows older than the tail come through the weight stream. Flash-decoding (Dao et al. 2023) in base 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.instruction import F32, Access, Instruction, Memory, Publishes
from amk.isa.machine import KV_BLOCK_ROWS, KvSpan, Machine, kv_span, split_blocks
from amk.isa.rounding import round_to, two_part

LOG2E = float(np.log2(np.e))
MAX_GROUP = 8  # query heads of one task: the N of mma.m16n8k16
TWO_PART_GROUP = MAX_GROUP // 2  # up to this many heads, q and probabilities go in as a rounded part and its error
PARTIAL_HEAD = 2  # packets before a partial's values: running maximum (base 2) and sum


def rotate_heads(memory: Memory, heads: F32, gain: int, position: int) -> F32:
    """Head norm (if `gain`, a constants offset, is not negative) and RoPE on [heads, head_dim] at a position."""
    dim = memory.machine.head_dim
    if gain >= 0:
        scale = 1.0 / np.sqrt((heads * heads).mean(axis=1, keepdims=True) + np.float32(memory.machine.rms_eps))
        heads = (heads * scale * memory.constant(gain, dim)).astype(np.float32)
    cos, sin = memory.rope(position).T
    low, high = heads[:, : dim // 2], heads[:, dim // 2 :]
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=1).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class Attention(Instruction):
    """Query heads [q0, q0 + nq) against KV head `kv_head` of `layer`.

    q of head h lies at packet h * head_dim of `q_buf`; the new k and v rows of the KV head at `k_start` of `k_buf`, `v_start` of
    `v_buf`. `unit_rows` rows are dealt to the `splits` in turn (isa.machine.kv_span). `window` is the sliding window in rows, 0 for
    none. `q_gain` and `k_gain` are constants offsets of the head norms, -1 for none. Partials of split s > 0 lie in `part_buf`.
    """

    q_buf: U16
    q_tag: U16
    k_buf: U16
    k_tag: U16
    v_buf: U16
    v_tag: U16
    part_buf: U16
    part_tag: U16
    out_buf: U16
    out_tag: U16
    layer: U16
    q0: U16
    nq: U16
    kv_head: U16
    split: U16
    splits: U16
    unit_rows: U16
    k_start: I32
    v_start: I32
    window: I32 = 0
    q_gain: I32 = -1
    k_gain: I32 = -1

    stem: ClassVar[str] = "attention"
    streamed: ClassVar[bool] = True
    polls: ClassVar[bool] = True

    def span(self, position: int) -> KvSpan:
        return kv_span(position, self.window, self.unit_rows, self.splits)

    def active(self, position: int) -> bool:
        return self.split < self.span(position).active_splits

    def _partials(self, machine: Machine, first: int, stop: int) -> Access:
        """Partials of splits [first, stop), both at least 1."""
        size = self.nq * (machine.head_dim + PARTIAL_HEAD)
        base = self.q0 * (self.splits - 1) * (machine.head_dim + PARTIAL_HEAD)
        return Access(self.part_buf, base + (first - 1) * size, base + (stop - 1) * size, self.part_tag, "f32", paired=True)

    def _q(self, machine: Machine) -> Access:
        dim = machine.head_dim
        return Access(self.q_buf, self.q0 * dim, (self.q0 + self.nq) * dim, self.q_tag, "f32")

    def reads(self, machine: Machine, position: int) -> list[Access]:
        if not self.active(position):
            return []
        if self.split > 0:
            return [self._q(machine)]
        dim, active = machine.head_dim, self.span(position).active_splits
        new_rows = [
            Access(self.k_buf, self.k_start, self.k_start + dim, self.k_tag, "f32"),
            Access(self.v_buf, self.v_start, self.v_start + dim, self.v_tag, "f32"),
        ]
        partials = [self._partials(machine, 1, active)] if active > 1 else []
        return [self._q(machine), *new_rows, *partials]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        if not self.active(position):
            return []
        if self.split > 0:
            return [self._partials(machine, self.split, self.split + 1)]
        dim = machine.head_dim // machine.narrow
        return [Access(self.out_buf, self.q0 * dim, (self.q0 + self.nq) * dim, self.out_tag, "narrow")]

    def streamed_blocks(self, position: int) -> list[tuple[int, int]]:
        """Ranges [start, stop) of KV blocks that the task streams, in order."""
        return split_blocks(self.span(position), self.split, self.unit_rows, self.splits)

    def chunk_bytes(self, machine: Machine, position: int) -> list[int]:
        per_chunk = machine.kv_blocks_per_chunk
        return [
            min(per_chunk, stop - at) * machine.kv_block_bytes
            for start, stop in self.streamed_blocks(position)
            for at in range(start, stop, per_chunk)
        ]

    def shared_bytes(self, machine: Machine) -> int:
        """q, the new k and v as fp32, and one partial a consumer warp and one for the new row."""
        rows = (self.nq + 2) * machine.padded_head_dim
        partials = (machine.consumer_warps + 1) * self.nq * (machine.padded_head_dim + PARTIAL_HEAD)
        return 4 * (rows + partials)

    def run(self, memory: Memory, position: int) -> Publishes:
        machine = memory.machine
        if not self.active(position):
            return []
        reads = self.reads(machine, position)
        q = self._query(memory, memory.read(reads[0]), position)
        window_start = max(0, position - self.window + 1) if self.window else 0
        ranges = [(a * KV_BLOCK_ROWS, b * KV_BLOCK_ROWS) for a, b in self.streamed_blocks(position)]
        if self.split == 0:
            self._append(memory, memory.read(reads[1]), memory.read(reads[2]), position)
            ranges.append((self.span(position).old * KV_BLOCK_ROWS, position + 1))
        ranges = [(max(a, window_start), b) for a, b in ranges if b > window_start]
        m, total, o = self._attend(memory, q, ranges)
        access = self.writes(machine, position)[0]
        if self.split > 0:
            return [(access, np.concatenate([m, total, o], axis=1).ravel())]
        if len(reads) > 3:
            m, total, o = self._merge(machine, (m, total, o), memory.read(reads[3]))
        return [(access, round_to(o / total, machine.dtype).ravel())]

    def _query(self, memory: Memory, q: F32, position: int) -> F32:
        heads = rotate_heads(memory, q.reshape(self.nq, -1), self.q_gain, position)
        return self._operand(heads * np.float32(LOG2E / memory.machine.head_dim**0.5), memory.machine.dtype)

    def _operand(self, values: F32, dtype: str) -> F32:
        """q and the probabilities as the products take them: in two parts where the 8 columns hold each head twice."""
        return two_part(values, dtype) if self.nq <= TWO_PART_GROUP else round_to(values, dtype)

    def _append(self, memory: Memory, k: F32, v: F32, position: int) -> None:
        dtype = memory.machine.dtype
        row = rotate_heads(memory, k.reshape(1, -1), self.k_gain, position)
        memory.write_kv(self.layer, self.kv_head, position, round_to(row[0], dtype), round_to(v, dtype))

    def _attend(self, memory: Memory, q: F32, ranges: list[tuple[int, int]]) -> tuple[F32, F32, F32]:
        """Running maximum [nq, 1], sum [nq, 1] and unnormalised output [nq, head_dim] over row ranges."""
        rows = [memory.kv_rows(self.layer, self.kv_head, a, b) for a, b in ranges]
        k = np.concatenate([k for k, _ in rows])
        v = np.concatenate([v for _, v in rows])
        scores = q @ k.T
        m = scores.max(axis=1, keepdims=True)
        p = self._operand(np.exp2(scores - m), memory.machine.dtype)
        return m, p.sum(axis=1, keepdims=True, dtype=np.float32), p @ v

    def _merge(self, machine: Machine, own: tuple[F32, F32, F32], partials: F32) -> tuple[F32, F32, F32]:
        parts = partials.reshape(-1, self.nq, machine.head_dim + PARTIAL_HEAD)
        for part in parts:
            m = np.maximum(own[0], part[:, :1])
            a, b = np.exp2(own[0] - m), np.exp2(part[:, :1] - m)
            own = (m, own[1] * a + part[:, 1:2] * b, own[2] * a + part[:, PARTIAL_HEAD:] * b)
        return own
