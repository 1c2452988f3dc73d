"""Lines of several processes as one: medians of medians, the spread, and every raw sample."""

from __future__ import annotations

import pytest

from amk.dev.fresh import combined
from amk.tests.dev.results_file import FLOOR, baseline, row


def test_medians_of_medians_and_their_spread() -> None:
    (found,) = combined([[row(latency_us=610.0)], [row(latency_us=600.0)], [row(latency_us=900.0)]])
    assert (found["latency_us"], found["process_medians_us"]) == (610.0, [610.0, 600.0, 900.0])
    assert found["spread_pct"] == pytest.approx(100 * 300 / 610)
    assert found["pct_of_roofline"] == pytest.approx(100 * FLOOR / 610)
    assert found["samples_us"] == [610.0] * 5 + [600.0] * 5 + [900.0] * 5
    graph = found["baselines"][0]
    assert (graph["latency_us"], graph["ratio"], len(graph["samples_us"]), graph["samples"]["n"]) == (2440.0, 4.0, 9, 9)


def test_one_process_keeps_what_it_found() -> None:
    alone = row()
    (found,) = combined([[alone]])
    assert {key: found[key] for key in alone if key != "baselines"} == {key: alone[key] for key in alone if key != "baselines"}
    assert found["spread_pct"] == 0.0


def test_a_baseline_that_one_process_could_not_time_has_no_time() -> None:
    broken = row(baselines=[baseline("cuda-graph", None, status="refused"), baseline("torch-compile", 1200.0, 2.0)])
    whole = row(baselines=[baseline("cuda-graph", 2400.0, 4.0), baseline("torch-compile", 1200.0, 2.0)])
    (found,) = combined([[whole], [broken]])
    assert [b["status"] for b in found["baselines"]] == ["refused", "measured"]
    assert found["baselines"][0]["latency_us"] is None


@pytest.mark.parametrize(
    "other", [[], [row(position=17)], [row(binary_digest="another")], [row(outputs_sha256="other bits")], [row(), row()]]
)
def test_processes_that_measured_different_things_are_not_combined(other: list[dict[str, object]]) -> None:
    with pytest.raises(ValueError, match="must"):
        combined([[row()], other])
