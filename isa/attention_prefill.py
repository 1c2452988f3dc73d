"""attention_prefill: one query head of 8 neighbouring seats of a stretch, over the rows before the stretch and those in it.

Seats are consecutive positions of one sequence. A launch finds the rows before its stretch in the cache, written by earlier launches, and
takes those of the stretch from the k and v packets: nothing that one task writes to the cache is read by another of the launch.
Of the query heads of a KV head, the first one's tasks append the rows of their own seats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.attention import LOG2E, PARTIAL_HEAD
from amk.isa.batch import SEAT_BLOCK
from amk.isa.instruction import F32, Access, Instruction, Memory, Publishes
from amk.isa.machine import KV_BLOCK_ROWS, Machine
from amk.isa.rounding import round_to


@dataclass(frozen=True, kw_only=True)
class AttentionPrefill(Instruction):
    """Query head `head` of seats [seat0, seat0 + 8); the seat of position p + s is s, p the position of the launch.

    The head's q of seat s lies at packet `s q_stride + head head_dim` of `q_buf`; k and v rows of its KV head at `s kv_stride + k_start`
    of `k_buf` and `+ v_start` of `v_buf`. Output goes by seat to `out_buf`. `window` is the sliding window in rows, 0 for none. `q_gain`
    and `k_gain` are constants offsets of the head norms, -1 for none. Seats at which no token is compute something that nobody uses.
    """

    q_buf: U16
    q_tag: U16
    k_buf: U16
    k_tag: U16
    v_buf: U16
    v_tag: U16
    out_buf: U16
    out_tag: U16
    layer: U16
    head: U16
    seat0: U16
    batch: U16
    q_stride: I32
    kv_stride: I32
    k_start: I32
    v_start: I32
    window: I32 = 0
    q_gain: I32 = -1
    k_gain: I32 = -1

    stem: ClassVar[str] = "attention_prefill"
    batched: ClassVar[bool] = True

    def kv_head(self, machine: Machine) -> int:
        return self.head * machine.kv_heads // machine.heads

    def appends(self, machine: Machine) -> bool:
        """Whether its seats' KV rows go to the cache by this task."""
        return self.head % (machine.heads // machine.kv_heads) == 0

    def _seats(self) -> range:
        return range(self.seat0, self.seat0 + SEAT_BLOCK)

    def _new_rows(self, buffer: int, start: int, tag: int, machine: Machine) -> list[Access]:
        """The k or v rows of the stretch that the task's seats see: those up to its last seat."""
        first = [seat * self.kv_stride + start for seat in range(self.seat0 + SEAT_BLOCK)]
        return [Access(buffer, at, at + machine.head_dim, tag, "f32") for at in first]

    def reads(self, machine: Machine, position: int) -> list[Access]:
        dim = machine.head_dim
        q = [seat * self.q_stride + self.head * dim for seat in self._seats()]
        return [
            *(Access(self.q_buf, at, at + dim, self.q_tag, "f32") for at in q),
            *self._new_rows(self.k_buf, self.k_start, self.k_tag, machine),
            *self._new_rows(self.v_buf, self.v_start, self.v_tag, machine),
        ]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        packets = machine.head_dim // machine.narrow
        first = [(seat * machine.heads + self.head) * packets for seat in self._seats()]
        return [Access(self.out_buf, at, at + packets, self.out_tag, "narrow") for at in first]

    def shared_bytes(self, machine: Machine) -> int:
        """q and the stretch's KV blocks as elements, and of each consumer warp one partial a seat."""
        dim, blocks = machine.padded_head_dim, -(-self.batch // KV_BLOCK_ROWS)
        rows = SEAT_BLOCK + 2 * KV_BLOCK_ROWS * blocks
        return rows * dim * machine.element_bytes + 4 * machine.consumer_warps * SEAT_BLOCK * (dim + PARTIAL_HEAD)

    def run(self, memory: Memory, position: int) -> Publishes:
        machine, reads = memory.machine, self.reads(memory.machine, position)
        rows = self.seat0 + SEAT_BLOCK
        places = [min(position + seat, machine.context - 1) for seat in range(rows)]
        loaded = [memory.read(access) for access in reads]
        q, k, v = np.stack(loaded[:SEAT_BLOCK]), np.stack(loaded[SEAT_BLOCK : SEAT_BLOCK + rows]), np.stack(loaded[SEAT_BLOCK + rows :])
        q = round_to(self._rotated(memory, q, self.q_gain, places[self.seat0 :]) * np.float32(LOG2E / machine.head_dim**0.5), machine.dtype)
        k, v = round_to(self._rotated(memory, k, self.k_gain, places), machine.dtype), round_to(v, machine.dtype)
        self._append(memory, k, v, position)
        first = max(0, position + self.seat0 - self.window + 1) if self.window else 0
        old = min(first, position)
        old_k, old_v = memory.kv_rows(self.layer, self.kv_head(machine), old, position)
        row = np.arange(old, position + rows)
        age = (position + np.arange(self.seat0, rows))[:, None] - row[None, :]
        visible = (age >= 0) & (age < (self.window or machine.context + rows))
        scores = np.where(visible, q @ np.concatenate([old_k, k]).T, np.float32(-np.inf))
        p = round_to(np.exp2(scores - scores.max(axis=1, keepdims=True)), machine.dtype)
        out = round_to(p @ np.concatenate([old_v, v]) / p.sum(axis=1, keepdims=True, dtype=np.float32), machine.dtype)
        return list(zip(self.writes(machine, position), out, strict=True))

    def _rotated(self, memory: Memory, rows: F32, gain: int, places: list[int]) -> F32:
        """Head norm (if `gain` >= 0) and RoPE of rows [rows, head_dim] at their positions."""
        dim = memory.machine.head_dim
        if gain >= 0:
            scale = 1.0 / np.sqrt((rows * rows).mean(axis=1, keepdims=True) + np.float32(memory.machine.rms_eps))
            rows = (rows * scale * memory.constant(gain, dim)).astype(np.float32)
        angles = np.stack([memory.rope(place) for place in places])
        cos, sin = angles[..., 0], angles[..., 1]
        low, high = rows[:, : dim // 2], rows[:, dim // 2 :]
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=1).astype(np.float32)

    def _append(self, memory: Memory, k: F32, v: F32, position: int) -> None:
        if not self.appends(memory.machine):
            return
        for seat in range(self.seat0, min(self.seat0 + SEAT_BLOCK, memory.active())):
            memory.write_kv(self.layer, self.kv_head(memory.machine), position + seat, k[seat], v[seat])
