"""When the feeder holds back: copies under way while its ring is well filled.

A full ring waits for no memory: consumers wait for values of other SMs, and these, and looks at counters, wait behind the copies of all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from amk.isa.machine import Machine
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec, layer_bytes
from amk.schedule.targets import Target


@dataclass(frozen=True)
class Throttle:
    """At most `depth` copies are under way while `watermark` ring stages or more are not free. Zeros: as many as ever."""

    depth: int
    watermark: int


OFF = Throttle(0, 0)
USUAL = Throttle(2, 4)  # the other half, where only one is asked for and no rule holds
# By the time that a layer's matrices take at the rate of the card's data sheet, in us, at least. The shorter it is, the more of a layer is
# waiting for other SMs. Layers that are shorter than all have room in the ring. Measured on an H200 (docs/performance-log.md, v14).
BY_LAYER_US = ((20.0, Throttle(2, 6)), (10.0, Throttle(2, 4)), (3.0, Throttle(1, 4)))


def throttle_of(spec: ModelSpec, config: Config, target: Target, feed: str) -> Throttle:
    """As the config asks, or what was measured to be the fastest, which was with bulk copies."""
    usual = _measured(spec, target) if feed == "bulk" else OFF
    if not (config.throttled_depth or config.high_watermark):
        return usual
    rest = USUAL if usual == OFF else usual
    return Throttle(config.throttled_depth or rest.depth, config.high_watermark or rest.watermark)


def throttled(machine: Machine, throttle: Throttle) -> Machine:
    """The machine with the throttle, where it changes anything: fewer copies than else, at less than a full ring.

    A stretch's feeder never holds back: copies of weights are not whole before x is there, and it would wait for them.
    """
    if machine.prefill or throttle.depth >= machine.inflight or throttle.watermark >= machine.stages:
        return machine
    return replace(machine, throttled=throttle.depth, watermark=throttle.watermark)


def never(config: Config, machine: Machine) -> str | None:
    """Why a throttle that was asked for is none, as a sentence for the user; None where it is one, or none was asked for."""
    if machine.watermark or machine.prefill or not (config.throttled_depth or config.high_watermark):
        return None
    if config.high_watermark >= machine.stages or 0 < config.throttled_depth < machine.inflight:
        return f"high_watermark: never reached: the ring has {machine.stages} stages"
    if not config.high_watermark:
        return None  # the way to ask for no throttle
    asked, most = config.high_watermark, machine.inflight
    return f"high_watermark: {asked} stages asked for, but never throttled: no more than {most} are copied at a time"


def layer_us(spec: ModelSpec, target: Target) -> float:
    """What a layer's matrices take at the rate of the card's data sheet."""
    return layer_bytes(spec) / target.bandwidth_gbs * 1e-3


def _measured(spec: ModelSpec, target: Target) -> Throttle:
    takes = layer_us(spec, target)
    return next((throttle for least, throttle in BY_LAYER_US if takes >= least), OFF)
