"""Folders in the user's cache that exist complete or not at all, whoever is interrupted and however many build at once."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root(cache_dir: Path | None = None) -> Path:
    """Where AMK keeps what it fetches and converts: `cache_dir`, else $AMK_CACHE, else ~/.cache/automegakernel."""
    return Path(cache_dir or os.environ.get("AMK_CACHE") or Path.home() / ".cache" / "automegakernel")


def published(target: Path, make: Callable[[Path], None]) -> Path:
    """The folder `target`, made by `make(empty folder)` unless it is there already.

    The folder is made beside its place, flushed to disk and renamed, so a kill at any instant leaves nothing that a
    later run would use. One process builds while others wait and then find it; leftovers of killed runs are removed.
    """
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(target.name + ".lock")):
        if not target.is_dir():
            _build(target, make)
    return target


def _build(target: Path, make: Callable[[Path], None]) -> None:
    for leftover in target.parent.glob(f"{target.name}.partial-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        make(partial)
        _flush(partial)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    _flush_directory(target.parent)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """An exclusive lock that the kernel releases when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _flush_directory(folder)


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
