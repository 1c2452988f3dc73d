"""The one API: what it prepares, writes down, refuses and keeps to itself."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from amk import harness
from amk.eval import candidate as candidates
from amk.eval.errors import EnvironmentProblem, EvalError, Rejected, UsageError
from amk.flywheel.log import read_rows
from amk.flywheel.trials import read_trials

BAD: dict[str, Any] = {"tiling": {"gemv": {"N_tile": 7}}, "bogus": 1}
TOY: dict[str, Any] = {"model_id": "toy", "gpu": "h200", "device": "cpu"}
WRITERS, EACH = 4, 5
TOKEN = "hf_ThisIsNobodysToken"


class Unshown:
    def __repr__(self) -> str:
        raise RuntimeError("no")


VERBS: dict[str, Callable[..., Any]] = {
    "evaluate": harness.evaluate,
    "bench": lambda **options: harness.bench(positions=[3, 100], **options),
    "compile": lambda **options: harness.compile_model(out="out", **options),
    "generate": lambda **options: harness.generate(prompt_ids=[1, 2, 3], max_tokens=2, **options),
    "propose": lambda device, **options: harness.propose(**options),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_lowers_and_proves_its_config_once(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def counted(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return own(*arguments, **options)

        return call

    for name in ("compile_program", "validate"):
        monkeypatch.setattr(candidates, name, counted(name, getattr(candidates, name)))
    VERBS[verb](**TOY)
    assert calls == ["compile_program", "validate"]


@pytest.mark.parametrize("verb", ("evaluate", "bench", "compile"))
def test_a_refused_config_is_a_verdict_with_all_its_reasons(verb: str) -> None:
    result = VERBS[verb](**TOY, config_dict=BAD)
    verdict = result.get("verdict", result)
    assert (verdict["status"], verdict["valid"]) == ("rejected", False)
    assert "N_tile" in verdict["rejected_reason"] and "bogus" in verdict["rejected_reason"]
    assert list(Path().iterdir()) == []


def test_a_file_that_cannot_be_written_is_named_before_anything_is_judged() -> None:
    Path("out", "report.json").mkdir(parents=True)
    with pytest.raises(UsageError, match="^out: must be a file to write, but out/report.json is not"):
        harness.compile_model(**TOY, out="out")
    assert [path.name for path in Path("out").iterdir()] == ["report.json"]


def test_an_incumbent_that_is_no_object_is_rejected() -> None:
    with pytest.raises(Rejected, match="^incumbent: config: must be an object"):
        harness.propose("toy", "h200", incumbent="x")  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    found = harness.generate(**TOY, prompt_ids=np.array([1, 2]), max_tokens=np.int64(2), temperature=np.float32(0))
    assert json.loads(json.dumps(found["tokens"]))[:2] == [1, 2] and len(found["generated"]) == 2
    assert [row["position"] for row in harness.bench(**TOY, positions=np.array([3]))["rows"]] == [3]


@pytest.mark.parametrize("call", [lambda: harness.propose("toy", "h200", incumbent=BAD), lambda: VERBS["generate"](**TOY, config_dict=BAD)])
def test_where_a_program_is_needed_a_refused_config_is_judged_and_failed_not_misused(call: Callable[[], Any]) -> None:
    with pytest.raises(Rejected, match=r"N_tile.*bogus") as caught:
        call()
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: harness.evaluate("toy", "h200", {}, "tpu"), "device"),
        (lambda: harness.evaluate("toy", "h2000"), "gpu"),
        (lambda: harness.loop("toy", "h200", 0), "budget"),
        (lambda: harness.loop("toy", "h200", explore_fraction=1.5), "explore_fraction"),
        (lambda: harness.loop("toy", "h200", explore_fraction=float("nan")), "explore_fraction"),
        (lambda: harness.loop("toy", "h200", device="cpu", results_path="/proc/amk/results.tsv"), "^results"),
        (lambda: harness.evaluate(**TOY, results_path="/proc/amk/results.tsv"), "^results"),
        (lambda: harness.compile_model(**TOY, out="/proc/amk"), "^out"),
        (lambda: harness.trace("toy", "/proc/amk/trace.json", "h200"), "^out"),
        (lambda: harness.trace("toy", ".", "h200"), "^out"),
        (lambda: harness.bench("toy", "h200", batch=8, baselines=True), "batch"),
        (lambda: harness.generate("toy", "h200"), "prompt"),
        (lambda: harness.generate("toy", "h200", prompt="a", prompt_ids=[1]), "prompt"),
        (lambda: harness.generate(**TOY, prompt_ids=[]), "prompt"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], max_tokens=10**30), "context"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], stop="end"), "stop.*'end' alone"),
        (lambda: harness.bench(**TOY, positions=[]), "positions"),
        (lambda: harness.bench(**TOY, positions=[10**30]), "positions"),
        (lambda: harness.verify(programs=0, mutants=0), "programs and mutants"),
        (lambda: harness.verify(minutes=float("nan")), "minutes"),
        (lambda: harness.propose(5), "^model"),  # type: ignore[arg-type]
        (lambda: harness.propose("toy", ["h200"]), "^gpu"),  # type: ignore[arg-type]
        (lambda: harness.evaluate(**TOY, batch=8.0), "^batch: must be a whole number, but got 8.0"),
        (lambda: harness.evaluate(**TOY, batch=3), "^batch: must be one of 1, 8, 16, but got 3"),
        (lambda: harness.bench(**TOY, batch=0), "^batch: must be one of 1, 8, 16, but got 0"),
        (lambda: harness.loop("toy", "h200", seed=-1), "^seed: must be at least 0"),
        (lambda: harness.verify(seed=-1), "^seed: must be at least 0"),
        (lambda: harness.compile_model(**TOY, out=""), "^out: must be a path, but got an empty text"),
        (lambda: harness.evaluate(**TOY, results_path=b"x"), "^results: must be a path"),
        (lambda: harness.evaluate(**TOY, results_path="x", corpus_path=5), "^corpus: must be a path"),
        (lambda: harness.loop("toy", "h200", float("nan")), "^budget"),  # type: ignore[arg-type]
        (lambda: harness.loop("toy", "h200", "2"), "^budget"),  # type: ignore[arg-type]
        (lambda: harness.loop("toy", "h200", seed=[1]), "^seed"),  # type: ignore[arg-type]
        (lambda: harness.loop("toy", "h200", explore_fraction="x"), "^explore_fraction"),  # type: ignore[arg-type]
        (lambda: harness.generate(**TOY, prompt_ids=[True]), "^prompt_ids"),
        (lambda: harness.generate(**TOY, prompt_ids="12"), "^prompt_ids"),
        (lambda: harness.generate(**TOY, prompt_ids=5), "^prompt_ids"),
        (lambda: harness.generate(**TOY, prompt=5), "^prompt"),
        (lambda: harness.generate(**TOY, prompt="\ud800"), "^prompt: must be Unicode text"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], stop=["a", "\ud800"]), "^stop: must be Unicode text"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], max_tokens=2.5), "^max_tokens"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], on_token="print"), "^on_token"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], temperature="1"), "^temperature"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], top_k=1.5), "^top_k"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], seed=None), "^seed"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], stop=[5]), "^stop"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], stop=5), "^stop"),
        (lambda: harness.bench(**TOY, positions=[1.5]), "^positions"),
        (lambda: harness.bench(**TOY, positions="16"), "^positions"),
        (lambda: harness.trace(**TOY, out=None), "^out"),
        (lambda: harness.trace(**TOY, out="x", position=1.5), "^position"),
        (lambda: harness.compile_model(**TOY, out=5), "^out"),
        (lambda: harness.verify(programs=1.5), "^programs"),  # type: ignore[arg-type]
        (lambda: harness.verify(minutes="5"), "^minutes"),  # type: ignore[arg-type]
        (lambda: harness.verify(programs=1, minutes=-(10**300)), "^minutes: must be a positive"),
        (lambda: harness.verify(programs=1, mutants=0, minutes=10**400), "^minutes: must be a number that a float can hold, but got 1000"),
        (lambda: harness.generate(**TOY, prompt_ids=[1], temperature=10**400), "^temperature: must be a number that a float can hold"),
        (lambda: harness.verify(progress=3), "^progress: must be a function, but got 3"),  # type: ignore[arg-type]
        (lambda: harness.evaluate(**TOY, progress=3), "^progress: must be a function, but got 3"),
        (lambda: harness.evaluate(**TOY, progress=0), "^progress: must be a function, but got 0"),
        (lambda: harness.loop("toy", "h200", 1, "cpu", progress="print"), "^progress"),  # type: ignore[arg-type]
        (lambda: harness.loop("toy", "h200", 1, "cpu", on_trial=3), "^on_trial: must be a function, but got 3"),  # type: ignore[arg-type]
        (lambda: harness.evaluate(**TOY, results_path="a\0b"), r"^results: must be a path without zero bytes, but got 'a\\x00b'"),
        (lambda: harness.evaluate(**TOY, results_path="x", corpus_path="a\0b"), r"^corpus: must be a path without zero bytes, but got 'a"),
        (
            lambda: harness.evaluate(**TOY, results_path="x", corpus_path="./x"),
            "^corpus: must be another file than the results, but both are x",
        ),
        (lambda: harness.evaluate(**TOY, results_path="corpus.jsonl"), "^corpus: must be another file than the results"),
        (lambda: harness.evaluate(**TOY, results_path="runs"), "^results: must be another place than the folder of trials"),
        (lambda: harness.evaluate(**TOY, results_path="x", corpus_path="runs"), "^corpus: must be another place than the folder of trials"),
        (lambda: harness.evaluate(Unshown()), "^model: must be a text, but got a Unshown that cannot be shown"),  # type: ignore[arg-type]
    ],
)
def test_a_misuse_is_named_before_anything_is_judged(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call()


@pytest.mark.parametrize(
    "call", [lambda: harness.bench(**TOY, baselines=True, positions=[3]), lambda: harness.trace(out="new/trace.json", **TOY)]
)
def test_what_only_a_card_can_measure_is_refused_on_the_cpu_before_anything_is_judged(call: Callable[[], Any]) -> None:
    with pytest.raises(EnvironmentProblem, match="live card, but device cpu was asked for"):
        call()
    assert list(Path().iterdir()) == []


def test_a_batch_is_judged_row_by_row_and_its_verdict_says_so(tmp_path: Path) -> None:
    bf16 = {**TOY, "model_id": "toy-2L"}
    table = harness.bench(**bf16, batch=8, positions=[3])
    verdict, (row,) = table["verdict"], table["rows"]
    assert (verdict["correct"], verdict["batch"], verdict["latency_kind"]) == (True, 8, "predicted")
    for each in (verdict, row):
        assert each["tokens_per_second"] == pytest.approx(8e6 / each["latency_us"])
    single = harness.evaluate(**bf16)
    assert (single["batch"], single["latency_us"] <= verdict["latency_us"]) == (1, True)
    assert harness.evaluate(**bf16, batch=8, results_path=tmp_path / "results.tsv")["correct"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "batch", "config", "words"),
    [
        ("toy", 8, {}, "model dtype: must be bf16 or fp16"),
        ("toy-2L", 8, {"fusion_grouping": []}, "norm and gate_up among them for a batch"),
        ("toy-2L@int8", 8, {}, "batch: must be 1 for quantised weights"),
    ],
)
def test_what_batches_cannot_do_is_rejected_by_name(model: str, batch: int, config: dict[str, Any], words: str) -> None:
    verdict = harness.evaluate(model, "h200", config, "cpu", batch=batch)
    assert verdict["status"] == "rejected" and words in verdict["rejected_reason"], verdict["rejected_reason"]


def test_an_evaluation_is_written_down_where_it_was_asked_for_and_only_there(tmp_path: Path) -> None:
    harness.evaluate(**TOY, config_dict=BAD)
    assert list(tmp_path.iterdir()) == []
    verdicts = [harness.evaluate(**TOY, config_dict=config, results_path="w/results.tsv") for config in ({}, BAD)]
    trials = read_trials("w/runs")
    assert [t.verdict for t in trials] == json.loads(json.dumps(verdicts))
    rows = read_rows("w/results.tsv")
    assert [(row.tag, row.loop, row.model) for row in rows] == [("tried", "eval", "toy"), ("rejected", "eval", "toy")]
    assert [row.trial for row in rows] == [trial.id for trial in trials]
    assert rows[0].latency_us == verdicts[0]["latency_us"] and not Path("w/corpus.jsonl").exists()  # predicted: no point of the corpus


def refuse_many(path: Path) -> None:
    for _ in range(EACH):
        harness.evaluate(**TOY, config_dict=BAD, results_path=path)


def test_evaluations_of_many_processes_at_once_are_all_written_down(tmp_path: Path) -> None:
    results = tmp_path / "new" / "results.tsv"
    processes = [multiprocessing.get_context("fork").Process(target=refuse_many, args=(results,)) for _ in range(WRITERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * WRITERS
    names = [row.trial for row in read_rows(results)]
    assert len(names) == WRITERS * EACH and sorted(names) == [trial.id for trial in read_trials(tmp_path / "new" / "runs")]


def test_tokens_are_told_in_order_as_they_become_known() -> None:
    told: list[tuple[int, int, str]] = []
    result = harness.generate(**TOY, prompt_ids=[1, 2, 3], max_tokens=5, on_token=lambda *token: told.append(token))
    assert [token for _, token, _ in told] == result["generated"]
    assert [index for index, _, _ in told] == list(range(len(result["generated"])))


class Gate(BaseHTTPRequestHandler):
    """A hub on which every model is gated; it keeps what it was told of who asks."""

    def do_GET(self) -> None:
        if "some/model" in self.path:  # the client asks for other things without a name
            self.server.asked.append(self.headers.get("Authorization"))  # type: ignore[attr-defined]
        self.send_response(401)
        for name, value in (("X-Error-Code", "GatedRepo"), ("Content-Length", "0")):
            self.send_header(name, value)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def gate() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    server.asked = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def ask(gate: ThreadingHTTPServer, home: Path, call: str, **environment: str) -> tuple[str, set[str | None]]:
    """All that a process says which calls the harness about a gated model, and how it named itself to the hub."""
    code = f"from amk import harness\ntry: harness.{call}\nexcept Exception as e: print(e.exit_code, e)"
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{gate.server_port}", "HF_HOME": str(home)}
    environment |= hub | {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    return ran.stdout + ran.stderr, set(gate.asked)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "call",
    [
        "evaluate('some/model', 'h200', {}, 'cpu', token=T)",
        "propose('some/model', 'h200', token=T)",
        "loop('some/model', 'h200', 1, 'cpu', token=T)",
        "bench('some/model', 'h200', device='cpu', token=T)",
        "compile_model('some/model', 'h200', 'out', device='cpu', token=T)",
        "generate('some/model', 'h200', prompt_ids=[1], device='cpu', token=T)",
    ],
)
def test_a_token_reaches_the_hub_and_nothing_else(gate: ThreadingHTTPServer, tmp_path: Path, call: str) -> None:
    said, asked = ask(gate, tmp_path / "home", call.replace("T)", f"{TOKEN!r})"))
    assert asked == {f"Bearer {TOKEN}"}
    assert said.startswith("3 HuggingFace model some/model is gated") and said.count("\n") == 1
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert TOKEN not in said and not [path for path in files if TOKEN.encode() in path.read_bytes()]


def test_without_a_token_the_hubs_own_rules_find_one(gate: ThreadingHTTPServer, tmp_path: Path) -> None:
    said, asked = ask(gate, tmp_path, "propose('some/model', 'h200')", HF_TOKEN=TOKEN)
    assert asked == {f"Bearer {TOKEN}"} and TOKEN not in said


@pytest.mark.parametrize("token", ["", "two words", f"{TOKEN}\n", "tok\u00e9n", 7])
def test_what_cannot_be_a_token_is_a_usage_error_that_does_not_repeat_it(gate: ThreadingHTTPServer, tmp_path: Path, token: Any) -> None:
    said, asked = ask(gate, tmp_path, f"propose('some/model', 'h200', token={token!r})")
    assert said.startswith("2 token: must be") and said.count("\n") == 1 and asked == set()
    assert TOKEN not in said and "two words" not in said


def test_errors_of_the_harness_carry_their_exit_code() -> None:
    for call in (lambda: harness.evaluate("./nowhere"), lambda: harness.loop("toy", "h200", 0)):
        with pytest.raises(Exception) as caught:
            call()
        assert getattr(caught.value, "exit_code", None) == 2
    assert EvalError.exit_code == 3
