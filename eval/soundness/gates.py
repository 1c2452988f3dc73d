"""What counters alone keep apart: reads and overwrites that may come too early among tasks whose packets carry no tags.

Counters only grow and no task waits for less of something than before, so whatever can happen while some publishes are not visible yet
happens in the one run that withholds them and lets everything else happen at once. One run for each thing to be withheld is all orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from amk.eval.soundness.findings import Unsafe
from amk.isa.abi import NONE


@dataclass(frozen=True)
class GatedTask:
    """A task that begins when counter `gate[0]` stands at `gate[1]` or more, takes the publishes `needed`, then makes those of `published`.

    It arrives at counter `done` when all of them are visible. Publishes are bits of a set.
    """

    name: str
    gate: tuple[int, int]
    done: int
    needed: int
    published: int


def early_problem(tasks: list[GatedTask], counters: int, orders: list[tuple[int, int]], name: Callable[[int], str]) -> Unsafe | None:
    """A read of what may not be visible yet, or a publish that may come before one of a set of others is visible, of `orders`; or None.

    `orders` holds pairs (publish, set of which one must be visible before it); `name` tells a publish by its number.
    """
    for bit in _bits(_all(task.needed for task in tasks)):
        began = run_without(tasks, counters, 1 << bit)
        for task in began:
            if task.needed >> bit & 1:
                return Unsafe("race", f"task {task.name} may read before {name(bit)} is visible")
    issued: dict[int, int] = {}
    for bit, others in orders:
        if others not in issued:
            issued[others] = _all(task.published for task in run_without(tasks, counters, others))
        if issued[others] >> bit & 1:
            what = name(min(_bits(others))) if others else "a task that publishes nothing"
            return Unsafe("race", f"{name(bit)} may overwrite packets before {what} is visible: it writes or reads them")
    return None


def run_without(tasks: list[GatedTask], counters: int, withheld: int) -> list[GatedTask]:
    """The tasks that can begin while no publish of `withheld` is visible."""
    count = [0] * counters
    began: list[GatedTask] = []
    waiting = tasks
    while True:
        open_ = [task for task in waiting if task.gate[0] == NONE or count[task.gate[0]] >= task.gate[1]]
        if not open_:
            return began
        began += open_
        waiting = [task for task in waiting if not (task.gate[0] == NONE or count[task.gate[0]] >= task.gate[1])]
        for task in open_:
            if task.done != NONE and not task.published & withheld:
                count[task.done] += 1


def _all(sets: Iterable[int]) -> int:
    joined = 0
    for each in sets:
        joined |= each
    return joined


def _bits(mask: int) -> list[int]:
    return [bit for bit in range(mask.bit_length()) if mask >> bit & 1]
