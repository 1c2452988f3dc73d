"""seat_norm: a seat's residual stream (its token's embedding, or what it was and a product's shares) and its norm as x of a product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from amk.isa.abi import I32, NONE, U16
from amk.isa.instruction import F32, Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.rounding import round_to
from amk.isa.stretch import BY_SEAT, GROUP_ROWS, X_ORDERS, padded


def share_sums(sums: F32, shares: int, batch: int, seat: int, rows: int) -> F32:
    """Rows of one seat of what stretch_sums publishes ([shares, groups, batch, 128]), shares added in order."""
    parts = sums.reshape(shares, -1, batch, GROUP_ROWS)[:, :, seat].reshape(shares, -1)[:, :rows]
    total: F32 = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


@dataclass(frozen=True, kw_only=True)
class SeatNorm(Instruction):
    """h = residual + shares + bias of seat `seat`, published to `h_buf` [batch, hidden]; h gain / sqrt(mean(h^2) + eps), rounded, to
    `x_buf` in order BY_SEAT. Without residual (`res_buf` NONE) h is the embedding of the seat's token and there are no shares.
    """

    sums_buf: U16 = NONE
    sums_tag: U16 = 0
    res_buf: U16 = NONE
    res_tag: U16 = 0
    h_buf: U16
    h_tag: U16
    x_buf: U16
    x_tag: U16
    shares: U16 = 0
    seat: U16
    batch: U16
    gain: I32
    bias: I32 = -1

    stem: ClassVar[str] = "seat_norm"
    batched: ClassVar[bool] = True
    gated: ClassVar[bool] = True

    def _row(self, buffer: int, tag: int, machine: Machine) -> Access:
        return Access(buffer, self.seat * machine.hidden, (self.seat + 1) * machine.hidden, tag, "f32", gated=True)

    def reads(self, machine: Machine, position: int) -> list[Access]:
        if self.res_buf == NONE:
            return []
        groups = -(-machine.hidden // GROUP_ROWS)
        packets = self.shares * groups * GROUP_ROWS * self.batch
        sums = Access(self.sums_buf, 0, packets, self.sums_tag, "f32", gated=True, order="sums")
        return [self._row(self.res_buf, self.res_tag, machine), sums]

    def writes(self, machine: Machine, position: int) -> list[Access]:
        packets = padded(machine.hidden) // machine.narrow
        first, stop = self.seat * packets, (self.seat + 1) * packets
        x = Access(self.x_buf, first, stop, self.x_tag, "narrow", gated=True, order=X_ORDERS[BY_SEAT])
        return [self._row(self.h_buf, self.h_tag, machine), x]

    def shared_bytes(self, machine: Machine) -> int:
        """A sum of squares a consumer warp."""
        return 4 * machine.consumer_warps

    def run(self, memory: Memory, position: int) -> Publishes:
        machine = memory.machine
        if self.res_buf == NONE:
            h = memory.embedding(memory.forced_token(self.seat) or 0)
        else:
            residual, sums = (memory.read(access) for access in self.reads(machine, position))
            h = residual + share_sums(sums, self.shares, self.batch, self.seat, machine.hidden)
        if self.bias >= 0:
            h = h + memory.constant(self.bias, machine.hidden)
        scale = np.float32(1.0 / (float((h * h).mean()) + machine.rms_eps) ** 0.5)
        x = round_to(h * scale * memory.constant(self.gain, machine.hidden), machine.dtype)
        pad = np.zeros(padded(machine.hidden) - machine.hidden, dtype=np.float32)
        return list(zip(self.writes(machine, position), (h.astype(np.float32), np.concatenate([x, pad])), strict=True))
