"""What can go wrong around a judgement, as values a caller turns into an exit code and one sentence."""

from __future__ import annotations

from typing import ClassVar


class EvalError(Exception):
    """A request cannot be carried out; `exit_code` is what a command ends with, `str(error)` the sentence it prints."""

    exit_code: ClassVar[int] = 3


class UsageError(EvalError):
    """What the caller asked for makes no sense: an unknown GPU, a prompt longer than the context, a budget below 1."""

    exit_code: ClassVar[int] = 2


class Rejected(EvalError):
    """The config was refused where only its program's output was asked for; the sentence has every reason."""

    exit_code: ClassVar[int] = 1


class EnvironmentProblem(EvalError):
    """The machine cannot do it: no card, another card than asked for, a failed build, a missing package."""


class RunVoid(EnvironmentProblem):
    """A measurement was refused: another process is on the card, or the card reads slower than it must."""
