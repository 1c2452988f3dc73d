"""The latency table: what it says of baselines, and that samples are taken in turns."""

from __future__ import annotations

import json
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from amk.eval.baselines import Entrant, Missing, Rival
from amk.eval.bench import SAMPLES, WARM_UP, Timing, interleaved, quantiles
from amk.eval.latency_table import table_row
from amk.eval.shapes import result_schema
from amk.eval.tracks import Agreement
from amk.eval.verdict import Latency

GRAPH = Rival("cuda-graph", "a form", None, None, Agreement(0.01, 0.012, ()))  # type: ignore[arg-type]
COMPILE = Missing("torch-compile", "failed", "RuntimeError: no compiler")
FLOOR_US = 100.0


def row(ours: list[float], theirs: list[float], entrants: tuple[Entrant, ...] = (COMPILE, GRAPH)) -> dict[str, Any]:
    latency = Latency(
        program_digest="p", binary_digest="b", kind="measured-gpu", position=16, latency_us=quantiles(ours).p50, streamed_bytes=10**8,
        bandwidth_gbs=1000.0, bandwidth_kind="measured", spec_bandwidth_gbs=1000.0, samples=quantiles(ours),
    )  # fmt: skip
    assert latency.bound_us == FLOOR_US
    return table_row(latency, Timing(ours, ours, [theirs]), entrants, "bf16")


def test_samples_are_taken_in_turns_after_warm_up() -> None:
    order: list[str] = []

    def sampler(name: str) -> Any:
        return lambda: order.append(name) or float(len(order))

    ours, theirs = interleaved([sampler("a"), sampler("b")])
    assert order == ["a", "b"] * (WARM_UP + SAMPLES)
    assert ours[0] == 2 * WARM_UP + 1 and [t - o for o, t in zip(ours, theirs, strict=True)] == [1.0] * SAMPLES


def test_a_ratio_is_the_baselines_time_over_ours_and_raw_samples_stay() -> None:
    made = row([120.0, 125.0, 130.0], [240.0, 250.0, 275.0])
    failed, measured = made["baselines"]
    assert (measured["status"], measured["latency_us"], measured["ratio"]) == ("measured", 250.0, 2.0)
    assert (made["samples_us"], measured["samples_us"]) == ([120.0, 125.0, 130.0], [240.0, 250.0, 275.0])
    assert (failed["status"], failed["reason"], failed["latency_us"]) == ("failed", "RuntimeError: no compiler", None)


@pytest.mark.parametrize(("ours", "theirs"), [(99.0, 200.0), (120.0, 99.0), (99.0, 99.0)])
def test_a_time_under_the_floor_is_no_result_and_makes_no_ratio(ours: float, theirs: float) -> None:
    made = row([ours], [theirs])
    measured = made["baselines"][1]
    assert (made["latency_us"] is None, made["samples_us"] == []) == (ours < FLOOR_US, ours < FLOOR_US)
    assert (measured["latency_us"] is None, measured["status"] == "refused") == (theirs < FLOOR_US, theirs < FLOOR_US)
    assert measured["ratio"] is None


@pytest.mark.parametrize("ours", [99.0, 120.0])
def test_rows_with_baselines_satisfy_the_schema(ours: float) -> None:
    schema = result_schema("bench")["properties"]["rows"]
    Draft202012Validator(schema).validate(json.loads(json.dumps([row([ours], [200.0])])))
