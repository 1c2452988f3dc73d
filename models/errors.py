"""What can be wrong with a model, as values a caller turns into an exit code and one sentence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar


class ModelError(Exception):
    """A model cannot be used; `exit_code` is what a command ends with, `str(error)` the sentence it prints."""

    exit_code: ClassVar[int] = 3


class UnknownModel(ModelError):
    """The name is no built-in, no folder or file, and no HuggingFace id: a usage error."""

    exit_code: ClassVar[int] = 2


class BadToken(ModelError):
    """What was given as a HuggingFace access token cannot be one: a usage error. The sentence never holds any of it."""

    exit_code: ClassVar[int] = 2


class DamagedCheckpoint(ModelError):
    """Files of the checkpoint are truncated, unreadable or missing: an error of the environment."""


class Unavailable(ModelError):
    """The checkpoint could not be fetched, or a package needed to read it is absent: an error of the environment."""


class Unsupported(ModelError):
    """The checkpoint is sound, but the compiler would not compute what it means; `problems` lists every reason."""

    exit_code: ClassVar[int] = 1

    def __init__(self, name: str, problems: Iterable[str]) -> None:
        self.problems: tuple[str, ...] = tuple(problems)
        super().__init__(f"model {name} is not supported: " + "; ".join(self.problems))
