"""The harness on a card: who streams gets the same tokens, and who comes second waits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amk import harness

pytestmark = pytest.mark.cuda
ONE_TOKEN = "from amk.harness import generate\ngenerate('toy', prompt_ids=[1], device='cuda')"
WARM = f"import sys\n{ONE_TOKEN}\nprint('warm', flush=True)\nsys.stdin.read()"
AMK = "from amk.amk_cli import main; main()"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its locks are not those of a worker that an earlier test left warm."""
    monkeypatch.setenv("AMK_CACHE", str(tmp_path))


def test_streamed_tokens_are_those_of_one_launch() -> None:
    told: list[int] = []
    asked: dict[str, Any] = {"prompt_ids": [3, 1, 4, 1, 5], "max_tokens": 70, "device": "cuda"}
    streamed = harness.generate("toy", on_token=lambda index, token, text: told.append(token), **asked)
    assert streamed["generated"] == told == harness.generate("toy", **asked)["generated"]


def test_a_second_command_waits_for_the_card_of_the_first() -> None:
    command = [sys.executable, "-c", AMK, "generate", "toy", "--prompt-ids", "1", "--device", "cuda"]
    with subprocess.Popen([sys.executable, "-c", WARM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdin is not None and first.stdout is not None and first.stdout.readline() == "warm\n"
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as second:
            assert second.stderr is not None
            assert "waiting for the card, on which process" in second.stderr.readline()
            first.stdin.close()
            second.communicate()
        assert second.returncode == 0
