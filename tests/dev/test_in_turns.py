"""Checkouts in turns: each answers from its own process, and a difference is one only beyond the noise."""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import amk.dev.in_turns
from amk.dev.in_turns import TWIN, NothingToTime, Worker, compared, main, measure
from amk.dev.in_turns_worker import serve
from amk.dev.judged import NotCorrect

ROOT = Path(__file__).resolve().parents[2]
# Says where its `amk` would come from and counts its samples up from the number in its checkout.
ANSWERS = """
import json, os, sys
checkout = os.environ["PYTHONPATH"].split(os.pathsep)[0]
us = float(open(os.path.join(checkout, "us")).read())
print(json.dumps({"facts": {"program_digest": "p", "outputs_sha256": "b" if us < 700 else "other"}}), flush=True)
for _ in sys.stdin:
    print(json.dumps({"us": us}), flush=True)
"""
REFUSES = 'print(\'{"problem": "a knob was refused"}\', flush=True)'
DIES = "import sys; sys.exit(7)"


def checkout(folder: Path, us: float) -> Path:
    (folder / "dev" / "checkout").mkdir(parents=True)
    (folder / "dev" / "checkout" / "us").write_text(str(us))
    return folder


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "worker.py"
    path.write_text(text)
    return path


def asked(**changes: Any) -> Any:
    return argparse.Namespace(**{"config": "{}", "position": 128, "chain": False, "rounds": 5} | changes)


def test_every_checkout_is_sampled_from_its_own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(amk.dev.in_turns, "WORKER", script(tmp_path, ANSWERS))
    rows = measure("toy", {"base": checkout(tmp_path / "a", 600.0), "change": checkout(tmp_path / "b", 720.0)}, asked())
    assert [(row["name"], row["us"], row["same_bits"], row["beyond_noise"]) for row in rows] == [
        ("base", 600.0, True, False),
        ("change", 720.0, False, True),
        (TWIN, 600.0, True, False),
    ]
    assert rows[1]["effect_pct"] == pytest.approx(20) and all(len(row["samples_us"]) == 5 for row in rows)


@pytest.mark.parametrize(("text", "words"), [(REFUSES, "slow: a knob was refused"), (DIES, "slow: its process ended with exit code 7")])
def test_a_checkout_with_nothing_to_time_says_why(tmp_path: Path, text: str, words: str) -> None:
    with Worker("slow", tmp_path, [], script(tmp_path, text)) as worker, pytest.raises(NothingToTime, match=words):
        worker.facts()
    assert worker.process.returncode is not None


def test_a_process_that_dies_between_samples_is_told(tmp_path: Path) -> None:
    once = 'import json; print(json.dumps({"facts": {}}), flush=True); input(); print(json.dumps({"us": 5}), flush=True)'
    with Worker("short", tmp_path, [], script(tmp_path, once)) as worker:
        assert worker.facts() == {} and worker.sample_us() == 5
        with pytest.raises(NothingToTime, match="short: its process ended with exit code 0"):
            worker.sample_us()


def test_what_the_two_of_the_first_differ_by_is_noise() -> None:
    rows = compared(["base", "change"], [[600.0] * 5, [604.0] * 5, [606.0] * 5])
    assert [row["name"] for row in rows] == ["base", "change", TWIN]
    assert rows[1]["noise_pct"] == pytest.approx(1) and not rows[1]["beyond_noise"]
    assert compared(["base", "change"], [[600.0] * 5, [607.0] * 5, [606.0] * 5])[1]["beyond_noise"]


def said(make: Callable[[], Any], lines: str) -> list[dict[str, Any]]:
    told = io.StringIO()
    serve(make, io.StringIO(lines), told)
    return [json.loads(line) for line in told.getvalue().splitlines()]


def test_a_worker_answers_each_line_with_a_sample() -> None:
    samples = iter([3.0, 4.0])
    assert said(lambda: (lambda: next(samples), {"registers": 9}), "\n\n") == [{"facts": {"registers": 9}}, {"us": 3.0}, {"us": 4.0}]


def test_a_worker_that_may_not_be_timed_says_so() -> None:
    def wrong() -> Any:
        raise NotCorrect("logit error at position 3")

    assert said(wrong, "\n") == [{"problem": "logit error at position 3"}]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["base"], "must name a checkout of this project, but got 'base'"),
        (["base=/nowhere"], "must name a checkout"),
        ([f"base={ROOT}", f"base={ROOT}"], "must have a name of its own"),
        ([f"{TWIN}={ROOT}"], "must have a name of its own"),
        ([f"base={ROOT}", "--models", "nothing"], "--models: unknown model 'nothing'"),
        ([f"base={ROOT}", "--config", "{"], "--config: must be JSON"),
        ([f"base={ROOT}", "--position", "9216"], "--position: must be from 0 to 9215"),
        ([f"base={ROOT}", "--position", "-1"], "--position: must be from 0 to 9215"),
        ([f"base={ROOT}", "--rounds", "0"], "--rounds: must be at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_card_is_looked_for(
    arguments: list[str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["in_turns", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and words in capsys.readouterr().err
