"""When a difference of two times is more than chance, of samples taken in turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Samples = Sequence[float]


def usual_us(copies: Sequence[Samples]) -> float:
    """The time of what runs in several copies: the median of their medians."""
    return float(np.median([np.median(samples) for samples in copies]))


def noise_us(copies: Sequence[Samples], value: Samples) -> float:
    """Half of the distance from p10 to p90 of a copy and of the value, added; or how far apart the copies' medians are, if that is more."""
    medians = [float(np.median(samples)) for samples in copies]
    scatter = float(np.median([_scatter(samples) for samples in copies])) + _scatter(value)
    return max(scatter, max(medians) - min(medians))


def _scatter(samples: Samples) -> float:
    return float(np.quantile(samples, 0.9) - np.quantile(samples, 0.1)) / 2
