"""Made-up results files of dev/bench_gpu.py and dev/knob_effects.py for tests; their figures hold together as measured ones do."""

from __future__ import annotations

from typing import Any

READS = [4561.2, 4570.9]
STREAMED = 2471502848
CHAIN: dict[str, Any] = {
    "model": "m", "position": 128, "chain_us": 300.0, "samples_us": [300.0] * 3, "is": "no result", "macros": {"DRY_FEED": 1},
}  # fmt: skip
FLOOR = STREAMED / READS[1] * 1e-3  # about 540.7 us


def baseline(name: str, latency_us: float | None, ratio: float | None = None, status: str = "measured") -> dict[str, Any]:
    samples = [] if latency_us is None else [latency_us] * 3
    return {
        "name": name, "status": status, "reason": None if latency_us else "RuntimeError: broken", "form": "a form", "dtype": "bf16",
        "rel_err": 0.01, "expected_rel_err": 0.01, "latency_us": latency_us, "ratio": ratio, "samples": None, "samples_us": samples,
    }  # fmt: skip


def row(position: int = 16, latency_us: float = 600.0, **changes: Any) -> dict[str, Any]:
    """A line of one process, with CUDA-graphed transformers four times as slow and torch.compile broken."""
    return {
        "model": "llama-3.2-1b-shape", "config": "default", "position": position, "context": 9216, "correct": True, "tolerance_used": 0.4,
        "latency_us": latency_us, "floor_us": FLOOR, "pct_of_roofline": 100 * FLOOR / latency_us, "streamed_bytes": STREAMED,
        "samples_us": [latency_us] * 5, "single_launch_samples_us": [latency_us + 40] * 3, "program_digest": "p", "binary_digest": "b",
        "outputs_sha256": "o", "arena_bytes": 302720,
        "baselines": [baseline("cuda-graph", 4 * latency_us, 4.0), baseline("torch-compile", None, status="failed")],
    } | changes  # fmt: skip


def effect(knob: str, value: str, latency_us: float = 600.0, **changes: Any) -> dict[str, Any]:
    """A line of what a knob does: beside a default of 600 us with a noise of 3 us."""
    measured = {
        "knob": knob, "value": value, "default_us": 600.0, "copies_samples_us": [[598.5] * 5, [600.0] * 5, [601.5] * 5],
        "noise_us": 3.0, "effect_pct": 100 * (latency_us / 600 - 1), "noise_pct": 0.5,
        "beyond_noise": abs(latency_us - 600) > 3, "default_arena_bytes": 302720,
    }  # fmt: skip
    return row(128, latency_us) | measured | changes


def results(*rows: dict[str, Any]) -> dict[str, Any]:
    card = {
        "name": "NVIDIA H200", "driver_version": "580.1", "clocks.sm": "1980 MHz", "clocks.mem": "3201 MHz", "clocks.max.sm": "1980 MHz",
        "clocks.max.mem": "3201 MHz", "power.limit": "700.00 W",
    }  # fmt: skip
    came = {"commit": "0123456789abcdef+changes", "time_utc": "2026-01-02T03:04:05Z", "machine": "Linux", "cores": 16, "python": "3.12"}
    came_from: dict[str, Any] = came | {"cards": [card]}
    return {"provenance": came_from, "device_name": "NVIDIA H200", "plain_read_gbs": READS, "processes": 3, "latency": list(rows)}


def effects(*rows: dict[str, Any]) -> dict[str, Any]:
    found = results()
    del found["latency"]
    return found | {"defaults": [row()], "rows": list(rows)}
