"""What the proof found wrong: rejections that name tasks and regions, collected with a cap for each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeAlias

from amk.schedule.program import TaskId

Kind: TypeAlias = Literal["deadlock", "ring", "race", "coverage", "bounds", "kind", "resources", "handler"]


class Region(NamedTuple):
    """Packets [start, stop) of a buffer, or rows of a matrix or of a KV cache, by its name."""

    name: str
    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class Rejection:
    """One reason why a program is not proven: `message` is one sentence that begins with `[kind]` and names `tasks` and `regions`."""

    kind: Kind
    message: str
    tasks: tuple[TaskId, ...] = ()
    regions: tuple[Region, ...] = ()

    def __str__(self) -> str:
        return self.message


@dataclass
class Report:
    """Collects rejections; of each kind the first `most` are kept and the others counted."""

    most: int
    kept: list[Rejection] = field(default_factory=list)
    found: Counter[Kind] = field(default_factory=Counter)

    def add(self, kind: Kind, sentence: str, tasks: Sequence[TaskId] = (), regions: Sequence[Region] = ()) -> None:
        self.found[kind] += 1
        if self.found[kind] <= self.most:
            self.kept.append(Rejection(kind, f"[{kind}] {sentence}", tuple(tasks), tuple(regions)))

    def full(self, kind: Kind) -> bool:
        """Whether the next one of this kind would only be counted; spares the caller the sentence."""
        return self.found[kind] >= self.most

    def count(self, kind: Kind, more: int) -> None:
        """Counts rejections whose sentences nobody needs."""
        self.found[kind] += more

    @property
    def clean(self) -> bool:
        return not self.found

    def rejections(self) -> tuple[Rejection, ...]:
        """Everything kept, and for each kind beyond its cap one that says how many more there are."""
        more = ((kind, number - self.most) for kind, number in self.found.items() if number > self.most)
        return (*self.kept, *(Rejection(kind, f"[{kind}] and {rest} more of this kind") for kind, rest in more))
