"""Where the arena of a machine that is timed lies: in another place for each sample, and all that are compared in the same places.

A batch takes 2 to 5 % longer or shorter for the place of its arena alone, whose packets all SMs read. A program's own place is chance, so
no difference of two programs counts that one place makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from amk.eval.bench import launch_us
from amk.vm.cuda import UnprovenCudaVM

POOL_BYTES, STEP_BYTES = 64 << 20, 512  # torch's own tensors lie on multiples of 512


class Places:
    """A pool in which the arenas of some machines lie, one at a time."""

    def __init__(self, machines: Sequence[UnprovenCudaVM]) -> None:
        arenas = [machine.arena for machine in machines]
        largest = max(arena.nbytes for arena in arenas)
        self.pool = torch.zeros(POOL_BYTES + largest, dtype=torch.uint8, device=arenas[0].device)

    def sampler(self, machine: UnprovenCudaVM, span: tuple[int, int]) -> Callable[[], float]:
        """Microseconds a step of one launch of `span`, each time with the machine's arena in the next place: the same for every sampler."""
        size, places = machine.arena.nbytes, np.random.default_rng(0)

        def sample() -> float:
            at = int(places.integers(POOL_BYTES // STEP_BYTES)) * STEP_BYTES
            machine.move_arena(self.pool[at : at + size].view(machine.arena.dtype))
            return launch_us(machine, *span)

        return sample
