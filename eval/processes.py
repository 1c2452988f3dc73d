"""Child processes that load what they need of ours, and never run the script that called us again."""

from __future__ import annotations

import sys
from multiprocessing.context import SpawnContext, SpawnProcess
from threading import Lock
from types import ModuleType

_STARTING = Lock()


class _OwnProcess(SpawnProcess):
    """A spawned process that is not told of its parent's main module.

    Otherwise it would begin by running that: a script without a `__main__` guard would call us again, and so on.
    """

    def start(self) -> None:
        with _STARTING:
            main = sys.modules["__main__"]
            sys.modules["__main__"] = ModuleType("__main__")
            try:
                super().start()
            finally:
                sys.modules["__main__"] = main


class _OwnContext(SpawnContext):
    Process = _OwnProcess


def own_context() -> SpawnContext:
    """Of processes whose targets and arguments are all importable, none of the main module."""
    return _OwnContext()
