"""A measuring command's work on the live card: what goes wrong is one sentence and an exit code, never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

from amk.dev.judged import NotCorrect
from amk.eval.card import live_card
from amk.eval.card_lock import live_card_lock
from amk.eval.errors import EvalError
from amk.models.errors import ModelError
from amk.vm.build import BuildFailed
from amk.vm.interface import LaunchFailed

PROBLEMS = (EvalError, ModelError, NotCorrect, LaunchFailed, BuildFailed)


def require_card(command: str) -> None:
    """Ends the process with exit code 3 where there is no card."""
    if live_card() is None:
        print(f"{command}: needs an NVIDIA card and its driver, but none was found", file=sys.stderr)
        sys.exit(3)


@contextmanager
def on_card(command: str, lock: bool = True, also: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """The block's work, under the card's lock unless its own processes take that.

    One of PROBLEMS, or of the errors that are named `also`, ends the process with its sentence and exit code.
    """
    expected: tuple[type[Exception], ...] = (*PROBLEMS, *also)
    try:
        with live_card_lock(partial(print, flush=True)) if lock else nullcontext():
            yield
    except expected as problem:
        print(f"{command}: {problem}", file=sys.stderr)
        sys.exit(getattr(problem, "exit_code", 1))
