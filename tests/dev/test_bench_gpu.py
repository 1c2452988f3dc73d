"""The command that measures the published figures refuses what it cannot do in one sentence."""

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
        (("--part", "latency"), 3, "card"),
        (("--processes", "0"), 2, "at least 1"),
        (("--models", "llama"), 2, "'llama'"),
        (("--positions", "16,17"), 2, "'17'"),
        (("--models", "smollm2-135m-shape", "--positions", "8000"), 2, "16, 128, 1024"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(arguments: tuple[str, ...], code: int, words: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "amk_bootstrap.py"), "amk.dev.bench_gpu", *arguments]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, words in ran.stderr.splitlines()[-1], "Traceback" in ran.stderr) == (code, True, False)
    assert list(tmp_path.iterdir()) == []
