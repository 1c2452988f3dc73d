"""Baselines on the card: both agree with the source model and are timed in turns with ours, at the same positions."""

from __future__ import annotations

from typing import Any

import pytest

from amk.eval.baselines import BUILDERS
from amk.eval.card import choose
from amk.eval.session import Session

pytestmark = pytest.mark.cuda


def test_both_baselines_are_right_and_timed_in_the_same_run(record_property: Any) -> None:
    session = Session("small", choose(None, "cuda"))
    table = session.bench(session.prepare({}), [16, 128], baselines=True)
    assert table["verdict"]["correct"], table["verdict"]["notes"]
    for row in table["rows"]:
        found = {baseline["name"]: baseline for baseline in row["baselines"]}
        record_property(f"position {row['position']}", {"latency_us": row["latency_us"], "baselines": row["baselines"]})
        assert set(found) == set(BUILDERS)
        for baseline in found.values():
            assert baseline["status"] == "measured", baseline
            assert len(baseline["samples_us"]) == len(row["samples_us"])
            assert baseline["ratio"] == baseline["latency_us"] / row["latency_us"]
