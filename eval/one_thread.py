"""Small operations of torch on the CPU, in the calling thread alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_thread() -> Iterator[None]:
    """What runs within, or a function that this decorates, has torch's operations on the CPU in its own thread.

    A team of threads saves little on a vector of logits, and where several processes share the cores its threads spin for each other: of
    two processes on two cores each took 30 times as long as one alone.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
