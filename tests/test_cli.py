"""The command line: exit codes, JSON alone on stdout, one sentence for whatever is wrong."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from amk.amk_cli import run
from amk.dev.card import card_count
from amk.flywheel.log import read_rows
from amk.flywheel.trials import read_trials
from amk.tests.models.conftest import save_tiny

VERBS = ("propose", "eval", "loop", "compile", "generate", "bench", "trace", "doctor", "knobs", "verify")
GUIDE = {
    "tiling": {"gemv": {"N_tile": 128}, "attention": {"kv_block": 128}}, "fusion_grouping": [], "sm_assignment": "load_balance",
    "pipelining_depth": 3, "page_allocation": "graph_color", "threads_per_block": 256, "smem_bytes_per_block": 0,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 131, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]
CPU = ("--device", "cpu")
AMK = "from amk.amk_cli import main; main()"
NO_CARD = pytest.mark.skipif(card_count() > 0, reason="says what happens where there is no card")

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def own_workspace(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What commands write down by default stays out of the checkout."""
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


def answer(capsys: Capture, *arguments: str) -> tuple[int, Any, str]:
    """Exit code, the one JSON value on stdout, and stderr."""
    code = run(arguments)
    out, err = capsys.readouterr()
    return code, json.loads(out), err


def refused(capsys: Capture, exit_code: int, *arguments: str) -> str:
    """The sentence of a command that must fail: the same on stdout as JSON and on stderr as its last line."""
    code, said, err = answer(capsys, *arguments)
    assert code == exit_code
    assert list(said) == ["error"]
    assert err.splitlines()[-1] == said["error"]
    assert "Traceback" not in err
    assert not said["error"].endswith(".") and "\n" not in said["error"]
    return str(said["error"])


def feed_stdin(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), ("command",)),
        (("evl", "toy"), ("evl", "did you mean 'eval'")),
        (("eval",), ("model",)),
        (("eval", "toy", "--bogus"), ("--bogus",)),
        (("knobs", "extra"), ("extra",)),
        (("propose", "toyy"), ("'toyy'", "did you mean toy")),
        (("eval", "./no-such-folder"), ("no-such-folder",)),
        (("propose", "toy", "--gpu", "h2000"), ("'h2000'", "rtx5090")),
        (("eval", "toy", "--gpu", "h2000"), ("'h2000'", "rtx5090")),
        (("eval", "toy", "--device", "tpu"), ("'tpu'", "auto, cuda, cpu")),
        (("loop", "toy", "--budget", "0", *CPU), ("budget", "at least 1", "got 0")),
        (("loop", "toy", "--budget", "many"), ("--budget", "integer")),
        (("loop", "toy", "--budget", "1.5"), ("--budget", "integer")),
        (("compile", "toy"), ("--out",)),
        (("trace", "toy"), ("--out",)),
        (("trace", "toy", "-o", "x.json", "--position", "-1"), ("--position",)),
        (("trace", "toy", "-o", "/proc/amk/x.json"), ("out", "/proc/amk")),
        (("generate", "toy", *CPU), ("prompt",)),
        (("generate", "toy", "--prompt-ids", "1,x", *CPU), ("--prompt-ids", "'x'")),
        (("generate", "toy", "--prompt-ids", "9" * 30, *CPU), ("999999999999", "256")),
        (("generate", "toy", "--prompt-ids", "9" * 5000, *CPU), ("--prompt-ids", "5000 digits")),
        (("eval", "toy", "--batch", "3", *CPU), ("batch", "1, 8, 16")),
        (("compile", "toy", "-o", "", *CPU), ("out", "empty")),
        (("eval", "toy", "--results", "", *CPU), ("results: must be a path, but got an empty text",)),
        (("trace", "toy", "-o", ""), ("out: must be a path, but got an empty text",)),
        (("generate", "toy", "--prompt-ids", "1,99999", *CPU), ("99999", "256")),
        (("generate", "toy", "--prompt-ids", "1", "--max-tokens", "0", *CPU), ("max_tokens", "got 0")),
        (("generate", "toy", "--prompt-ids", "1", "--max-tokens", "9" * 30, *CPU), ("context", "2048")),
        (("generate", "toy", "--prompt-ids", "1", "--prompt", "a", *CPU), ("prompt", "once")),
        (("generate", "toy", "--prompt", "", *CPU), ("prompt", "no tokenizer")),
        (("generate", "toy", "--prompt-ids", "1", "--stop", "", *CPU), ("stop", "empty")),
        (("generate", "toy", "--prompt", "a\udcff", *CPU), ("prompt", "Unicode", "'a\\udcff'")),
        (("generate", "toy", "--prompt-ids", "1", "--stop", "\udcff", *CPU), ("stop", "Unicode", "'\\udcff'")),
        (("generate", "toy", "--prompt-ids", "1", "--stop", "x", *CPU), ("stop", "no tokenizer")),
        (("generate", "toy", "--prompt-ids", "1", "--temperature", "-1", *CPU), ("temperature", "0 (greedy)", "got -1.0")),
        (("generate", "toy", "--prompt-ids", "1", "--top-p", "0", "--min-p", "2", *CPU), ("top_p", "above 0", "min_p", "got 2.0")),
        (("generate", "toy", "--prompt-ids", "1", "--top-k", "-3", "--seed", "-1", *CPU), ("top_k", "got -3", "seed", "got -1")),
        (("eval", "toy", "--config", "/dev/zero", *CPU), ("--config", "16 MiB")),
        (("eval", "toy", "--results", "/dev/null", *CPU), ("results", "/dev/null")),
        (("loop", "toy", "--results", "/proc/amk/results.tsv", *CPU), ("results", "/proc/amk")),
        (("compile", "toy", "-o", "/proc/amk", *CPU), ("out", "/proc/amk")),
        (("compile", "toy", "-o", "x" * 300, *CPU), ("out", "too long")),
        (("bench", "toy", "--positions", "9" * 19, *CPU), ("positions", "2047")),
        (("generate", "toy", "--prompt-ids", ",".join(["1"] * 2049), *CPU), ("2049", "2048")),
        (("bench", "toy", "--positions", "16,", *CPU), ("--positions", "''")),
        (("bench", "toy", "--positions", "-3", *CPU), ("--positions", "'-3'")),
        (("bench", "toy", "--positions", "9999", *CPU), ("9999", "2047")),
        (("verify", "--programs", "-1"), ("programs", "got -1")),
        (("verify", "--mutants", "-1"), ("mutants", "got -1")),
        (("verify", "--programs", "0", "--mutants", "0"), ("at least one", "none")),
        (("verify", "--minutes", "soon"), ("--minutes", "number")),
        (("verify", "--minutes", "0"), ("minutes", "positive")),
        (("verify", "--minutes", "nan"), ("minutes", "positive")),
    ],
)
def test_wrong_command_line_is_a_usage_error_that_names_it(capsys: Capture, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    sentence = refused(capsys, 2, *arguments)
    assert [word for word in words if word not in sentence] == []


@pytest.mark.parametrize("verb", ("eval", "generate", "bench", "compile"))
def test_every_verb_with_a_config_refuses_a_missing_file(capsys: Capture, tmp_path: Path, verb: str) -> None:
    needed = {"generate": ("--prompt-ids", "1"), "compile": ("-o", str(tmp_path / "out"))}.get(verb, ())
    assert "nowhere.json" in refused(capsys, 2, verb, "toy", *needed, "--config", "nowhere.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "JSON"),
        (b'{"a":', "JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e400}', "too large a number"),
        (b'{"a": ' + b"9" * 5000 + b"}", "JSON"),
        (b'{"a": 1, "a": 2}', "'a' stands there twice"),
        (b"[1]", "object"),
        (b"7", "object"),
        (b"null", "object"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_config_that_is_no_json_object_is_a_usage_error(capsys: Capture, tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert words in refused(capsys, 2, "eval", "toy", "--config", str(path), *CPU)


def test_broken_config_on_stdin_is_a_usage_error(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    feed_stdin(monkeypatch, "{")
    assert "stdin" in refused(capsys, 2, "eval", "toy", "--config", "-", *CPU)


def test_folder_as_config_or_file_as_output_folder_is_a_usage_error(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert str(tmp_path) in refused(capsys, 2, "eval", "toy", "--config", str(tmp_path), *CPU)
    assert "out: must be a folder" in refused(capsys, 2, "compile", "toy", "-o", str(tmp_path / "file"), *CPU)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"bogus": 1}, ("bogus", "allowed keys", "tiling")),
        ({"kernel_knobs": {"bogus": 1}}, ("bogus",)),
        ({"tiling": {"gemv": {"N_tile": 7}}}, ("N_tile", "got 7", "128")),
        ({"tiling": {"gemv": {"N_tile": 7}}, "bogus": 1}, ("N_tile", "bogus")),
    ],
)
def test_unknown_knob_or_value_is_a_rejection_with_all_its_reasons(
    capsys: Capture, tmp_path: Path, config: dict[str, Any], words: tuple[str, ...]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    code, verdict, err = answer(capsys, "eval", "toy", "--config", str(path), *CPU)
    assert (code, verdict["status"], verdict["valid"], verdict["latency_us"]) == (1, "rejected", False, None)
    assert [word for word in words if word not in verdict["rejected_reason"]] == []
    assert err == f"rejected: {verdict['rejected_reason']}\n"


def test_rejected_config_compiles_to_nothing_and_exits_1(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"bogus": 1}')
    code, built, _ = answer(capsys, "compile", "toy", "-o", str(tmp_path / "out"), "--config", str(path), *CPU)
    assert (code, built["verdict"]["status"], built["files"]) == (1, "rejected", [])
    assert not (tmp_path / "out").exists()


@NO_CARD
@pytest.mark.parametrize("gpu", ((), ("--gpu", "b200"), ("--gpu", "auto")))
@pytest.mark.parametrize("verb", ("eval", "bench"))
def test_asking_for_a_card_where_there_is_none_is_an_environment_error(capsys: Capture, verb: str, gpu: tuple[str, ...]) -> None:
    assert "card" in refused(capsys, 3, verb, "toy", *gpu, "--device", "cuda")


def test_an_unknown_weight_format_is_a_usage_error_that_lists_what_there_is(capsys: Capture) -> None:
    for verb in ("propose", "eval", "bench", "generate"):
        arguments = ("--prompt-ids", "1") if verb == "generate" else ()
        assert "int4-g128-asym" in refused(capsys, 2, verb, "toy-2L@int5", *arguments)
    assert "fp32" in refused(capsys, 1, "eval", "toy@int8")


@NO_CARD
@pytest.mark.parametrize("device", ((), CPU))
def test_baselines_without_a_card_are_an_environment_error(capsys: Capture, device: tuple[str, ...]) -> None:
    assert "baselines" in refused(capsys, 3, "bench", "toy", "--baselines", *device)


@NO_CARD
@pytest.mark.parametrize("device", ((), CPU))
def test_trace_without_a_card_is_an_environment_error(capsys: Capture, tmp_path: Path, device: tuple[str, ...]) -> None:
    assert "card" in refused(capsys, 3, "trace", "toy", "-o", str(tmp_path / "trace.json"), *device)
    assert list(tmp_path.iterdir()) == []


def test_refused_config_of_generate_is_a_failure_not_a_misuse(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    feed_stdin(monkeypatch, '{"pipelining_depth": -1}')
    assert "pipelining_depth" in refused(capsys, 1, "generate", "toy", "--prompt-ids", "1", "--config", "-", *CPU)


@pytest.mark.parametrize("config", ['{"a":' * 900 + "1" + "}" * 900, '{"\\ud800": 1}', '{"' + "k" * 100_000 + '": 1}'])
def test_config_of_any_form_is_rejected_and_written_down(capsys: Capture, monkeypatch: pytest.MonkeyPatch, config: str) -> None:
    feed_stdin(monkeypatch, config)
    code, verdict, _ = answer(capsys, "eval", "toy", "--config", "-", *CPU)
    assert (code, verdict["status"]) == (1, "rejected")
    assert [row.tag for row in read_rows("workspace/results.tsv")] == ["rejected"]


def test_evaluation_is_a_trial(capsys: Capture, tmp_path: Path) -> None:
    results = tmp_path / "results.tsv"
    _, verdict, _ = answer(capsys, "eval", "toy", "--results", str(results), *CPU)
    assert [trial.verdict for trial in read_trials(tmp_path / "runs")] == [verdict]
    assert [(row.tag, row.schedule_id) for row in read_rows(results)] == [("tried", verdict["schedule_id"])]


def test_evaluations_of_two_commands_at_once_are_both_written_down(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AMK, "eval", "toy", *CPU]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    rows = read_rows(tmp_path / "workspace" / "results.tsv")
    assert sorted(row.trial for row in rows) == [trial.id for trial in read_trials(tmp_path / "workspace" / "runs")] and len(rows) == 2


@pytest.mark.parametrize("config", [b"[" * 100_000, b"\xff", b"", b"7"])
def test_broken_config_of_a_checkpoint_is_an_environment_error(capsys: Capture, tmp_path: Path, config: bytes) -> None:
    (tmp_path / "config.json").write_bytes(config)
    assert "config.json" in refused(capsys, 3, "propose", str(tmp_path))


def test_truncated_checkpoint_is_an_environment_error(capsys: Capture, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    weights = tmp_path / "model.safetensors"
    save_file({"model.norm.weight": np.ones(64, np.float32)}, weights)
    weights.write_bytes(weights.read_bytes()[:-5])
    assert "model.safetensors" in refused(capsys, 3, "eval", str(tmp_path), *CPU)


@pytest.mark.parametrize("token", [131, -1])
def test_checkpoint_whose_first_token_is_outside_its_vocabulary_is_judged(capsys: Capture, tmp_path: Path, token: int) -> None:
    config = save_tiny("qwen3", tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_bytes()) | {"bos_token_id": token, "eos_token_id": token}))
    code, verdict, _ = answer(capsys, "eval", str(tmp_path), *CPU)
    assert (code, verdict["correct"]) == (0, True)


def test_toy_is_correct_and_its_latency_is_predicted(capsys: Capture) -> None:
    code, verdict, err = answer(capsys, "eval", "toy", *CPU)
    assert (code, verdict["valid"], verdict["correct"], verdict["latency_kind"]) == (0, True, True, "predicted")
    assert "judging" in err


def test_config_of_the_guide_from_stdin_is_valid_and_correct(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    feed_stdin(monkeypatch, json.dumps(GUIDE))
    code, verdict, _ = answer(capsys, "eval", "toy", "--config", "-", *CPU)
    assert (code, verdict["valid"], verdict["correct"]) == (0, True, True)


def test_incumbent_that_propose_prints_is_a_config_that_eval_accepts(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    code, proposed, err = answer(capsys, "propose", "toy", "--gpu", "h200")
    assert (code, err) == (0, "")
    feed_stdin(monkeypatch, json.dumps(proposed["schedule_config"]))
    code, verdict, _ = answer(capsys, "eval", "toy", "--gpu", "h200", "--config", "-", *CPU)
    assert (code, verdict["schedule_id"]) == (0, proposed["schedule_id"])


def test_loop_says_each_trial_on_stderr_and_its_result_on_stdout(capsys: Capture, tmp_path: Path) -> None:
    results = tmp_path / "results.tsv"
    code, found, err = answer(capsys, "loop", "toy", "--budget", "2", "--results", str(results), "--gpu", "h200", *CPU)
    assert (code, found["n_trials"], found["results_tsv"]) == (0, 2, str(results))
    assert [f"trial {n}/2" in err for n in (1, 2, 3)] == [True, True, False]
    assert len(results.read_text().splitlines()) == 3


def test_stream_is_one_json_line_a_token_and_then_the_result(capsys: Capture) -> None:
    code = run(["generate", "toy", "--prompt-ids", "1,2,3", "--max-tokens", "4", "--stream", "--verify", *CPU])
    *tokens, result = map(json.loads, capsys.readouterr().out.splitlines())
    assert code == 0 and result["matches_eager"] is True
    assert [token["index"] for token in tokens] == list(range(len(result["generated"])))
    assert [token["token"] for token in tokens] == result["generated"]


def test_compile_writes_the_files_that_it_lists(capsys: Capture, tmp_path: Path) -> None:
    code, built, _ = answer(capsys, "compile", "toy", "-o", str(tmp_path / "out"), "--gpu", "h200", *CPU)
    assert code == 0 and built["verdict"]["correct"]
    named = {Path(name).name for name in built["files"]}
    assert named and named <= {path.name for path in (tmp_path / "out").rglob("*")}


def test_bench_has_a_row_a_position(capsys: Capture) -> None:
    code, table, err = answer(capsys, "bench", "toy", "--positions", "16,128", "--gpu", "h200", *CPU)
    assert (code, [row["position"] for row in table["rows"]]) == (0, [16, 128])
    assert all(f"{row['latency_us']:.1f} (predicted)" in err for row in table["rows"])


def test_verify_finds_no_false_accept(capsys: Capture) -> None:
    assert answer(capsys, "verify", "--programs", "10", "--mutants", "0")[0] == 0


def test_verify_without_the_time_for_a_case_says_that_none_was_judged(capsys: Capture) -> None:
    code, result, err = answer(capsys, "verify", "--minutes", "1e-9")
    assert (code, result["passed"], result["programs"]["cases"]) == (1, False, 0)
    assert err.splitlines()[-1] == "no case was judged in 1e-09 minutes: give more of them"


def test_people_get_tables_and_programs_json(capsys: Capture) -> None:
    code, table, _ = answer(capsys, "knobs", "--json")
    assert code == 0
    assert run(["knobs"]) == 0
    printed = capsys.readouterr().out
    assert [knob["name"] for knob in table if knob["name"] not in printed] == []
    code, facts, _ = answer(capsys, "doctor", "--json")
    assert code == 0
    assert run(["doctor"]) == 0
    assert facts["python"] in capsys.readouterr().out


def test_help_names_every_verb_and_every_verb_has_help(capsys: Capture) -> None:
    assert run(["--help"]) == 0
    overview = capsys.readouterr().out
    assert [verb for verb in VERBS if verb not in overview] == []
    for verb in VERBS:
        assert run([verb, "--help"]) == 0
        assert f"amk {verb}" in capsys.readouterr().out


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_verbs_that_judge_nothing_start_without_torch() -> None:
    verbs = "[['--help'], ['knobs'], ['doctor'], ['propose', 'toy', '--gpu', 'h200'], ['eval', 'toyy']]"
    loaded = "sorted({'torch', 'transformers'} & set(sys.modules))"
    ran = python(f"import sys; from amk.amk_cli import run; codes = [run(v) for v in {verbs}]; print(codes, {loaded})")
    assert ran.stdout.splitlines()[-1] == "[0, 0, 0, 0, 2] []", ran.stderr


def test_root_package_exports_the_harness_when_it_is_asked() -> None:
    before = "import amk, sys; print('amk.harness' in sys.modules)"
    same = "propose is sys.modules['amk.harness'].propose"
    after = f"from amk import evaluate, generate, loop, propose; print({same}, hasattr(amk, 'nothing'))"
    assert python(f"{before}; {after}").stdout.split() == ["False", "True", "False"]


def test_only_answers_reach_stdout_whoever_writes_there() -> None:
    noise = "os.write(1, b'noise\\n'); print('noise'); subprocess.run(['echo', 'noise'])"
    body = f"with _answers() as a:\n {noise}; a([1, float('nan')])\nprint('after')"
    ran = python(f"import os, subprocess\nfrom amk.amk_cli import _answers\n{body}")
    assert ran.stdout.splitlines() == ["[1, null]", "after"]
    assert ran.stderr.count("noise") == 3


def shell(command: str) -> subprocess.CompletedProcess[str]:
    """A command line of bash in which `amk` is this command."""
    amk = f"amk() {{ {sys.executable} -c '{AMK}' \"$@\"; }}; "
    return subprocess.run(["bash", "-c", amk + command], capture_output=True, text=True)


@pytest.mark.parametrize(
    "verb",
    ("knobs", "knobs --json", "--help", "eval toyy", "generate toy --prompt-ids 1 --max-tokens 200 --stream --device cpu"),
)
def test_reader_that_goes_away_ends_the_command_quietly(verb: str) -> None:
    ran = shell(f"amk {verb} | true; exit ${{PIPESTATUS[0]}}")
    assert ran.returncode == 141 and "Traceback" not in ran.stderr and "BrokenPipe" not in ran.stderr


@pytest.mark.parametrize("verb", ("knobs", "knobs --json", "eval toyy"))
def test_answer_that_cannot_be_written_is_an_environment_error(verb: str) -> None:
    ran = shell(f"amk {verb} > /dev/full")
    assert (ran.returncode, ran.stderr.count("\n")) == (3, 1) and ran.stderr.startswith("stdout must take the answer")


def test_progress_that_nobody_reads_changes_nothing() -> None:
    ran = shell("amk verify --programs 100 --mutants 0 2> >(true)")
    assert ran.returncode == 0 and json.loads(ran.stdout)["passed"]


def test_config_from_a_closed_stdin_is_a_usage_error() -> None:
    ran = shell("amk eval toy --config - <&-")
    assert ran.returncode == 2 and "stdin is closed" in json.loads(ran.stdout)["error"]


def test_interrupted_command_says_so_and_exits_130(tmp_path: Path) -> None:
    arguments = ("loop", "toy", "--budget", "1000", "--results", str(tmp_path / "results.tsv"), *CPU)
    command = [sys.executable, "-c", AMK, *arguments]
    # A shell's background job hands down that interrupts are ignored.
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard) as process:
        assert process.stderr is not None
        process.stderr.readline()  # work has begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, json.loads(out)) == (130, {"error": "interrupted"})
    assert "Traceback" not in err


@pytest.mark.parametrize("module", ["dataclasses", "json", "typer", "rich.table", "amk.harness", "amk.models.cache"])
def test_a_command_interrupted_while_it_starts_says_so(module: str) -> None:
    """As if the interrupt came when this module is loaded."""
    hook = f"""
import sys
class Interrupt:
    def find_spec(self, name, *_):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Interrupt())
"""
    ran = python(f"{hook}\n{AMK}")
    assert (ran.returncode, ran.stderr, json.loads(ran.stdout)) == (130, "interrupted\n", {"error": "interrupted"})


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_a_command_sleep_while_they_wait_unless_told_otherwise(given: dict[str, str], found: str) -> None:
    installed = "import os, amk.amk_cli as cli; cli.run = lambda: print(os.environ['OMP_WAIT_POLICY']) or 0; cli.main()"
    checkout = "import os, amk_bootstrap; amk_bootstrap.register(); print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    for code in (installed, checkout):
        ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (ran.returncode, ran.stdout.strip()) == (0, found), ran.stderr


def test_drawn_tokens_are_told_verified_and_repeatable(capsys: Capture) -> None:
    def tokens(*more: str) -> list[int]:
        code = run(["generate", "toy-2L", "--prompt-ids", "1,2", "--max-tokens", "6", "--temperature", "3", *more, *CPU])
        told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert code == 0
        generated: list[int] = told[-1]["generated"]
        return generated

    first = tokens("--seed", "7", "--verify")
    assert tokens("--seed", "7", "--top-k", "100000", "--top-p", "1", "--min-p", "0") == first != tokens("--seed", "8")
    assert len(set(tokens("--seed", "7", "--top-k", "20", "--top-p", "0.95", "--min-p", "0.01", "--verify"))) > 1


def test_a_cache_that_cannot_be_used_is_named_with_what_to_do(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AMK_CACHE", str(tmp_path / "file"))
    said = refused(capsys, 3, "compile", "toy", "-o", str(tmp_path / "out"), *CPU)
    assert "set AMK_CACHE" in said and str(tmp_path / "file") in said
    code, facts, _ = answer(capsys, "doctor", "--json")
    assert code == 0 and facts["cache"] == str(tmp_path / "file") and not facts["ready"]["cuda"]
    why = f"{tmp_path / 'file'} is not: Not a directory; set AMK_CACHE to one"
    assert facts["cache_problem"] == f"cache: must be a folder to write into, but {why}"
    assert run(["doctor"]) == 0 and "cache_problem" in capsys.readouterr().out


def test_a_cache_that_can_be_used_is_no_problem(capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMK_CACHE", str(tmp_path / "new"))
    assert answer(capsys, "doctor", "--json")[1]["cache_problem"] is None and list(tmp_path.iterdir()) == []
