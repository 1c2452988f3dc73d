"""Steps of what is published: each is a command that its module takes, into a file of its own, and is done only at one clean commit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL
from threading import Event, Lock
from time import monotonic, sleep

import pytest

from amk.dev.bench_gpu import POSITIONS
from amk.dev.card import card_count, visible_cards
from amk.dev.publish import STEPS, Runner, State, Step, build_all, share_out
from amk.eval.card import Place
from amk.schedule.targets import TARGETS
from amk.tests.dev.test_bench_gpu import refuses

COMMIT = "0123456789abcdef"


def test_every_step_has_a_results_file_of_its_own_with_a_plain_name() -> None:
    files = [step.file.format(card="h200") for step in STEPS.values()]
    assert len(set(files)) == len(files)
    assert [name for name in files if not re.fullmatch(r"[A-Za-z0-9._-]+\.json", name)] == []


def test_every_model_of_the_benchmark_is_published() -> None:
    assert {build.model for step in STEPS.values() for build in step.builds} == set(POSITIONS)


@pytest.mark.skipif(card_count() > 0, reason="says what happens where there is no card")
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_a_command_that_its_module_takes(name: str, tmp_path: Path) -> None:
    """Without a card it gets as far as asking for one: its options are known."""
    command = STEPS[name].command("h200", tmp_path, 2)
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, "card" in ran.stderr) == (3, True), ran.stderr


def test_a_step_is_done_at_the_commit_at_which_it_ended_well(tmp_path: Path) -> None:
    State(tmp_path).keep("1b", {"commit": COMMIT, "processes": 3, "exit_code": 0})
    state = State(tmp_path)
    assert state.done("1b", COMMIT, 3)
    assert not state.done("1b", COMMIT, 1) and not state.done("1b", "another", 3) and not state.done("8b", COMMIT, 3)
    state.keep("1b", {"commit": f"{COMMIT}+changes", "processes": 3, "exit_code": 0})
    assert not state.done("1b", f"{COMMIT}+changes", 3)
    state.keep("1b", {"commit": COMMIT, "processes": 3, "exit_code": 1})
    assert not state.done("1b", COMMIT, 3)


def test_a_step_that_takes_too_long_is_ended_with_what_it_started() -> None:
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    code, seconds = Runner().run(Step("none", (), "", 1), [sys.executable, "-c", child], "0")
    assert code == 124 and seconds < 30
    assert Runner().run(Step("none", (), "", 30), [sys.executable, "-c", "raise SystemExit(7)"], "0")[0] == 7


def test_an_interrupt_just_after_a_step_has_ended_is_that_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        wait(process)
        if timeout is not None:
            raise KeyboardInterrupt
        return 0

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Runner().run(Step("none", (), "", 5), [sys.executable, "-c", ""], "0")


def test_steps_are_shared_out_and_those_beside_transformers_come_last_and_one_by_one() -> None:
    alone = [name for name, step in STEPS.items() if step.alone]
    assert {"prefill", "graph", "compile-1b"} <= set(alone) and "1b" not in alone
    lock, running, most, ended = Lock(), set[str](), dict[str, int](), list[tuple[str, str]]()

    def measure(name: str, card: str) -> None:
        with lock:
            running.add(name)
            for other in running:
                most[other] = max(most.get(other, 0), len(running))
        sleep(0.02)
        with lock:
            running.remove(name)
            ended.append((name, card))

    share_out(list(STEPS), ["3", "5"], measure, lambda: None)
    assert sorted(name for name, _ in ended) == sorted(STEPS)
    assert [name for name, _ in ended][-len(alone) :] == alone and all(most[name] == 1 for name in alone)
    assert max(most.values()) == 2 and {card for _, card in ended} == {"3", "5"}


def test_an_interrupt_ends_what_every_card_does(tmp_path: Path) -> None:
    runner, step, begun = Runner(), Step("none", (), "", 60), Event()
    sleeps = [sys.executable, "-c", "import time; time.sleep(60)"]

    def measure(name: str, card: str) -> None:
        if name == "8b":
            begun.wait(30)
            raise KeyboardInterrupt
        begun.set()
        assert runner.run(step, sleeps, card)[0] == -SIGKILL
        assert runner.run(step, sleeps, card) == (130, 0.0)  # nothing begins after that

    began = monotonic()
    with pytest.raises(KeyboardInterrupt):
        share_out(["1b", "8b"], ["0", "1"], measure, runner.end_all)
    assert monotonic() - began < 30 and not runner.under_way


def test_a_step_sees_its_own_card_alone(capfd: pytest.CaptureFixture[str]) -> None:
    shows = [sys.executable, "-c", "import os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    assert Runner().run(Step("none", (), "", 30), shows, "GPU-5")[0] == 0
    assert capfd.readouterr().out == "GPU-5\n"


@pytest.mark.parametrize(("named", "found", "cards"), [(None, 2, ["0", "1"]), ("3,GPU-5", 8, ["3", "GPU-5"]), ("", 0, []), (None, 0, [])])
def test_cards_are_called_as_cuda_calls_them(named: str | None, found: int, cards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("amk.dev.card.card_count", lambda: found)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_cards() == cards


def test_steps_that_need_no_kernels_start_no_processes() -> None:
    build_all([STEPS["quality"]], Place(TARGETS["h200"], "cuda", None))


@pytest.mark.skipif(card_count() > 0, reason="says what happens where there is no card")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 3, "card"),
        (("--only", "70b"), 2, "'70b'"),
        (("--processes", "0"), 2, "at least 1"),
        (("--cards", "0"), 2, "at least 1"),
        (("--folder", "/dev/null"), 2, "--folder: must be"),
    ],
)
def test_publish_says_what_it_cannot_do(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    refuses("publish", arguments, code, words, tmp_path)
