"""What counters alone keep apart: reads and overwrites that may come too early among tasks whose packets carry no tags.

Counters only grow, so whatever can happen while one task's publishes are not visible yet happens in the one run in which that task never
arrives and all others do as soon as they may. One such run for each counter at which tasks arrive stands for all orders.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from amk.eval.soundness.findings import Unsafe


@dataclass(frozen=True)
class GatedTask:
    """A task that begins when counter `wait` stands at `count`, takes the publishes `needed`, then makes those of `published`.

    It arrives at counter `done` when all of them are visible. Publishes are bits of a set.
    """

    name: str
    wait: int
    count: int
    done: int
    needed: int
    published: int


def early_problem(tasks: list[GatedTask], overwrites: list[tuple[int, int]], name: Callable[[int], str]) -> Unsafe | None:
    """A read of what may not be visible yet, or a publish that may come before one of a set of others is visible; or None.

    `overwrites` holds pairs (publish, set of which one must be visible before it); `name` tells a publish by its number.
    """
    owner = {bit: task for task in tasks for bit in _bits(task.published)}
    began = {done: run_without(tasks, done) for done in {task.done for task in tasks}}
    for reader in tasks:
        for bit in _bits(reader.needed):
            if reader in began[owner[bit].done]:
                return Unsafe("race", f"task {reader.name} may read before {name(bit)} is visible")
    for bit, others in overwrites:
        first = owner[min(_bits(others))] if others else None
        if first is None or owner[bit] in began[first.done]:
            what = name(min(_bits(others))) if others else "a task that publishes nothing"
            return Unsafe("race", f"{name(bit)} may overwrite what {what} writes or reads before that is visible")
    return None


def run_without(tasks: list[GatedTask], missing: int) -> set[GatedTask]:
    """The tasks that can begin while a task that arrives at counter `missing` has not. A wait for fewer than all arrivals is none."""
    arrivals = Counter(task.done for task in tasks)
    count: Counter[int] = Counter({missing: -1})
    began: set[GatedTask] = set()
    waiting = tasks
    while True:
        free = [task for task in waiting if not 0 < arrivals[task.wait] == task.count > count[task.wait]]
        if not free:
            return began
        began |= set(free)
        count.update(task.done for task in free)
        waiting = [task for task in waiting if task not in began]


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
