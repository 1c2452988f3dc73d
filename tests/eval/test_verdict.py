"""The rules of honesty: each is tried to be broken where verdicts are made."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from amk.eval.verdict import Facts, Judgement, Latency, Samples, Verdict, failed, from_json, judged, rejected

FACTS = Facts(model="toy", gpu="h200", device="cuda", dtype="bf16", device_name="NVIDIA H200", program_digest="p1", binary_digest="b1")
PASS = Judgement(
    program_digest="p1", binary_digest="b1", correct=True, rel_err=0.001, max_abs_err=0.01, top1_agreement=1.0, tolerance_used=0.4,
    near_ties=0, positions=(0, 1, 1024),
)  # fmt: skip
LATENCY = Latency(
    program_digest="p1", binary_digest="b1", kind="measured-gpu", position=128, latency_us=600.0, streamed_bytes=2_471_500_000,
    bandwidth_gbs=4700.0, bandwidth_kind="measured", spec_bandwidth_gbs=4800.0, samples=Samples(598.0, 600.0, 604.0, 15),
)  # fmt: skip
GOOD = judged(FACTS, PASS, LATENCY)


def test_a_correct_program_gets_its_latency_beside_its_floor() -> None:
    assert (GOOD.valid, GOOD.correct, GOOD.status) == (True, True, "correct")
    assert GOOD.bound_us == pytest.approx(2_471_500_000 / 4700e3)
    assert GOOD.bound_us is not None and GOOD.pct_of_roofline == pytest.approx(100 * GOOD.bound_us / 600.0)


def test_no_latency_for_a_program_that_is_not_correct() -> None:
    wrong = replace(PASS, correct=False, tolerance_used=3.0, failures=("logit error",))
    with pytest.raises(ValueError, match="correctness pass"):
        judged(FACTS, wrong, LATENCY)


@pytest.mark.parametrize("change", [{"program_digest": "p2"}, {"binary_digest": "b2"}, {"binary_digest": None}])
def test_no_latency_of_another_program_than_the_one_judged(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="another program"):
        judged(FACTS, PASS, replace(LATENCY, **change))
    with pytest.raises(ValueError, match="another program"):
        judged(FACTS, replace(PASS, **change), LATENCY)


@pytest.mark.parametrize("latency_us", [525.0, 1.0, 0.0, -1.0, float("nan")])
def test_a_latency_under_the_floor_is_flagged_and_not_reported(latency_us: float) -> None:
    verdict = judged(FACTS, PASS, replace(LATENCY, latency_us=latency_us))
    assert (verdict.latency_us, verdict.latency_kind, verdict.pct_of_roofline) == (None, None, None)
    assert verdict.correct and any("under the floor" in note for note in verdict.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"correct": False},
        {"correct": None, "status": "rejected", "valid": False, "rejections": ("x",)},
        {"status": "incorrect", "correct": False},
        {"latency_us": 100.0},
        {"latency_kind": None},
        {"latency_kind": "measured-gpu", "device": "cpu"},
        {"latency_samples": None},
        {"bandwidth_kind": "spec"},
        {"positions": ()},
        {"tolerance_used": 1.0},
        {"tolerance_used": None},
        {"valid": False},
    ],
    ids=str,
)
def test_a_verdict_that_breaks_a_rule_cannot_be_made(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        replace(GOOD, **change)
    with pytest.raises(ValueError):
        from_json(GOOD.to_json() | {k: list(v) if isinstance(v, tuple) else v for k, v in change.items()})


def test_a_prediction_says_so() -> None:
    facts = replace(FACTS, device="cpu", binary_digest=None)
    latency = replace(LATENCY, kind="predicted", binary_digest=None, bandwidth_kind="spec", samples=None)
    assert judged(facts, replace(PASS, binary_digest=None), latency).latency_kind == "predicted"


def test_a_rejection_needs_its_reasons() -> None:
    with pytest.raises(ValueError):
        rejected(FACTS, [])
    verdict = rejected(FACTS, ["a", "b"])
    assert (verdict.valid, verdict.correct, verdict.latency_us, verdict.rejected_reason) == (False, None, None, "a; b")


@pytest.mark.parametrize("kind", ["timeout", "crash"])
def test_a_launch_that_did_not_finish_has_no_latency(kind: Any) -> None:
    verdict = failed(FACTS, kind, "a wait ran out")
    assert (verdict.status, verdict.correct, verdict.latency_us) == (kind, False, None)


@pytest.mark.parametrize("verdict", [GOOD, rejected(FACTS, ["a"]), failed(FACTS, "crash", "boom")])
def test_a_verdict_survives_json(verdict: Verdict) -> None:
    assert from_json(json.loads(json.dumps(verdict.to_json(), allow_nan=False))) == verdict


def test_an_infinite_error_becomes_null() -> None:
    wrong = replace(PASS, correct=False, tolerance_used=float("inf"), max_abs_err=float("nan"), rel_err=float("inf"))
    data = json.loads(json.dumps(judged(FACTS, wrong).to_json(), allow_nan=False))
    assert (data["correct"], data["max_abs_err"], data["rel_err"]) == (False, None, None)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError):
        from_json(GOOD.to_json() | {"speed": 1})
