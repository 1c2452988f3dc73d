"""Programs proven and kernels built ahead, in processes of their own: the card does not wait for the compiler."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

from amk.eval.candidate import Candidate, prepare
from amk.eval.card import Place
from amk.models.registry import describe
from amk.vm.build import compile_kernel
from amk.vm.source import kernel_source


@dataclass(frozen=True)
class Build:
    """A model's name, a config as JSON data, the KV rows, the macros of a test build (vm.source.TEST_MACROS), and how many tokens are
    computed side by side, as rows of their own or for prefill.
    """

    model: str
    config: dict[str, Any]
    context: int | None
    macros: tuple[tuple[str, int], ...] = ()
    batch: int = 1
    prefill: bool = False


def built(case: Build, place: Place) -> Candidate:
    """The candidate; its kernel is in the cache of cubins then. BuildFailed if it does not compile."""
    candidate = prepare(describe(case.model), place, case.config, case.context, batch=case.batch, prefill=case.prefill)
    if candidate.program is not None:
        compile_kernel(kernel_source(candidate.program.program, **dict(case.macros)), place.target.arch)
    return candidate


@contextmanager
def ahead(cases: Sequence[Build], place: Place) -> Iterator[list[Future[Candidate]]]:
    """Every case under way, in processes on all cores of this one but one; what nobody has waited for when the block ends is not begun."""
    # A fork would inherit the driver's state, which does not work in the child.
    pool = ProcessPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1), mp_context=get_context("spawn"))
    try:
        yield [pool.submit(built, case, place) for case in cases]
    finally:
        pool.shutdown(cancel_futures=True)
