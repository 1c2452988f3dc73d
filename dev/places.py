"""Where the arena of a machine that is timed lies: in another place for each sample, and all that are compared in the same places.

A batch takes 2 to 5 % longer or shorter for the place of its arena alone, whose packets all SMs read. A program's own place is chance, so
no difference of two programs counts that one place makes.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import numpy as np
import torch

from amk.eval.bench import SAMPLES, WARM_UP, launch_us
from amk.vm.cuda import UnprovenCudaVM

POOL_BYTES, STEP_BYTES = 64 << 20, 512  # torch's own tensors lie on multiples of 512


class Places:
    """Offsets into a pool, in the order in which samples are taken, warm-up among them."""

    def __init__(self, largest_bytes: int) -> None:
        """For arenas of up to so many bytes."""
        self.pool = torch.zeros(POOL_BYTES + largest_bytes, dtype=torch.uint8, device="cuda")
        self.offsets = [int(n) * STEP_BYTES for n in np.random.default_rng(0).integers(0, POOL_BYTES // STEP_BYTES, WARM_UP + SAMPLES)]

    def sampler(self, machine: UnprovenCudaVM, span: tuple[int, int]) -> Callable[[], float]:
        """Microseconds a step of one launch of `span`, each time with the machine's arena in the next place."""
        size, offsets = machine.arena.nbytes, cycle(self.offsets)

        def sample() -> float:
            at = next(offsets)
            machine.move_arena(self.pool[at : at + size].view(machine.arena.dtype))
            return launch_us(machine, *span)

        return sample
