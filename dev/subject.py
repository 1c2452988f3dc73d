"""What knobs are measured on: a model, as one sequence or as several side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, order=True)
class Subject:
    """A model's name and the sequences of a step."""

    model: str
    batch: int = 1

    def __str__(self) -> str:
        """As it is named in tables and asked for."""
        return self.model if self.batch == 1 else f"{self.model} x{self.batch}"


def subject_of(row: Mapping[str, Any]) -> Subject:
    """What a line of results is about; one that says nothing of a batch is about one sequence."""
    return Subject(row["model"], row.get("batch", 1))
