"""ValidProgram: a program that `validate` has proven. What runs programs takes only these."""

from __future__ import annotations

from dataclasses import dataclass, field

from amk.schedule.program import Program

_SEAL = object()


@dataclass(frozen=True)
class ValidProgram:
    """A proven program. Only `amk.schedule.validate.validate` makes one; TypeError for anybody else."""

    program: Program
    _seal: object = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        if self._seal is not _SEAL:
            raise TypeError("ValidProgram: only amk.schedule.validate.validate makes one; call it on the program")


def proven(program: Program) -> ValidProgram:
    """For `validate` alone: seals a program that it has proven."""
    return ValidProgram(program, _SEAL)
