"""What the explorer and the trace checker find."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unsafe:
    """A program that can go wrong: `kind` is a name of docs/machine.md (deadlock, race, ring, coverage, bounds, kind, resources)."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"[{self.kind}] {self.text}"


class TooLarge(Exception):
    """The state space is larger than the explorer was allowed to visit."""
