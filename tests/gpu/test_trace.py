"""A traced launch on the card: every SM's actors are there, nothing is lost, and the times of an actor add up to the token's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amk.eval.card import choose
from amk.eval.session import Session
from amk.eval.trace import trace

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize("model", ["small", "smollm2-135m-shape", "llama-3.2-1b-shape"])
def test_a_token_is_traced_on_every_sm(model: str, tmp_path: Path, record_property: Any) -> None:
    session = Session(model, choose(None, "cuda"))
    candidate = session.prepare({})
    found = trace(session, candidate, position=128, out=tmp_path / "trace.json")
    assert found["verdict"]["correct"], found["verdict"]["notes"]
    for name in ("traced_us", "lost_events", "by_actor", "by_task"):
        record_property(name, found[name])
    assert found["lost_events"] == 0
    slices = [e for e in json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"] if e["ph"] == "X"]
    assert candidate.program is not None
    assert {e["pid"] for e in slices} == {sm for sm, queue in enumerate(candidate.program.program.queues) if queue}
    busiest = max(sum(row[f"{phase}_us"] for phase in ("wait", "load", "compute", "publish")) for row in found["by_actor"])
    assert 0.5 * found["traced_us"] < busiest < 1.5 * found["traced_us"]
    # Tracing makes a token slower, but it is the same token.
    assert found["verdict"]["latency_us"] is None or 0.8 * found["verdict"]["latency_us"] < found["traced_us"]
