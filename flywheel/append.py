"""Files of one line a fact that many processes append to: a lock, whole lines, on the disk before the call returns."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

BLOCK_BYTES = 1 << 16


def lock_of(path: Path) -> Path:
    """The file beside `path` that is locked in its place, since `path` itself may be replaced."""
    return path.with_name(f".{path.name}.lock")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Excludes every other process and thread that locks `path`; the folder is made if need be.

    A killed holder releases the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = os.open(lock_of(path), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)


def append(path: Path, text: str, is_whole: Callable[[str], bool]) -> None:
    """Adds lines (`text` ends in a newline) under the caller's lock, all or none of them.

    A last line without a newline is ended if `is_whole`, and otherwise removed, as what a killed writer left: the caller has made sure
    that it is no line of somebody else's.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        size = _mend(file, is_whole)
        try:
            _write(file, text.encode(), size)
        except OSError:
            os.ftruncate(file, size)
            raise
        os.fsync(file)
    finally:
        os.close(file)
    if size == 0:
        sync_folder(path.parent)


def replace(path: Path, text: str) -> None:
    """Puts `text` in the place of the file, under the caller's lock: readers see the old or the new, never a part.

    Anything else that stood there is kept beside it as NAME.before-TIME.
    """
    data = text.encode()
    before = path.read_bytes() if path.exists() else data
    if before != data:
        _put(path.with_name(f"{path.name}.before-{time.time_ns()}"), before)
    _put(path, data)


def _put(path: Path, data: bytes) -> None:
    """A file with this in it; on the disk when this returns, and never there in part."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.part")
    with unfinished.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes new names in the folder survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def lines(path: Path, is_whole: Callable[[str], bool]) -> list[str]:
    """The lines of the file, none if there is no file; a last one without a newline counts if it `is_whole`."""
    return lines_and_rest(path, is_whole)[0]


def lines_and_rest(path: Path, is_whole: Callable[[str], bool]) -> tuple[list[str], str]:
    """The same, and what a last line without a newline has that is not whole: what `append` would remove."""
    try:
        *ended, last = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], ""
    found, tail = [line.decode(errors="replace") for line in ended], last.decode(errors="replace")
    return ([*found, tail], "") if tail and is_whole(tail) else (found, tail)


def _mend(file: int, is_whole: Callable[[str], bool]) -> int:
    """Ends or removes a last line that has no newline; the size of the file then, in bytes."""
    size = os.fstat(file).st_size
    start = _start_of_tail(file, size)
    if start == size:
        return size
    if is_whole(os.pread(file, size - start, start).decode(errors="replace")):
        _write(file, b"\n", size)
        return size + 1
    os.ftruncate(file, start)
    return start


def _start_of_tail(file: int, size: int) -> int:
    """Where the part after the last newline begins."""
    end = size
    while end > 0:
        start = max(0, end - BLOCK_BYTES)
        found = os.pread(file, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _write(file: int, data: bytes, at: int) -> None:
    while data:
        done = os.pwrite(file, data, at)
        data, at = data[done:], at + done
