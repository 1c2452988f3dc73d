"""Medians over fresh processes: what one process finds depends on where its memory happens to lie, so several are asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SAME = ("model", "config", "position", "correct", "program_digest", "binary_digest", "outputs_sha256", "streamed_bytes")
Row = dict[str, Any]


class Unlike(ValueError):
    """Processes that should have measured the same thing did not: other programs, or outputs of other bits."""


def combined(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """The lines of several processes as one: medians of their medians, their spread in percent of it, and all raw samples.

    Line i of every process must be about the same program and position, with outputs of the same bits: Unlike otherwise.
    """
    if len({len(run) for run in runs}) != 1:
        raise Unlike(f"runs: must have equally many lines, but have {[len(run) for run in runs]}")
    return [_combined_row(rows) for rows in zip(*runs, strict=True)]


def _combined_row(rows: Sequence[Row]) -> Row:
    for name in SAME:
        if any(row[name] != rows[0][name] for row in rows):
            raise Unlike(f"{name}: must be the same in every process, but is {[row[name] for row in rows]}")
    medians, floor = [row["latency_us"] for row in rows], _median([row["floor_us"] for row in rows])
    latency = _median(medians)
    return rows[0] | {
        "latency_us": latency,
        "floor_us": floor,
        "pct_of_roofline": 100 * floor / latency,
        "process_medians_us": medians,
        "spread_pct": spread_pct(medians),
        "samples_us": _joined(rows, "samples_us"),
        "single_launch_samples_us": _joined(rows, "single_launch_samples_us"),
        "baselines": [_combined_baseline(found, latency) for found in zip(*(row["baselines"] for row in rows), strict=True)],
    }


def _combined_baseline(found: Sequence[Row], ours_us: float) -> Row:
    """A baseline that any process could not time has no time."""
    missing = next((baseline for baseline in found if baseline["status"] != "measured"), None)
    if missing is not None:
        return missing
    medians = [baseline["latency_us"] for baseline in found]
    samples = _joined(found, "samples_us")
    p10, p50, p90 = (float(q) for q in np.quantile(samples, [0.1, 0.5, 0.9]))
    return found[0] | {
        "latency_us": _median(medians),
        "ratio": _median(medians) / ours_us,
        "samples": {"p10": p10, "p50": p50, "p90": p90, "n": len(samples)},
        "samples_us": samples,
        "process_medians_us": medians,
        "spread_pct": spread_pct(medians),
    }


def spread_pct(medians: Sequence[float]) -> float:
    """Largest less smallest, in percent of the median."""
    return 100 * (max(medians) - min(medians)) / _median(medians)


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _joined(rows: Sequence[Row], name: str) -> list[float]:
    return [sample for row in rows for sample in row[name]]
