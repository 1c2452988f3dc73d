"""What every test run has in common: one torch thread a worker, the card's tests only where there is a card, results files."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from amk.dev.card import card_count
from amk.dev.provenance import write_results

ROOT = Path(__file__).resolve().parents[1]
# Each worker of pytest-xdist has one core, and so has what it starts.
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", metavar="DIR", default=None, help="write what the card's tests found and recorded into DIR")


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module loads torch or numpy.
    for variable in ONE_THREAD:
        os.environ.setdefault(variable, "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # `pythonpath` of pyproject.toml serves this process; the processes that tests start inherit this.
    inherited = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "dev" / "checkout"), inherited]))
    _take_a_card(config)
    folder = config.getoption("--results")
    if folder and not hasattr(config, "workerinput"):  # one process collects what the workers of pytest-xdist report
        config.pluginmanager.register(ResultsFile(config.rootpath / folder / "gpu-tests.json"))


def _take_a_card(config: pytest.Config) -> None:
    """Workers of pytest-xdist (`-n`) share the machine's cards out among them."""
    worker, cards = getattr(config, "workerinput", {}).get("workerid", ""), card_count()
    if cards > 1 and worker and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(int(worker.removeprefix("gw")) % cards)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a card its tests are deselected, not skipped: on a card none of them may hide behind a skip."""
    if card_count():
        return
    without = [item for item in items if item.get_closest_marker("cuda")]
    items[:] = [item for item in items if not item.get_closest_marker("cuda")]
    config.hook.pytest_deselected(items=without)


class ResultsFile:
    """Collects each test's outcome, seconds and what it gave to pytest's `record_property`, and writes them with their provenance.

    They are written after each failure and each minute too: a run that is killed leaves what it had found, marked as not complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.written = time.monotonic()
        self.tests: dict[str, dict[str, object]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            recorded = dict(report.user_properties)
            self.tests[report.nodeid] = {"outcome": report.outcome, "seconds": round(report.duration, 3), **recorded}
            if report.outcome != "passed":
                self.tests[report.nodeid]["why"] = str(report.longrepr)[-2000:]
            if report.outcome != "passed" or time.monotonic() - self.written > 60:
                self.write(complete=False)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        self.write(complete=exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED))

    def write(self, complete: bool) -> None:
        write_results(self.path, {"complete": complete, "tests": self.tests})
        self.written = time.monotonic()
