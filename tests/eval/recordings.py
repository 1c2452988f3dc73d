"""Made-up recordings of a traced launch: what the card would write down if each actor's times were known."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

import numpy as np

from amk import harness
from amk.eval.timeline import timeline
from amk.eval.trace import summary
from amk.isa.matvec import MatVec
from amk.models.registry import describe
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.resources import SERVICE_WARPS
from amk.schedule.targets import TARGETS
from amk.vm.trace import EVENT_DTYPE, TASK_BEGINS

TOKENS = 3


@cache
def program(model: str = "toy") -> Program:
    return lower(describe(model), Config(), TARGETS["h200"], context=256)


def tasks_of(program: Program, sm: int, warp: int) -> list[int]:
    """Indices in the SM's queue of what a warp does in a token."""
    queue, role = program.queues[sm], warp - program.machine.consumer_warps
    if role == 0:
        return [int(entry) for entry in program.streams[sm]]
    return [i for i, task in enumerate(queue) if role != 1 or isinstance(task, MatVec)]


class SmClock:
    """An SM whose cycles begin at `origin` and run at `mhz`; the card's nanoseconds come in steps of 32 and wrap at 2^32."""

    def __init__(self, origin: int, mhz: float, start_ns: int) -> None:
        self.origin, self.mhz, self.start_ns = origin, mhz, start_ns

    def cycles(self, us: float) -> int:
        return self.origin + round(us * self.mhz)

    def low_ns(self, us: float) -> int:
        return (self.start_ns + int(us * 1000)) // 32 * 32 % 2**32


def recording(program: Program, seed: int, start_ns: int = 2**32 - 40_000) -> tuple[np.ndarray[Any, Any], list[tuple[float, ...]]]:
    """Events [SMs, warps, room] of three tokens, and (SM, warp, task, begin, end) in microseconds of each task of the middle one.

    In half of the tasks an actor waits, now and then in two groups of lanes whose waits overlap.
    """
    rng = Random(seed)
    sms, warps = program.machine.sms, program.machine.consumer_warps + SERVICE_WARPS
    events = np.zeros((sms, warps, 64), dtype=EVENT_DTYPE)
    truth: list[tuple[float, ...]] = []
    for sm in range(sms):
        clock = SmClock(rng.randrange(2**40), rng.uniform(1700, 1980), start_ns)
        for warp in range(warps):
            _warp_events(events[sm, warp], program, (sm, warp), clock, rng, truth)
    return events, truth


def _warp_events(
    out: np.ndarray[Any, Any], program: Program, place: tuple[int, int], clock: SmClock, rng: Random, truth: list[tuple[float, ...]]
) -> None:
    us, written = rng.uniform(0, 3), []
    for token in range(TOKENS):
        for task in tasks_of(program, *place):
            begin, us = us, us + rng.uniform(0.2, 4)
            written.append((clock.cycles(begin), clock.low_ns(begin), task, TASK_BEGINS, token))
            if rng.random() < 0.5:
                first = begin + (us - begin) * rng.uniform(0.1, 0.4)
                for _ in range(rng.choice((1, 1, 2))):
                    length = (us - first) * rng.uniform(0.2, 1)
                    written.append((clock.cycles(first), round(length * clock.mhz), task, rng.choice((1, 2, 3, 4)), token))
            if token == 1:
                truth.append((*place, task, begin, us))
    rng.shuffle(written)  # waits are written when they end, so order is not that of time
    for i, event in enumerate(written):
        out[i] = event


def traced(model: str) -> dict[str, Any]:
    """The part of a shapes.Trace that comes from the card, of a made-up recording."""
    made = program(model)
    spans = timeline(recording(made, 0)[0], made.machine.consumer_warps, 1)
    verdict = harness.evaluate(model, "h200", None, "cpu")
    return {"verdict": verdict, "position": 128, "file": "trace.json", **summary(spans, made, 0)}
