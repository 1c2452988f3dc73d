"""Verdicts, trials and records that tests change in one place."""

from __future__ import annotations

from typing import Any

from amk.eval.verdict import Facts, Judgement, Latency, Samples, failed, judged, rejected
from amk.flywheel.corpus import record_of
from amk.flywheel.log import Row
from amk.flywheel.trials import Trial, tag_of

Json = dict[str, Any]
TS = "2026-01-31T12:00:00Z"


def facts(program: str = "p0", device: str = "cuda") -> Facts:
    return Facts(
        model="toy",
        gpu="h200",
        device=device,
        dtype="bf16",
        device_name="NVIDIA H200" if device == "cuda" else None,
        schedule_id=f"s-{program}",
        program_digest=program,
        binary_digest=f"b-{program}" if device == "cuda" else None,
    )


def verdict(
    latency_us: float | None = 100.0,
    *,
    program: str = "p0",
    width_us: float = 0.0,
    correct: bool = True,
    kind: str = "measured-gpu",
) -> Json:
    """A verdict as JSON with a floor of 10 us; the samples reach from `width_us` below the latency to as much above."""
    measured = kind == "measured-gpu"
    about = facts(program, "cuda" if measured else "cpu")
    judgement = Judgement(
        program_digest=program,
        binary_digest=about.binary_digest,
        correct=correct,
        rel_err=0.001,
        max_abs_err=0.01,
        top1_agreement=1.0,
        tolerance_used=0.3 if correct else 3.0,
        near_ties=0,
        positions=(0, 16),
    )
    if latency_us is None or not correct:
        return judged(about, judgement).to_json()
    latency = Latency(
        program_digest=program,
        binary_digest=about.binary_digest,
        kind="measured-gpu" if measured else "predicted",
        position=128,
        latency_us=latency_us,
        streamed_bytes=40_000_000,
        bandwidth_gbs=4000.0,
        bandwidth_kind="measured" if measured else "spec",
        spec_bandwidth_gbs=4800.0,
        samples=Samples(latency_us - width_us, latency_us, latency_us + width_us, 50) if measured else None,
    )
    return judged(about, judgement, latency).to_json()


def refused() -> Json:
    return rejected(facts(), ["gemv N_tile: must be even, but got 7"]).to_json()


def crashed() -> Json:
    return failed(facts(), "crash", "the launch ended with an illegal address").to_json()


def provenance() -> Json:
    return {
        "shape": {"layers": 2},
        "regime": "single-stream",
        "schedule": {},
        "effective": {},
        "ir_version": "1",
        "abi_version": "1",
        "eval_version": "1",
        "commit": "c0ffee",
        "driver": "580.1",
        "clocks": {"sm": 1980},
        "ts": TS,
    }


def record(latency_us: float = 100.0) -> Json:
    return record_of(verdict(latency_us), provenance())


def row(**changes: Any) -> Row:
    values: Json = {"experiment": "e", "tag": "tried", "loop": "config", "model": "toy", "gpu": "h200", "regime": "single-stream"}
    return Row(**(values | {"correctness": "", "ts": TS} | changes))


def trial(data: Json | None = None, *, kept: bool = False, **changes: Any) -> Trial:
    given = verdict() if data is None else data
    values: Json = {"experiment": "e", "loop": "config", "regime": "single-stream", "source": "explore", "description": "d", "config": {}}
    return Trial(**(values | {"tag": tag_of(given, kept=kept), "verdict": given} | changes))
