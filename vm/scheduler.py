"""Who steps next: orders of a launch's actors, fair ones and adversarial ones, each reproducible from its name and seed."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

from amk.vm.interface import LaunchFailed

REPORTED = 6  # actors that a deadlock's message names


class Wait(NamedTuple):
    """What an actor needs before its next step: `check(*args)` is true; `what(*args)` says it in words.

    `remote`: another SM may have to bring it about.
    """

    check: Callable[..., bool]
    args: tuple[Any, ...]
    what: Callable[..., str]
    remote: bool = False

    def ready(self) -> bool:
        return self.check(*self.args)


Steps = Generator[Wait, None, None]


class Actor:
    """One actor of one SM: a generator that yields what it waits for before each of its steps.

    A `service` (copies that land, publishes that arrive) never ends; a launch ends when all others have.
    """

    def __init__(self, sm: int, role: str, number: int, steps: Steps, service: bool = False) -> None:
        self.sm = sm
        self.role = role
        self.number = number
        self.service = service
        self._steps = steps
        self.wait = next(steps, None)

    def step(self) -> None:
        """Does what the actor waited for, up to its next wait; `wait` becomes None at its end."""
        self.wait = next(self._steps, None)

    def __str__(self) -> str:
        return f"SM {self.sm} {self.role}" + (f" {self.number}" if self.role == "consumer" else "")


@dataclass(frozen=True)
class Order:
    """A rule for who steps next among the actors that can; `name` is one of ORDERS.

    "sequential" and "reverse" go by SM and role, "random" has no priorities, "shuffled" draws them and changes one now and then
    (Burckhardt et al. 2010), and the rest draw them and put one kind of actor first or last.
    """

    name: str = "sequential"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in ORDERS:
            raise ValueError(f"order: must be one of {', '.join(ORDERS)}, but got {self.name}")


ORDERS = ("sequential", "reverse", "random", "shuffled", "lazy_storer", "lazy_publishes", "eager_feeder", "lazy_feeder", "starved_sm")


def adversarial(seed: int) -> Order:
    """One of the orders, chosen by the seed."""
    return Order(ORDERS[seed % len(ORDERS)], seed)


class Scheduler:
    """Runs a launch's actors in one order until all have ended."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._random = Random(f"{order.name} {order.seed}")
        self._ranked: list[Actor] = []

    def choose(self, count: int) -> int:
        """Which of `count` pending things happens next."""
        if self._order.name == "sequential":
            return 0
        return count - 1 if self._order.name == "reverse" else self._random.randrange(count)

    def run(self, actors: list[Actor]) -> None:
        """LaunchFailed ("timeout") when none can step and some have not ended: a deadlock, or a tag that nobody publishes."""
        self._rank(actors)
        while any(actor.wait is not None and not actor.service for actor in self._ranked):
            self._burst()

    def _burst(self) -> None:
        """Steps until an actor ends."""
        self._ranked = [actor for actor in self._ranked if actor.wait is not None]
        ended = False
        while not ended:
            actor = next((a for a in self._candidates() if a.wait is not None and a.wait.ready()), None)
            if actor is None:
                raise LaunchFailed("timeout", _deadlock(self._ranked))
            actor.step()
            ended = actor.wait is None

    def _candidates(self) -> list[Actor]:
        ranked = self._ranked
        if self._order.name == "random":
            return self._random.sample(ranked, len(ranked))
        if self._order.name == "shuffled" and self._random.random() < 0.02:
            ranked.insert(self._random.randrange(len(ranked)), ranked.pop(self._random.randrange(len(ranked))))
        return ranked

    def _rank(self, actors: list[Actor]) -> None:
        name = self._order.name
        self._ranked = list(actors)
        if name == "reverse":
            self._ranked.reverse()
        elif name != "sequential":
            self._random.shuffle(self._ranked)
        last = {"lazy_storer": "storer", "lazy_publishes": "publishes", "lazy_feeder": "feeder"}.get(name)
        starved = self._random.choice(actors).sm if name == "starved_sm" else None
        self._ranked.sort(key=lambda actor: actor.role == last or actor.sm == starved)
        if name == "eager_feeder":
            self._ranked.sort(key=lambda actor: actor.role not in ("feeder", "copies"))


def _deadlock(actors: list[Actor]) -> str:
    """Who waits for what; what other SMs owe comes first, for the rest follows from it."""
    waits = [(not actor.wait.remote, str(actor), actor.wait) for actor in actors if actor.wait and not actor.service]
    stuck = [f"{actor} waits for {wait.what(*wait.args)}" for _, actor, wait in sorted(waits, key=lambda entry: entry[:2])]
    more = f" and {len(stuck) - REPORTED} more actors wait" if len(stuck) > REPORTED else ""
    return f"the launch cannot finish because no actor can step: {'; '.join(stuck[:REPORTED])}{more}"
