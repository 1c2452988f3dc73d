"""stretch_attention: the query heads of one KV head of 8 neighbouring seats, over the rows before the stretch and those in it.

A launch finds the rows before its stretch in the cache, written by earlier launches, and takes those of the stretch from `kv_buf`:
nothing that one task writes to the cache is read by another of the launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, U16
from amk.isa.attention import PARTIAL_HEAD
from amk.isa.batch import SEAT_BLOCK
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.rounding import round_to
from amk.isa.stretch import BY_HEAD, X_ORDERS, ordered


@dataclass(frozen=True, kw_only=True)
class StretchAttention(Instruction):
    """KV head `kv_head` of layer `layer` for seats [seat0, seat0 + 8); seat s is at position p + s, p that of the launch.

    `q_buf` and `kv_buf` are what seat_qkv publishes. Output goes to `out_buf` in order BY_HEAD. `window` is the sliding window in rows, 0
    for none. Seats at which no token is compute something that nobody uses.
    """

    q_buf: U16
    q_tag: U16
    kv_buf: U16
    kv_tag: U16
    out_buf: U16
    out_tag: U16
    layer: U16
    kv_head: U16
    seat0: U16
    batch: U16
    window: I32 = 0

    stem: ClassVar[str] = "stretch_attention"
    batched: ClassVar[bool] = True
    gated: ClassVar[bool] = True

    def reads(self, machine: Machine, position: int) -> list[Access]:
        q, kv = machine.heads * machine.head_dim * self.batch, 2 * machine.kv_heads * machine.padded_head_dim * self.batch
        return [
            Access(self.q_buf, 0, q // machine.narrow, self.q_tag, "narrow", gated=True, order="q"),
            Access(self.kv_buf, 0, kv // machine.narrow, self.kv_tag, "narrow", gated=True, order="kv"),
        ]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        size = machine.heads // machine.kv_heads * machine.head_dim * SEAT_BLOCK // machine.narrow
        start = (self.kv_head * (self.batch // SEAT_BLOCK) + self.seat0 // SEAT_BLOCK) * size
        return [Access(self.out_buf, start, start + size, self.out_tag, "narrow", gated=True, order=X_ORDERS[BY_HEAD])]

    def shared_bytes(self, machine: Machine) -> int:
        """q of the query heads as elements; of each consumer warp, for 8 seats of one head, maximum, sum and output as fp32."""
        q = machine.heads // machine.kv_heads * SEAT_BLOCK * machine.padded_head_dim * machine.element_bytes
        return q + 4 * machine.consumer_warps * SEAT_BLOCK * (machine.padded_head_dim + PARTIAL_HEAD)

    def run(self, memory: Memory, position: int) -> Publishes:
        machine = memory.machine
        group, dim, rows = machine.heads // machine.kv_heads, machine.head_dim, self.seat0 + SEAT_BLOCK
        read_q, read_kv = (memory.read(access) for access in self.reads(machine, position))
        q = read_q.reshape(self.batch, machine.kv_heads, group, dim)[self.seat0 : rows, self.kv_head]  # [8, group, dim]
        k, v = read_kv.reshape(self.batch, 2, machine.kv_heads, -1)[:rows, :, self.kv_head, :dim].transpose(1, 0, 2)
        first = max(0, position + self.seat0 - self.window + 1) if self.window else 0
        old = min(first, position)
        old_k, old_v = memory.kv_rows(self.layer, self.kv_head, old, position)
        age = (position + np.arange(self.seat0, rows))[:, None] - np.arange(old, position + rows)[None, :]
        visible = (age >= 0) & (age < (self.window or machine.context + rows))
        scores = np.einsum("sgd,rd->gsr", q, np.concatenate([old_k, k]))
        scores = np.where(visible, scores, np.float32(-np.inf))
        p = round_to(np.exp2(scores - scores.max(axis=2, keepdims=True)), machine.dtype)
        out = p @ np.concatenate([old_v, v]) / p.sum(axis=2, keepdims=True, dtype=np.float32)  # [group, 8, dim]
        columns = round_to(out.transpose(0, 2, 1).reshape(group * dim, SEAT_BLOCK), machine.dtype)
        return [(self.writes(machine, position)[0], ordered(columns, BY_HEAD, 1))]
