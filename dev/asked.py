"""What a measuring command was asked for, refused in one sentence before a card or minutes of work are taken."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from amk.eval.errors import UsageError
from amk.eval.writable import require_writable_file
from amk.models.errors import ModelError
from amk.models.registry import describe


def chosen(parser: argparse.ArgumentParser, option: str, text: str, allowed: Sequence[str]) -> list[str]:
    """The names that were asked for, in the order of `allowed`; ends the process where one is unknown."""
    asked = text.split(",")
    if unknown := [name for name in asked if name not in allowed]:
        parser.error(f"--{option}: must be some of {', '.join(allowed)}, but got {unknown[0]!r}")
    return [name for name in allowed if name in asked]


def numbers(parser: argparse.ArgumentParser, option: str, text: str, allowed: Sequence[int]) -> list[int]:
    """The same of whole numbers."""
    return [int(name) for name in chosen(parser, option, text, list(map(str, allowed)))]


def at_least(parser: argparse.ArgumentParser, option: str, value: float, least: float) -> None:
    """Ends the process unless `value` is a number that is not below `least`."""
    if not least <= value < float("inf"):
        parser.error(f"--{option}: must be at least {least}, but got {value}")


def below(parser: argparse.ArgumentParser, option: str, value: int, least: int, limit: int, why: str) -> None:
    """Ends the process unless least <= value < limit; `why` says what sets the limit."""
    if not least <= value < limit:
        parser.error(f"--{option}: must be from {least} to {limit - 1} ({why}), but got {value}")


def known_model(parser: argparse.ArgumentParser, option: str, name: str) -> None:
    """Ends the process unless `name` is a model that can be used."""
    try:
        describe(name)
    except ModelError as problem:
        parser.error(f"--{option}: {problem}")


def writable(parser: argparse.ArgumentParser, out: Path | None, option: str = "out") -> None:
    """Ends the process unless the results file that an option names, if it names one, can be written."""
    if out is None:
        return
    try:
        require_writable_file(out, f"--{option}")
    except UsageError as problem:
        parser.error(str(problem))


def share_of(text: str) -> tuple[int, int]:
    """ "K/N" as K and N. ValueError where K is not from 1 to N."""
    number, _, count = text.partition("/")
    numbers = [int(part) for part in (number, count) if re.fullmatch("[0-9]{1,6}", part)]
    if len(numbers) < 2 or not 1 <= numbers[0] <= numbers[1]:
        raise ValueError(f"must be K/N with K from 1 to N, but got {text!r}")
    return numbers[0], numbers[1]
