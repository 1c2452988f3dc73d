"""The worker process: it serves, says what went wrong, and can be killed at any time without harm to the next request."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from amk.eval import card as live
from amk.eval import worker as served
from amk.eval.candidate import prepare
from amk.eval.card import Card, Place, listed_processes, others
from amk.eval.shapes import Trace
from amk.eval.worker import Event, RemoteError, Request, Worker, WorkerDied, unfinished
from amk.models.registry import describe
from amk.schedule.targets import TARGETS

CPU = Place(TARGETS["h200"], "cpu", None)
FILES = ("megakernel.cu", "megakernel.sm_90a.cubin", "records.bin", "report.json")


@pytest.fixture
def worker() -> Iterator[Worker]:
    """The shared worker; killed afterwards."""
    shared = Worker.shared()
    yield shared
    Worker.shared().kill()


def evaluate(worker: Worker, model: str = "toy", config: Any = None, **options: Any) -> Any:
    events = options.pop("on_event", lambda kind, value: None)
    candidate = prepare(describe("toy"), CPU, config or {})
    return worker.call(Request("evaluate", model, CPU, candidate), events, **options)


def test_a_worker_serves_one_request_after_another_and_reports_on_the_way(worker: Worker) -> None:
    told: list[str] = []
    verdict = evaluate(worker, on_event=lambda kind, value: told.append(kind))
    assert verdict["correct"] and set(told) == {"progress"}
    assert evaluate(worker, config={"nonsense": 1})["status"] == "rejected"
    assert Worker.shared() is worker


def test_every_verb_goes_through_a_worker(worker: Worker, tmp_path: Path) -> None:
    told: list[Any] = []

    def ask(verb: str, **options: Any) -> Any:
        request = Request(verb, "toy", CPU, prepare(describe("toy"), CPU, {}), options)
        return worker.call(request, lambda kind, value: told.append(value) if kind == "token" else None)

    assert [row["position"] for row in ask("bench", positions=[3])["rows"]] == [3]
    assert ask("compile", folder=tmp_path)["files"] == [str(tmp_path / name) for name in FILES]
    assert ask("generate", prompt_ids=[1, 2], max_tokens=3, stream=True)["generated"] == [token for _, token, _ in told] != []


def test_a_trace_of_a_refused_config_is_its_verdict_alone_and_one_outside_the_context_is_an_error(worker: Worker, tmp_path: Path) -> None:
    def ask(config: Any, position: int) -> Any:
        candidate = prepare(describe("toy"), CPU, config)
        return worker.call(Request("trace", "toy", CPU, candidate, {"position": position, "out": tmp_path / "t.json"}), lambda *_: None)

    found = ask({"nonsense": 1}, 3)
    assert (found["verdict"]["status"], found["file"], found["by_task"]) == ("rejected", None, [])
    assert {"model", "gpu", "device", *found} == set(Trace.__annotations__)
    with pytest.raises(RemoteError, match=r"^position: must lie in 0\.\.2047") as caught:
        ask({}, 2048)
    assert caught.value.exit_code == 2 and list(tmp_path.iterdir()) == []


def test_a_candidate_for_another_model_than_the_fetched_one_is_prepared_anew(worker: Worker) -> None:
    other = replace(describe("toy"), dtype="bf16")
    verdict = worker.call(Request("evaluate", "toy", CPU, prepare(other, CPU, {})), lambda kind, value: None)
    assert verdict["correct"] and verdict["dtype"] == describe("toy").dtype != other.dtype


def test_a_worker_ends_when_it_is_asked_no_more_and_the_next_request_starts_another() -> None:
    idle = Worker(idle_s=0.01)
    try:
        before = idle.pid
        idle._process.join()
        assert evaluate(idle)["correct"] and idle.pid != before
    finally:
        idle.kill()


def test_an_error_of_a_request_keeps_its_sentence_and_exit_code(worker: Worker) -> None:
    with pytest.raises(RemoteError, match="unknown model") as caught:
        evaluate(worker, model="./nowhere")
    assert caught.value.exit_code == 2


def test_a_worker_that_says_nothing_in_time_is_killed_and_replaced(worker: Worker) -> None:
    with pytest.raises(WorkerDied) as caught:
        evaluate(worker, timeout_s=0.0)
    assert caught.value.kind == "timeout"
    assert Worker.shared() is not worker
    assert evaluate(Worker.shared())["correct"]


def test_a_worker_that_dies_in_the_middle_is_a_crash_and_replaced(worker: Worker) -> None:
    def shoot(kind: str, value: Any) -> None:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)

    with pytest.raises(WorkerDied) as caught:
        evaluate(worker, on_event=shoot)
    assert caught.value.kind == "crash"
    assert Worker.shared() is not worker


def test_a_request_that_its_caller_abandons_leaves_nothing_for_the_next(worker: Worker) -> None:
    def interrupt(kind: str, value: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(worker, on_event=interrupt)
    assert Worker.shared() is not worker


def test_a_bug_in_the_worker_is_told_to_the_parent(worker: Worker, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WorkerDied, match="TypeError"):
        worker.call(Request("bench", "toy", CPU, prepare(describe("toy"), CPU, {}), {"nonsense": 1}), lambda kind, value: None)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("result", "expected"),
    [({"status": "correct"}, False), ({"status": "crash"}, True), ({"verdict": {"status": "timeout"}}, True), ({"text": "x"}, False)],
)
def test_a_launch_that_did_not_finish_is_its_workers_last(result: dict[str, Any], expected: bool) -> None:
    assert unfinished(result) == expected


@pytest.mark.parametrize(("kind", "goes"), [("result", False), ("error", False), ("last", True), ("failed", True), ("died", True)])
def test_a_worker_whose_context_may_be_damaged_is_killed_after_its_answer(kind: str, goes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker would say after a launch that did not finish is said in its place."""
    said: list[Event] = [("begun", None), (kind, ("a sentence", 1))]
    idle = Worker()
    try:
        monkeypatch.setattr(idle, "_next", lambda timeout_s: said.pop(0))
        with suppress(RemoteError, WorkerDied):
            evaluate(idle)
        assert idle._process.is_alive() != goes
    finally:
        idle.kill()


class Asked:
    """The worker's end of a pipe on which requests lie; `told` is what it sends back."""

    def __init__(self, *requests: Request) -> None:
        self.requests, self.told = list(requests), list[Event]()

    def poll(self, timeout_s: float) -> bool:
        return bool(self.requests)

    def recv(self) -> Request:
        return self.requests.pop(0)

    def send(self, event: Event) -> None:
        self.told.append(event)


def test_a_session_serves_one_model_in_one_place_and_says_when_a_launch_did_not_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    candidate, elsewhere = prepare(describe("toy"), CPU, {}), replace(CPU, target=TARGETS["b200"])
    asked = [("toy", CPU), ("toy", CPU), ("toy", elsewhere), ("toy-2L", elsewhere)]
    sessions: list[tuple[str, Place]] = []
    status = iter(("correct", "timeout", "crash", "incorrect"))
    monkeypatch.setattr(served, "Session", lambda model, place, *_: sessions.append((model, place)) or sessions[-1])
    monkeypatch.setattr(served, "run", lambda session, request, on_token: {"status": next(status), "session": session})
    pipe: Any = Asked(*(Request("evaluate", model, place, candidate) for model, place in asked))
    served._serve(pipe, 0.0)
    ends = [event for event in pipe.told if event[0] != "begun"]
    assert [kind for kind, _ in ends] == ["result", "last", "last", "result"]
    assert [result["session"] for _, result in ends] == asked and len(sessions) == 3


@pytest.mark.parametrize(("listed", "expected"), [([], []), ([7], []), ([7, 8], [8]), ([9], []), ([9, 8], [8])])
def test_our_own_process_is_not_company_even_under_the_hosts_number(listed: list[int], expected: list[int]) -> None:
    assert others(listed, own=7) == expected


def test_processes_on_the_other_cards_of_a_machine_are_nobodys_company(monkeypatch: pytest.MonkeyPatch) -> None:
    card, asked = Card("NVIDIA H200", "0123456789abcdef0123456789abcdef", TARGETS["h200"]), []
    monkeypatch.setattr(live, "live_card", lambda: card)
    monkeypatch.setattr(live.subprocess, "run", lambda command, **options: asked.append(command) or SimpleNamespace(stdout="7\n"))
    assert listed_processes() == [7]
    assert "--id=GPU-01234567-89ab-cdef-0123-456789abcdef" in asked[0]
    monkeypatch.setattr(live, "live_card", lambda: None)
    assert listed_processes() == []
