"""seat_qkv: a seat's q, k and v: shares added, head norms, RoPE, rounded; k and v also appended to the KV cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, NONE, U16
from amk.isa.attention import LOG2E, rotate_heads
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.rounding import round_to
from amk.isa.seat_norm import share_sums
from amk.isa.stretch import GROUP_ROWS


@dataclass(frozen=True, kw_only=True)
class SeatQkv(Instruction):
    """Seat `seat`, at position p + seat, p that of the launch. `sums_buf` holds the shares of rows q, k, v of layer `layer`.

    q, scaled by log2(e) / sqrt(head_dim), goes to `q_buf` [batch, heads head_dim], k and v to `kv_buf` [batch, 2 kv_heads padded head_dim];
    `q_buf` is NONE where nobody wants them, in the last layer. Row p + seat of the cache gets k and v where a token is at the seat.
    `q_gain` and `k_gain` are constants offsets of the head norms, `bias` of a bias of all rows, -1 for none.
    """

    sums_buf: U16
    sums_tag: U16
    q_buf: U16 = NONE
    q_tag: U16 = 0
    kv_buf: U16 = NONE
    kv_tag: U16 = 0
    shares: U16
    layer: U16
    seat: U16
    batch: U16
    bias: I32 = -1
    q_gain: I32 = -1
    k_gain: I32 = -1

    stem: ClassVar[str] = "seat_qkv"
    batched: ClassVar[bool] = True
    gated: ClassVar[bool] = True

    def rows(self, machine: Machine) -> int:
        return (machine.heads + 2 * machine.kv_heads) * machine.head_dim

    def reads(self, machine: Machine, position: int) -> list[Access]:
        groups = -(-self.rows(machine) // GROUP_ROWS)
        packets = self.shares * groups * GROUP_ROWS * self.batch
        return [Access(self.sums_buf, 0, packets, self.sums_tag, "f32", gated=True, order="sums")]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        if self.q_buf == NONE:
            return []
        q, kv = machine.heads * machine.head_dim // machine.narrow, 2 * machine.kv_heads * machine.padded_head_dim // machine.narrow
        return [
            Access(self.q_buf, self.seat * q, (self.seat + 1) * q, self.q_tag, "narrow", gated=True, order="q"),
            Access(self.kv_buf, self.seat * kv, (self.seat + 1) * kv, self.kv_tag, "narrow", gated=True, order="kv"),
        ]

    def shared_bytes(self, machine: Machine) -> int:
        """The seat's rows as fp32."""
        return 4 * self.rows(machine)

    def run(self, memory: Memory, position: int) -> Publishes:
        machine = memory.machine
        sums = memory.read(self.reads(machine, position)[0])
        rows = share_sums(sums, self.shares, self.batch, self.seat, self.rows(machine))
        if self.bias >= 0:
            rows = rows + memory.constant(self.bias, len(rows))
        heads = rows.reshape(-1, machine.head_dim)
        place = min(position + self.seat, machine.context - 1)
        q = rotate_heads(memory, heads[: machine.heads], self.q_gain, place) * np.float32(LOG2E / machine.head_dim**0.5)
        k = rotate_heads(memory, heads[machine.heads : machine.heads + machine.kv_heads], self.k_gain, place)
        q, k, v = (round_to(part, machine.dtype) for part in (q, k, heads[machine.heads + machine.kv_heads :]))
        if self.seat < memory.active():
            for head in range(machine.kv_heads):
                memory.write_kv(self.layer, head, position + self.seat, k[head], v[head])
        kv = np.pad(np.concatenate([k, v]), ((0, 0), (0, machine.padded_head_dim - machine.head_dim)))
        return list(zip(self.writes(machine, position), (q.ravel(), kv.ravel()), strict=False))
