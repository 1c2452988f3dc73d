"""One AMK process on a card at a time: a lock file a card, which the operating system releases when its holder dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from amk.eval.card import live_card
from amk.eval.errors import EnvironmentProblem
from amk.models.cache import cache_root

LIMIT_S = 120.0  # longer than a worker stays warm without a request
POLL_S = 0.2

_held: set[Path] = set()  # by this process


@contextmanager
def card_lock(uuid: str, progress: Callable[[str], None], limit_s: float = LIMIT_S) -> Iterator[None]:
    """Excludes every other process of this user that holds the card with this UUID; who holds it already goes on.

    While another has it, `progress` is told which one. EnvironmentProblem if it still has it after `limit_s`.
    """
    path = cache_root() / "locks" / f"{uuid}.lock"
    if path in _held:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        _take(file, progress, limit_s)
        _held.add(path)
        yield
    finally:
        _held.discard(path)
        os.close(file)


def live_card_lock(progress: Callable[[str], None]) -> AbstractContextManager[None]:
    """`card_lock` of the live card, which must be there."""
    card = live_card()
    assert card is not None
    return card_lock(card.uuid, progress)


def _take(file: int, progress: Callable[[str], None], limit_s: float) -> None:
    """Locks the open file and writes our process id into it; tells of each holder that is in the way."""
    deadline, told = time.monotonic() + limit_s, ""
    while not _try(file):
        holder = os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
        if time.monotonic() >= deadline:
            still = f"the card must be free within {limit_s:.0f} s, but process {holder} of AMK still works on it"
            raise EnvironmentProblem(f"{still}; try again later")
        if holder != told:
            progress(f"waiting for the card, on which process {holder} of AMK works")
            told = holder
        time.sleep(POLL_S)
    os.ftruncate(file, 0)
    os.pwrite(file, f"{os.getpid()}\n".encode(), 0)


def _try(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
