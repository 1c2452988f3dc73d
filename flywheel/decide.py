"""Keep or revert: a candidate takes the incumbent's place if it is correct and faster by more than chance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from amk.eval.verdict import Verdict, from_json
from amk.flywheel.corpus import is_positive

LEAST_GAIN = 0.01
# What must be equal for two latencies to be comparable; for measured ones the card too.
LIKE = ("model", "gpu", "device", "dtype", "latency_position")
VERDICT_FIELDS = frozenset(f.name for f in fields(Verdict))


def keeps(candidate: Mapping[str, Any], incumbent: Mapping[str, Any] | None) -> bool:
    """Whether the candidate's verdict (as JSON; further keys are passed over) dethrones the incumbent's.

    It must be correct with a latency, of another program, and faster by at least 1 % or the measured noise, whichever is more. A
    prediction never dethrones a measurement; a measurement always takes the place of a prediction, since the two cannot be compared.
    What breaks a rule of honesty counts as no verdict at all. ValueError if the two are not about the same model, card, precision and
    position.
    """
    new, old = _counted(candidate), None if incumbent is None else _counted(incumbent)
    if new is None:
        return False
    if old is None:
        return True
    _check_like(new, old)
    if new.latency_kind != old.latency_kind:
        return new.latency_kind == "measured-gpu"
    if (new.program_digest, new.binary_digest) == (old.program_digest, old.binary_digest):
        return False
    return is_gain(_latency(new), _latency(old)) and _latency(old) - _latency(new) >= noise_us(new) + noise_us(old)


def is_gain(latency_us: float, than_us: float) -> bool:
    """Whether a time is at least 1 % less than another."""
    return than_us - latency_us >= LEAST_GAIN * than_us


def noise_us(verdict: Verdict) -> float:
    """Half of the distance from p10 to p90 of the samples; 0 for a prediction. Two of them added: the ranges do not overlap."""
    samples = verdict.latency_samples
    return 0.0 if samples is None else (samples.p90 - samples.p10) / 2


def _counted(data: Mapping[str, Any]) -> Verdict | None:
    """The verdict, if it is an honest one with a latency."""
    try:
        verdict = from_json({key: value for key, value in data.items() if key in VERDICT_FIELDS})
        return verdict if _is_counted(verdict) else None
    except (TypeError, ValueError):
        return None


def _is_counted(verdict: Verdict) -> bool:
    known = verdict.program_digest is not None and is_positive(verdict.latency_us) and is_positive(verdict.bound_us)
    samples = verdict.latency_samples
    if samples is None:
        return known and verdict.latency_kind == "predicted"
    rising = all(map(is_positive, (samples.p10, samples.p50, samples.p90, samples.n))) and samples.p10 <= samples.p50 <= samples.p90
    return known and rising and samples.p10 <= _latency(verdict) <= samples.p90


def _latency(verdict: Verdict) -> float:
    assert verdict.latency_us is not None
    return verdict.latency_us


def _check_like(new: Verdict, old: Verdict) -> None:
    if new.latency_kind != old.latency_kind:
        names: tuple[str, ...] = ("model", "gpu", "dtype")
    else:
        names = (*LIKE, "device_name") if new.latency_kind == "measured-gpu" else LIKE
    unlike = [f"{name} {getattr(new, name)} against {getattr(old, name)}" for name in names if getattr(new, name) != getattr(old, name)]
    if unlike:
        raise ValueError(f"candidate and incumbent must be about the same thing, but got {', '.join(unlike)}")
