"""What a Python caller gave, as what it must be: UsageError in one sentence for anything else, before work is spent."""

from __future__ import annotations

import numbers
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from amk.eval.errors import UsageError
from amk.schedule.rejection import show


def whole(name: str, value: Any) -> int:
    """A whole number, numpy's too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise UsageError(f"{name}: must be a whole number, but got {show(value)}")
    return int(value)


def wholes(name: str, values: Any) -> list[int]:
    """Whole numbers, in any iterable but a text."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise UsageError(f"{name}: must be a list of whole numbers, but got {show(values)}")
    return [whole(name, value) for value in values]


def number(name: str, value: Any) -> float:
    """A number, numpy's too; a whole one stays whole."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name}: must be a number, but got {show(value)}")
    try:
        float(value)
    except OverflowError as problem:
        raise UsageError(f"{name}: must be a number that a float can hold, but got {show(value)}") from problem
    return value  # type: ignore[return-value]  # typeshed does not know that a Real compares with floats


def one_of(name: str, value: Any, allowed: tuple[int, ...]) -> int:
    """A whole number that is among these."""
    if (number := whole(name, value)) not in allowed:
        raise UsageError(f"{name}: must be one of {', '.join(map(str, allowed))}, but got {number}")
    return number


def text(name: str, value: Any) -> str:
    """A plain text, whatever class of texts it was of: a worker process may not know that."""
    if not isinstance(value, str):
        raise UsageError(f"{name}: must be a text, but got {show(value)}")
    return str.__str__(value)


def function(name: str, value: Any) -> Any:
    """Something that can be called, or None where nobody listens."""
    if value is not None and not callable(value):
        raise UsageError(f"{name}: must be a function, but got {show(value)}")
    return value


def path(name: str, value: Any) -> Path:
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str):
        raise UsageError(f"{name}: must be a path, but got {show(value)}")
    if not text:
        raise UsageError(f"{name}: must be a path, but got an empty text")
    if "\0" in text:
        raise UsageError(f"{name}: must be a path without zero bytes, but got {show(text)}")
    return Path(text)
