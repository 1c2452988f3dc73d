"""The latency table: what is timed, that samples are taken in turns, and what it says of baselines."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from amk.eval import bench
from amk.eval.baselines import Entrant, Missing, Rival
from amk.eval.bench import SAMPLES, WARM_UP, Timing, interleaved, launch_start, launch_us, measured, quantiles, take
from amk.eval.errors import RunVoid
from amk.eval.latency_table import table_row
from amk.eval.shapes import result_schema
from amk.eval.tracks import Agreement
from amk.eval.verdict import Latency
from amk.schedule.targets import TARGETS
from amk.tests.schedule.builder import Sizes, decoder

GRAPH = Rival("cuda-graph", "a form", None, None, Agreement(0.01, 0.012, ()))  # type: ignore[arg-type]
COMPILE = Missing("torch-compile", "failed", "RuntimeError: no compiler")
FLOOR_US = 100.0


def row(ours: list[float], theirs: list[float], entrants: tuple[Entrant, ...] = (COMPILE, GRAPH)) -> dict[str, Any]:
    latency = Latency(
        program_digest="p", binary_digest="b", kind="measured-gpu", position=16, latency_us=quantiles(ours).p50, streamed_bytes=10**8,
        bandwidth_gbs=1000.0, bandwidth_kind="measured", spec_bandwidth_gbs=1000.0, samples=quantiles(ours), single_launch_us=ours[0],
    )  # fmt: skip
    assert latency.bound_us == FLOOR_US
    return table_row(latency, Timing(ours, ours, [theirs]), entrants, "bf16")


class Launches:
    """A machine of which every launch takes 1280 us."""

    def __init__(self, batch: int = 1) -> None:
        self.batch, self.context, self.program = batch, 1024, decoder(Sizes())
        self.asked: list[tuple[list[int], int]] = []

    def decode(self, tokens: Sequence[int], position: int, *, steps: int) -> Any:
        return self.decode_batch([tokens], [position], steps=steps)

    def decode_batch(self, tokens: Sequence[Sequence[int]], positions: list[int], *, steps: int) -> Any:
        assert len(tokens) == len(positions) == self.batch
        self.asked.append((positions, steps))
        return SimpleNamespace(elapsed_us=1280.0)


@pytest.mark.parametrize(
    ("position", "launch"), [(0, (0, 64)), (31, (31, 64)), (32, (0, 64)), (128, (96, 64)), (992, (960, 64)), (1020, (988, 36))]
)
def test_a_position_is_the_middle_of_a_launch_that_ends_at_the_context(position: int, launch: tuple[int, int]) -> None:
    assert launch_start(position, 1024) == launch


@pytest.mark.parametrize("batch", [1, 4])
def test_a_time_is_that_of_a_step_of_all_rows(batch: int) -> None:
    machine: Any = Launches(batch)
    assert launch_us(machine, 96, 64) == 20.0
    assert machine.asked == [([96] * batch, 64)]


def test_a_latency_is_the_median_of_its_samples() -> None:
    machine: Any = Launches()
    timing = Timing([float(n) for n in range(1, 16)], [float(n) for n in range(21, 36)], [])
    found = measured(machine, TARGETS["h200"], 16, 4500.0, ("p", "b"), timing)
    assert (found.latency_us, found.single_launch_us, found.samples) == (8.0, 28.0, quantiles(timing.samples_us))


LAUNCHES = 2 * (WARM_UP + SAMPLES)


@pytest.mark.parametrize(("company", "launches"), [([[7]], 0), ([[], [7]], LAUNCHES), ([[], []], LAUNCHES)])
def test_company_before_or_after_voids_a_timing(company: list[list[int]], launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Any = Launches()
    void = [7] in company
    monkeypatch.setattr(bench, "foreign_processes", lambda: company.pop(0))
    with pytest.raises(RunVoid, match="process 7 is on it") if void else nullcontext():
        assert take(machine, 128) == Timing([20.0] * SAMPLES, [1280.0] * SAMPLES, [])
    assert len(machine.asked) == launches and company == []


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
    shown = [made["latency_us"], made["single_launch_us"], made["samples_us"] or None]
    assert [figure is None for figure in shown] == [ours < FLOOR_US] * 3
    assert (measured["latency_us"] is None, measured["status"] == "refused") == (theirs < FLOOR_US, theirs < FLOOR_US)
    assert measured["ratio"] is None


def test_a_baseline_of_which_a_few_samples_are_under_the_floor_is_judged_by_its_median() -> None:
    measured = row([120.0], [80.0, 90.0, 180.0, 190.0, 200.0])["baselines"][1]
    assert (measured["status"], measured["latency_us"]) == ("measured", 180.0) and measured["samples"]["p10"] < FLOOR_US


@pytest.mark.parametrize("ours", [99.0, 120.0])
def test_rows_with_baselines_satisfy_the_schema(ours: float) -> None:
    schema = result_schema("bench")["properties"]["rows"]
    Draft202012Validator(schema).validate(json.loads(json.dumps([row([ours], [200.0])])))
