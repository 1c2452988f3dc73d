"""One line of the latency table: ours at one position, and the baselines of the same run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from amk.eval.baselines import Entrant, Missing
from amk.eval.bench import Timing, quantiles
from amk.eval.verdict import Latency


def table_row(latency: Latency, timing: Timing | None, entrants: Sequence[Entrant], dtype: str, batch: int = 1) -> dict[str, Any]:
    """A shapes.BenchRow of a program of `batch` rows. `timing` is None for a prediction; its others are samples of those `entrants` that
    run, in their order.
    """
    honest = not latency.under_floor
    samples = latency.samples
    return {
        "position": latency.position,
        "latency_us": latency.latency_us if honest else None,
        "latency_kind": latency.kind if honest else None,
        "single_launch_us": latency.single_launch_us if honest else None,
        "tokens_per_second": 1e6 * batch / latency.latency_us if honest else None,
        "pct_of_roofline": 100 * latency.bound_us / latency.latency_us if honest else None,
        "bound_us": latency.bound_us,
        "bandwidth_gbs": latency.bandwidth_gbs,
        "bandwidth_kind": latency.bandwidth_kind,
        "streamed_bytes": latency.streamed_bytes,
        "samples": asdict(samples) if samples and honest else None,
        "samples_us": timing.samples_us if timing and honest else [],
        "baselines": baseline_rows(entrants, timing.others_us if timing else [], latency, dtype),
    }


def baseline_rows(entrants: Sequence[Entrant], others_us: Sequence[list[float]], ours: Latency, dtype: str) -> list[dict[str, Any]]:
    """A shapes.BaselineRow for each entrant. One under the floor is refused, as ours would be; without a time of ours there is no ratio."""
    samples = iter(others_us)
    return [{"dtype": dtype, **_baseline_row(entrant, samples, ours)} for entrant in entrants]


def _baseline_row(entrant: Entrant, samples: Iterator[list[float]], ours: Latency) -> dict[str, Any]:
    if isinstance(entrant, Missing):
        nothing = dict.fromkeys(("form", "rel_err", "expected_rel_err", "latency_us", "ratio", "samples"))
        return {"name": entrant.name, "status": entrant.status, "reason": entrant.reason, **nothing, "samples_us": []}
    taken = next(samples)
    found, honest = quantiles(taken), quantiles(taken).p50 >= ours.bound_us
    reason = f"latency {found.p50:.2f} us is under the floor of {ours.bound_us:.2f} us: not reported"
    return {
        "name": entrant.name,
        "status": "measured" if honest else "refused",
        "reason": None if honest else reason,
        "form": entrant.form,
        "rel_err": entrant.agreement.rel_err,
        "expected_rel_err": entrant.agreement.expected,
        "latency_us": found.p50 if honest else None,
        "ratio": found.p50 / ours.latency_us if honest and not ours.under_floor else None,
        "samples": asdict(found) if honest else None,
        "samples_us": taken if honest else [],
    }
