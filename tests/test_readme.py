"""README's and AGENTS' examples that run in seconds without a card print what the pages say."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from amk import harness
from amk.dev.card import card_count

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL) if "smollm2-135m " not in block]
AMK = f'amk() {{ "{sys.executable}" "{ROOT}/amk_cli.py" "$@"; }}\n'

without_card = pytest.mark.skipif(card_count() > 0, reason="the pages show a machine without a card")


@without_card
@pytest.mark.skipif(shutil.which("jq") is None, reason="the examples pipe into jq")
@pytest.mark.parametrize("block", BLOCKS, ids=[block.split("\n")[0][:40] for block in BLOCKS])
def test_an_example_of_the_readme_prints_what_it_says(block: str, tmp_path: Path) -> None:
    commands = [line.removeprefix("$ ") for line in block.splitlines() if line.startswith("$ ")]
    shown = "".join(line + "\n" for line in block.splitlines() if not line.startswith("$ "))
    ran = subprocess.run(["bash", "-c", AMK + "\n".join(commands)], cwd=tmp_path, capture_output=True, text=True)
    assert ran.stdout == shown


@without_card
def test_the_python_example_of_the_readme_prints_what_it_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT / "dev" / "checkout")}
    ran = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert "# " + ran.stdout == example.splitlines()[-1] + "\n"


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("toy", {"tiling": {"gemv": {"N_tile": 7}}}),
        ("toy", {"tilling": {}}),
        ("llama-3.2-1b-shape", {"smem_bytes_per_block": 1048576}),
        ("llama-3.2-1b-shape", {"sm_assignment": {"qkv": [0, 1, 2]}}),
    ],
)
def test_a_rejection_that_agents_read_about_is_the_one_they_get(model: str, config: dict[str, Any]) -> None:
    (reason,) = harness.evaluate(model, "h200", config, "cpu")["rejections"]
    assert reason in (ROOT / "AGENTS.md").read_text(encoding="utf-8").splitlines()
