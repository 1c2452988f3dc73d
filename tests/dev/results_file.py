"""A made-up results file of dev/bench_gpu.py for tests."""

from __future__ import annotations

from typing import Any


def baseline(name: str, latency_us: float | None, ratio: float | None = None, status: str = "measured") -> dict[str, Any]:
    samples = [] if latency_us is None else [latency_us] * 3
    return {
        "name": name, "status": status, "reason": None if latency_us else "RuntimeError: broken", "form": "a form", "dtype": "bf16",
        "rel_err": 0.01, "expected_rel_err": 0.01, "latency_us": latency_us, "ratio": ratio, "samples": None, "samples_us": samples,
    }  # fmt: skip


def row(position: int = 16, latency_us: float = 600.0, **changes: Any) -> dict[str, Any]:
    """A line of one process, with CUDA-graphed transformers four times as slow and torch.compile broken."""
    return {
        "model": "llama-3.2-1b-shape", "config": "default", "position": position, "latency_us": latency_us, "floor_us": 540.0,
        "pct_of_roofline": 54000 / latency_us, "streamed_bytes": 2471502848, "samples_us": [latency_us] * 3,
        "single_launch_samples_us": [latency_us + 40] * 3, "program_digest": "p", "binary_digest": "b",
        "baselines": [baseline("cuda-graph", 4 * latency_us, 4.0), baseline("torch-compile", None, status="failed")],
    } | changes  # fmt: skip


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    card = {
        "name": "NVIDIA H200", "driver_version": "580.1", "clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz", "clocks.max.sm": "1980 MHz",
        "clocks.max.mem": "3201 MHz", "power.limit": "700.00 W",
    }  # fmt: skip
    came = {"commit": "0123456789abcdef+changes", "time_utc": "2026-01-02T03:04:05Z", "machine": "Linux", "cores": 16, "python": "3.12"}
    return {"provenance": came | {"cards": [card]}, "plain_read_gbs": [4561.2, 4570.9], "processes": 3, "latency": list(rows), "knobs": []}
