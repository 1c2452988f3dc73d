"""The commands that measure what is published refuse what they cannot do in one sentence."""

from __future__ import annotations

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
    ("arguments", "code", "words"), [((), 3, "card"), (("--models", "toy"), 2, "'toy'"), (("--knobs", "unroll"), 2, "'unroll'")]
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


def refuses(module: str, arguments: tuple[str, ...], code: int, words: str, folder: Path) -> None:
    """The command ends with `code` and a last line with `words`, writes nothing and shows no traceback."""
    command = [sys.executable, str(ROOT / "amk_bootstrap.py"), f"amk.dev.{module}", *arguments]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (ran.returncode, words in ran.stderr.splitlines()[-1], "Traceback" in ran.stderr) == (code, True, False), ran.stderr
    assert list(folder.iterdir()) == []
