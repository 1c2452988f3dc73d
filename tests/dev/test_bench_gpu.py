"""The commands that measure what is published refuse what they cannot do in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from amk.dev.card import card_count

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(card_count() > 0, reason="says what happens where there is no card")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 3, "card"),
        (("--part",), 3, "card"),
        (("--chain",), 3, "card"),
        (("--baselines", "eager"), 2, "'eager'"),
        (("--chain", "--processes", "2"), 2, "without --baselines"),
        (("--processes", "0"), 2, "at least 1"),
        (("--models", "llama"), 2, "'llama'"),
        (("--positions", "16,17"), 2, "'17'"),
        (("--models", "smollm2-135m-shape", "--positions", "8000"), 2, "16, 128, 1024"),
        (("--models", "llama-3.1-8b-shape,llama-3.2-1b-shape@int8", "--positions", "16"), 2, "must be some of 128 for"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    refuses("bench_gpu", arguments, code, words, tmp_path)


@pytest.mark.skipif(card_count() > 0, reason="says what happens where there is no card")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 3, "card"),
        (("--models", "toy"), 2, "'toy'"),
        (("--knobs", "unroll"), 2, "'unroll'"),
        (("--share", "²/3"), 2, "K/N"),
        (("--share", "1/" + "9" * 5000), 2, "K/N"),
    ],
)
def test_effects_that_cannot_be_measured_are_one_sentence(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    refuses("knob_effects", arguments, code, words, tmp_path)


@pytest.mark.skipif(card_count() > 0, reason="says what happens where there is no card")
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [((), 3, "card"), (("--tools", "leakcheck"), 2, "'leakcheck'"), (("--cases", "toy"), 2, "'toy'"), (("--sms", "0"), 2, "at least 1")],
)
def test_a_sanitizer_that_cannot_run_is_one_sentence(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    refuses("sanitize", arguments, code, words, tmp_path)


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        ("verify_full", ("--processes", "0"), "--processes: must be at least 1"),
        ("verify_full", ("--programs", "-1"), "--programs: must be at least 0"),
        ("verify_full", ("--programs", "0", "--mutants", "0"), "at least one case"),
        ("cost_error", ("nofile-h200.json",), "'nofile-h200.json'"),
        ("cost_error", (__file__,), "named after its card"),
        ("draw_machine", ("--chart",), "--chart"),
        ("timings", ("--chart",), "--chart"),
        ("build_variants", ("--chart",), "--chart"),
        ("import_order", ("--chart",), "--chart"),
        ("verify_full", ("--out", "/dev"), "--out: must be a file to write"),
        ("quality", ("--device", "cpu", "--out", "/dev/null/x"), "--out: must be"),
        ("bench_batch", ("--batches", "8,x"), "--batches: must be some of 8, 16, but got 'x'"),
        ("bench_batch", ("--position", "-1"), "--position: must be from 0 to 4095"),
        ("bench_batch", ("--position", "4096"), "--position: must be from 0 to 4095"),
        ("bench_batch", ("--model", "nothing"), "--model: unknown model 'nothing'"),
        ("bench_prefill", ("--model", "nothing"), "--model: unknown model 'nothing'"),
        ("bench_prefill", ("--stretches", "7"), "--stretches: must be some of 32, 64, 128"),
        ("bench_prefill", ("--tokens", "1"), "--tokens: must be at least 2"),
        ("bench_prefill", ("--out", "/dev"), "--out: must be a file to write"),
        ("sanitize", ("--limit", "nan"), "--limit: must be at least 1"),
        ("sanitize", ("--limit", "0"), "--limit: must be at least 1"),
        ("bench_gpu", ("--out", "/dev"), "--out: must be a file to write"),
        ("knob_effects", ("--out", "/dev"), "--out: must be a file to write"),
        ("quality", ("--device", "cpu", "--model", "toy", "--tokens", "10", "int8"), "must have a tokenizer"),
    ],
)
def test_commands_that_need_no_card_refuse_in_one_sentence(module: str, arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    refuses(module, arguments, 2, words, tmp_path)


def test_a_part_of_the_full_verification_is_not_published(tmp_path: Path) -> None:
    published = ROOT / "results" / "soundness.json"
    before = published.read_bytes()
    command = [sys.executable, str(ROOT / "amk_bootstrap.py"), "amk.dev.verify_full", "--programs", "3", "--mutants", "0"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert published.read_bytes() == before
    assert subprocess.run([*command, "--out", str(tmp_path / "some.json")], capture_output=True).returncode == 0
    assert json.loads((tmp_path / "some.json").read_text(encoding="utf-8"))["programs"]["cases"] == 3


def refuses(module: str, arguments: tuple[str, ...], code: int, words: str, folder: Path) -> None:
    """The command ends with `code` and a last line with `words`, writes nothing and shows no traceback."""
    command = [sys.executable, str(ROOT / "amk_bootstrap.py"), f"amk.dev.{module}", *arguments]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (ran.returncode, words in ran.stderr.splitlines()[-1], "Traceback" in ran.stderr) == (code, True, False), ran.stderr
    assert list(folder.iterdir()) == []
