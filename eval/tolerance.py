"""How far logits may be from the source model's, by dtype and depth; docs/tolerances.md derives the numbers."""

from __future__ import annotations

from dataclasses import dataclass

NEAR_TIE_SHARE = 0.03  # of the judged tokens may differ at a near tie
SHALLOW = 4  # layers up to which 2 % of noise in one weight tensor must fail
UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}


@dataclass(frozen=True)
class Tolerance:
    """Limits of the relative error |m - r| / |r - mean r| of a position's logits m against the source's r.

    `mean` limits its mean over the first steps and over the late positions, `worst` each single one. Two logits of
    the source closer than `tie` standard deviations of its logits are a near tie.
    """

    mean: float
    worst: float
    tie: float


def tolerance(dtype: str, layers: int) -> Tolerance:
    """The committed tolerance for a model of `layers` layers whose program rounds to `dtype`."""
    if dtype == "fp32":
        return Tolerance(mean=1e-4, worst=2e-4, tie=4e-4)
    unit = UNIT_ROUNDOFF[dtype]
    if layers <= SHALLOW:
        mean = unit * (1.6 + 0.35 * layers**0.5)
        return Tolerance(mean=mean, worst=2 * mean, tie=2 * mean)
    # Rounding errors of deep models pass through the sharp attention of many layers: measured, not bounded.
    mean = 2.4 * unit * layers**0.5
    return Tolerance(mean=mean, worst=3 * mean, tie=mean)
