"""What tests/conftest.py promises to every run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from amk.dev.card import card_count
from amk.tests import conftest

ROOT = Path(__file__).resolve().parents[2]

SUITE = """
import os
import pytest

@pytest.mark.cuda
def test_launch():
    raise AssertionError("launched")

def test_plain(record_property):
    assert os.environ["OMP_NUM_THREADS"] == "1"
    record_property("samples_us", [1.5, 2.5])
"""


@pytest.fixture
def run(tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A run of SUITE under this conftest on a machine whose cards are hidden."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_suite.py").write_text(SUITE, encoding="utf-8")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTEST_"))}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "dev" / "checkout")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--results", "results", "tests"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_card_tests_are_deselected_without_a_card(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, run.stdout
    assert "1 passed, 1 deselected" in run.stdout


def test_results_file_keeps_outcomes_and_what_tests_recorded(run: subprocess.CompletedProcess[str], tmp_path: Path) -> None:
    written = json.loads((tmp_path / "results" / "gpu-tests.json").read_text(encoding="utf-8"))
    assert list(written["tests"]) == ["tests/test_suite.py::test_plain"]
    assert written["tests"]["tests/test_suite.py::test_plain"]["outcome"] == "passed"
    assert written["tests"]["tests/test_suite.py::test_plain"]["samples_us"] == [1.5, 2.5]


@pytest.mark.parametrize(
    ("status", "complete"),
    [(pytest.ExitCode.OK, True), (pytest.ExitCode.TESTS_FAILED, True), (pytest.ExitCode.INTERRUPTED, False), (2, False), (3, False)],
)
def test_a_run_that_was_interrupted_is_not_complete(status: int, complete: bool, tmp_path: Path) -> None:
    path = tmp_path / "gpu-tests.json"
    conftest.ResultsFile(path).pytest_sessionfinish(exitstatus=status)
    assert json.loads(path.read_text(encoding="utf-8"))["complete"] is complete


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_hidden_cards_are_not_counted(hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert card_count() == 0


@pytest.mark.parametrize(("worker", "cards", "expected"), [("gw0", 4, "0"), ("gw5", 4, "1"), ("gw1", 1, None), ("", 4, None)])
def test_workers_take_the_cards_in_turn(worker: str, cards: int, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "?")  # so that it is put back
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(conftest, "card_count", lambda: cards)
    conftest._take_a_card(SimpleNamespace(workerinput={"workerid": worker}))  # type: ignore[arg-type]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == expected
