"""When a difference of two times is more than chance, of samples taken in turns."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def noise_us(default: Sequence[float], twin: Sequence[float], value: Sequence[float]) -> float:
    """Half of the distance from p10 to p90 of default and value, added; or what the two defaults differ by, if that is more."""
    scatter = sum(float(np.quantile(samples, 0.9) - np.quantile(samples, 0.1)) / 2 for samples in (default, value))
    return max(scatter, abs(float(np.median(twin)) - float(np.median(default))))
