"""What to try next: the default, then configs drawn from the whole knob table or one step from the incumbent."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from amk.schedule.config import neighbours, with_value
from amk.schedule.knobs import KNOBS, RULES, Config, Knob

Source = Literal["default", "explore", "mutate"]
Identify = Callable[[Config], str | None]
# Draws after which the space counts as used up: each may cost a lowering.
MAX_DRAWS = 256


@dataclass(frozen=True)
class Proposal:
    """A config to try and where it comes from."""

    config: Config
    source: Source


class Proposer:
    """Proposes configs, none twice; equal seeds and equal histories give equal proposals.

    `identify` gives a config's schedule id, or None where it has none (it cannot be lowered); a config with an id that an earlier proposal
    had is not proposed. Without `identify` only equal configs are the same.
    """

    def __init__(self, seed: int, explore_fraction: float, identify: Identify | None = None) -> None:
        if not 0 <= explore_fraction <= 1:
            raise ValueError(f"explore_fraction: must be from 0 to 1, but got {explore_fraction}")
        self._random = random.Random(seed)
        self._explore_fraction = explore_fraction
        self._identify: Identify = identify or (lambda _: None)
        self._ids: set[str] = set()
        self._seen: set[Config] = set()

    def propose(self, incumbent: Config, realised: Config | None = None) -> Proposal | None:
        """The next config; None when nothing new was found, near the incumbent or anywhere.

        `incumbent` is the best config so far, or the default, and `realised` what its program makes of it. Where its neighbours are used
        up, the whole table is drawn from.
        """
        return next((proposal for proposal in self._candidates(incumbent, realised) if self._take(proposal.config)), None)

    def _candidates(self, incumbent: Config, realised: Config | None) -> Iterator[Proposal]:
        yield Proposal(Config(), "default")
        if self._random.random() >= self._explore_fraction:
            near = [config for _, config in neighbours(incumbent, realised)]
            self._random.shuffle(near)
            yield from (Proposal(config, "mutate") for config in near)
        yield from (Proposal(draw(self._random), "explore") for _ in range(MAX_DRAWS))
        yield from (Proposal(config, "mutate") for _, config in neighbours(incumbent, realised))

    def _take(self, config: Config) -> bool:
        """Whether the config is new; it is not any more."""
        if config in self._seen:
            return False
        self._seen.add(config)
        name = self._identify(config)
        if name is None:
            return True
        new = name not in self._ids
        self._ids.add(name)
        return new


def draw(source: random.Random) -> Config:
    """A config with a random value for every knob that breaks no rule between knobs."""
    while True:
        config = Config()
        for knob in KNOBS:
            config = with_value(config, knob.name, _draw_value(knob, source))
        if all(rule.check(config) is None for rule in RULES):
            return config


def _draw_value(knob: Knob, source: random.Random) -> Any:
    if knob.type == "set":
        return tuple(choice for choice in knob.choices if source.random() < 0.5)
    return source.choice(knob.values)
