"""The timeline says when each actor did what, whatever the clocks of the SMs, and its sums add up."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amk.eval.timeline import PHASES, Span, by_actor, by_task, role_of, timeline
from amk.eval.trace import launch, nothing, summary, write_chrome_trace
from amk.tests.eval.recordings import program, recording
from amk.vm.trace import EVENT_DTYPE, TASK_BEGINS

CLOCK_ERROR_US = 0.05  # the card's nanoseconds come in steps of 32


def spans_of(seed: int, **options: Any) -> tuple[list[Span], list[tuple[float, ...]]]:
    made = program()
    events, truth = recording(made, seed, **options)
    return timeline(events, made.machine.consumer_warps, 1), truth


@pytest.mark.parametrize("start_ns", [0, 123_456_789, 2**32 - 3000, 2**31 - 2000])
def test_tasks_are_where_they_were_on_every_sm(start_ns: int) -> None:
    spans, truth = spans_of(1, start_ns=start_ns)
    warps = program().machine.consumer_warps
    first = min(begin for *_, begin, _ in truth)
    expected = {(sm, *role_of(int(warp), warps), task, begin - first): end - first for sm, warp, task, begin, end in truth}
    assert len(expected) == len(spans)
    for span, ((*place, begin), end) in zip(sorted(spans, key=_order), sorted(expected.items()), strict=True):
        assert [span.sm, span.role, span.warp, span.task] == place
        assert abs(span.begin_us - begin) < CLOCK_ERROR_US and abs(span.end_us - end) < CLOCK_ERROR_US


def _order(span: Span) -> tuple[Any, ...]:
    return span.sm, span.role, span.warp, span.task, span.begin_us


@pytest.mark.parametrize("seed", range(3))
def test_waits_lie_in_their_task_one_after_the_other_and_phases_fill_it(seed: int) -> None:
    for span in spans_of(seed)[0]:
        edges = [span.begin_us, *(edge for wait in span.waits for edge in (wait.begin_us, wait.end_us)), span.end_us]
        assert all(a <= b + 1e-6 for a, b in pairwise(edges))
        phases = span.phases_us()
        assert min(phases.values()) > -1e-6 and sum(phases.values()) == pytest.approx(span.end_us - span.begin_us)


def test_sums_by_task_are_those_by_actor() -> None:
    spans, _ = spans_of(0)
    sums: defaultdict[str, float] = defaultdict(float)
    for row in by_task(spans, program()):
        sums[row["actor"]] += sum(row[f"{phase}_us"] for phase in PHASES)
    actors = {row["actor"]: sum(row[f"{phase}_us"] for phase in PHASES) for row in by_actor(spans)}
    assert actors == pytest.approx(dict(sums)) and set(actors) == {"feeder", "consumer", "storer", "watcher"}


def test_only_a_wait_for_memory_is_loading() -> None:
    events = np.zeros((1, 4, 8), dtype=EVENT_DTYPE)
    written = [(1000, 0, 0, TASK_BEGINS, 0), (1100, 200, 0, 3, 0), (1400, 300, 0, 2, 0), (2000, 1000, 0, TASK_BEGINS, 1)]
    for warp in range(4):  # a consumer, the feeder, the storer, the watcher, at 1 GHz
        events[0, warp, : len(written)] = written
    phases = {span.role: {k: round(v, 6) for k, v in span.phases_us().items()} for span in timeline(events, 1, 0)}
    assert phases["consumer"] == {"wait": 0.3, "load": 0.2, "compute": 0.5, "publish": 0.0}
    assert phases["feeder"] == {"wait": 0.3, "load": 0.7, "compute": 0.0, "publish": 0.0}
    assert phases["storer"] == {"wait": 0.3, "load": 0.2, "compute": 0.0, "publish": 0.5}


def test_the_last_task_of_all_ends_with_its_last_wait() -> None:
    events = np.zeros((1, 4, 8), dtype=EVENT_DTYPE)
    events[0, 0, :3] = [(1000, 0, 0, TASK_BEGINS, 0), (2000, 1000, 1, TASK_BEGINS, 0), (2100, 400, 1, 1, 0)]
    spans = timeline(events, 1, 0)
    assert [(span.task, round(span.begin_us, 6), round(span.end_us, 6)) for span in spans] == [(0, 0.0, 1.0), (1, 1.0, 1.5)]


def test_nothing_written_down_is_an_empty_timeline() -> None:
    assert timeline(np.zeros((2, 4, 8), dtype=EVENT_DTYPE), 1, 0) == []
    assert summary([], program(), 0) == nothing()


def test_a_token_takes_as_long_as_on_its_longest_sm_not_from_the_first_of_all_to_the_last() -> None:
    # An SM that is done with the token before long ago begins to wait for this one at once; another is still at that token.
    early, late = Span(0, "consumer", 0, 0, 0.0, 40.0, ()), Span(1, "consumer", 0, 0, 38.0, 80.0, ())
    assert summary([early, late], program(), 0)["traced_us"] == 42.0
    parts = [Span(1, "storer", 0, 0, 0.0, 10.0, ()), Span(1, "storer", 0, 0, 10.0, 45.0, ())]
    assert summary([early, late, *parts], program(), 0)["traced_us"] == 45.0


def test_the_file_has_every_sm_and_its_slices_nest(tmp_path: Path) -> None:
    spans, _ = spans_of(2)
    write_chrome_trace(tmp_path / "trace.json", spans, program())
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] for event in slices} == {span.sm for span in spans}
    threads: defaultdict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in slices:
        assert event["dur"] >= 0 and event["name"]
        threads[event["pid"], event["tid"]].append(event)
    for thread in threads.values():
        tasks = [event for event in thread if "args" in event]
        assert len(tasks) == len([event for event in thread if "task" in event.get("args", {})])
        assert all(a["ts"] + a["dur"] <= b["ts"] + 0.002 for a, b in pairwise(tasks))
        for wait in (event for event in thread if "args" not in event):
            assert any(t["ts"] - 0.002 <= wait["ts"] and wait["ts"] + wait["dur"] <= t["ts"] + t["dur"] + 0.002 for t in tasks)


@pytest.mark.parametrize(("position", "expected"), [(0, (0, 2)), (1, (0, 3)), (128, (127, 3)), (255, (254, 2))])
def test_the_traced_token_lies_between_two_others_where_it_can(position: int, expected: tuple[int, int]) -> None:
    start, steps = launch(position, 256)
    assert (start, steps) == expected and 0 <= position - start < steps
