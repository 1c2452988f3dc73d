"""How long a watcher pauses between two looks at a counter: the SMs' looks queue at one line of the L2 cache, and arrivals behind them."""

from __future__ import annotations

from amk.schedule.knobs import NO_PAUSE, Config
from amk.schedule.model import ModelSpec
from amk.schedule.targets import Target
from amk.schedule.throttle import layer_us

USUAL_NS = 50
# Layers whose matrices take so many us at the rate of the card's data sheet: a pause was measured to be 0.4 % faster there on an H200, as
# in batches, whose noise is larger than that (docs/performance-log.md, v18). Longer layers gain nothing, and shorter ones may lose.
LAYERS_US = (10.0, 20.0)


def pause_ns(spec: ModelSpec, config: Config, target: Target, batch: int, feed: str) -> int:
    """As the config asks, or what was measured to be the fastest, which was with counters and bulk copies; 0 is none."""
    if config.poll_sleep_ns:
        return 0 if config.poll_sleep_ns == NO_PAUSE else config.poll_sleep_ns
    measured = config.sync == "counter" and feed == "bulk"
    gains = batch > 1 or LAYERS_US[0] <= layer_us(spec, target) < LAYERS_US[1]
    return USUAL_NS if measured and gains else 0
