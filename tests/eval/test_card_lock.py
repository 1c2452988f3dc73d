"""One process on a card at a time: who comes second waits, is told for whom, and gives up in one sentence; death releases."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from amk.eval.card_lock import card_lock
from amk.eval.errors import EnvironmentProblem

HOLD = "import sys\nfrom amk.eval.card_lock import card_lock\nwith card_lock('c', print):\n print('held', flush=True)\n sys.stdin.read()"
WRITERS, EACH = 4, 20


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMK_CACHE", str(tmp_path))


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """A process that holds the card until its stdin ends or it is killed."""
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_who_comes_second_is_told_the_holder_and_gives_up_after_the_limit(holder: subprocess.Popen[str]) -> None:
    told: list[str] = []
    with pytest.raises(EnvironmentProblem, match=rf"process {holder.pid} of AMK") as caught, card_lock("c", told.append, limit_s=0.3):
        pass
    assert caught.value.exit_code == 3
    assert [f"process {holder.pid} " in line for line in told] == [True]


def test_another_card_is_free(holder: subprocess.Popen[str]) -> None:
    with card_lock("d", pytest.fail, limit_s=0):
        pass


def test_the_second_goes_on_when_the_first_ends(holder: subprocess.Popen[str]) -> None:
    assert holder.stdin is not None
    end = holder.stdin.close
    with card_lock("c", lambda _: end()):
        pass


def test_a_holder_that_is_killed_holds_nothing(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with card_lock("c", pytest.fail, limit_s=0):
        pass


def test_a_process_that_has_the_card_may_take_it_again_and_keeps_it_until_the_outer_end() -> None:
    asks = f"{HOLD.splitlines()[1]}\nwith card_lock('c', print, 0): pass"
    with card_lock("c", pytest.fail):
        with card_lock("c", pytest.fail):
            pass
        ran = subprocess.run([sys.executable, "-c", asks], capture_output=True, text=True)
        assert f"process {os.getpid()} of AMK" in ran.stderr
    assert subprocess.run([sys.executable, "-c", asks]).returncode == 0


def test_an_error_inside_releases_the_card() -> None:
    with pytest.raises(KeyError), card_lock("c", pytest.fail):
        raise KeyError
    with card_lock("c", pytest.fail, limit_s=0):
        pass


def count_up(path: Path) -> None:
    for _ in range(EACH):
        with card_lock("c", lambda _: None):
            path.write_text(str(int(path.read_text()) + 1))


def test_no_two_processes_have_the_card_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amk.eval.card_lock.POLL_S", 0.001)
    counter = tmp_path / "counter"
    counter.write_text("0")
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=count_up, args=(counter,)) for _ in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WRITERS
    assert counter.read_text() == str(WRITERS * EACH)
