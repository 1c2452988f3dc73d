"""Whether files can be written where somebody wants them, found out by doing it, before any work is spent."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from amk.eval.errors import UsageError

LONGEST_NAME_BYTES = 200  # 255 is usual; lock files and unfinished copies beside a file have longer names than it


def require_writable_folder(folder: Path, option: str) -> None:
    """UsageError that names `option` unless files can be made in `folder`. It may not exist yet, and nothing is left behind."""
    try:
        there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), Path())
        # Elsewhere than under its own name, so that checks at the same time do not meet.
        with tempfile.TemporaryDirectory(prefix=".amk-", dir=there) as probe:
            (Path(probe) / folder.relative_to(there)).mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as problem:
        raise UsageError(f"{option}: must be a folder to write into, but {folder} is not: {_reason(problem)}") from problem


def require_writable_file(path: Path, option: str) -> None:
    """UsageError that names `option` unless `path` can be written. Neither it nor its folder need exist, and none is made."""
    _require_file(path, option, "a file to write")


def require_appendable_file(path: Path, option: str) -> None:
    """The same for lines that are added to `path`."""
    _require_file(path, option, "a file to add lines to")


def _require_file(path: Path, option: str, what: str) -> None:
    require_writable_folder(path.parent, option)
    try:
        problem = _problem(path)
    except (OSError, ValueError) as error:
        problem = _reason(error)
    if problem:
        raise UsageError(f"{option}: must be {what}, but {path} is not: {problem}")


def _problem(path: Path) -> str:
    if not _is_there(path):
        return "its name is too long" if len(os.fsencode(path.name)) > LONGEST_NAME_BYTES else ""
    if not stat.S_ISREG(path.stat().st_mode):
        return "it is no regular file"
    os.close(os.open(path, os.O_RDWR))
    return ""


def _is_there(path: Path) -> bool:
    """As os.path.lexists, which hides what is wrong with a name that no file can have."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    return True


def _reason(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or str(problem)
