"""Arenas of machines that are compared: each sample in another place, and all in the same ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amk.dev import places
from amk.dev.places import STEP_BYTES, Places


class Machine:
    """Where its arena lay when it was launched."""

    def __init__(self, packets: int) -> None:
        self.arena = torch.zeros(packets, dtype=torch.int64)
        self.lay: list[int] = []

    def move_arena(self, to: torch.Tensor) -> None:
        assert to.dtype == self.arena.dtype and to.shape == self.arena.shape
        self.arena = to


def test_every_sample_is_in_another_place_and_all_machines_in_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch_us(machine: Any, start: int, steps: int) -> float:
        machine.lay.append(machine.arena.data_ptr())
        return float(start + steps)

    monkeypatch.setattr(places, "launch_us", launch_us)
    machines: Any = [Machine(100), Machine(100_000), Machine(7)]
    pool = Places(machines)
    samplers = [pool.sampler(machine, (3, 4)) for machine in machines]
    assert [[sample() for sample in samplers] for _ in range(20)] == [[7.0] * 3] * 20
    first, *others = (machine.lay for machine in machines)
    assert len(set(first)) == 20 and all(lay == first for lay in others)
    assert all((at - pool.pool.data_ptr()) % STEP_BYTES == 0 for at in first)
