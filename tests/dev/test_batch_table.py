"""README's tables of batches and prompts: what the files say, and no file that breaks a rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from amk.dev.batch_table import batch_part, prefill_part
from amk.dev.table import EARLIER
from amk.dev.version import present_digest
from amk.tests.dev.results_file import results
from amk.tests.dev.test_readme_table import folder


def sequences(count: int, step_us: float, **changes: Any) -> dict[str, Any]:
    return {
        "model": "toy-2L", "batch": count, "position": 128, "context": 256, "step_us": step_us, "over_first": step_us / 600,
        "tokens_per_second": 1e6 * count / step_us, "tolerance_used": 0.4, "samples_us": [step_us] * 5,
    } | changes  # fmt: skip


def prompt(by: str, prompt_us: float, **changes: Any) -> dict[str, Any]:
    return {"model": "toy-2L", "entrant": by, "tokens": 1024, "prompt_us": prompt_us, "samples_us": [prompt_us] * 5} | changes


def ours(**changes: Any) -> dict[str, Any]:
    said = {"stretch": 32, "batch": 32, "prefill": True, "context": 256, "launches": 32, "us_a_launch": 1000.0, "tolerance_used": 0.4}
    return prompt("stretches of 32", 32e3) | said | changes


def file(*rows: dict[str, Any]) -> dict[str, Any]:
    data = results()
    del data["latency"]
    return data | {"rows": list(rows)}


def batches(tmp_path: Path, *rows: dict[str, Any]) -> str:
    return "\n".join(batch_part(folder(tmp_path, batch_h200=file(*rows))))


def prompts(tmp_path: Path, *rows: dict[str, Any]) -> str:
    return "\n".join(prefill_part(folder(tmp_path, prefill_h200=file(*rows))))


def test_without_files_there_is_nothing(tmp_path: Path) -> None:
    assert [*batch_part(tmp_path), *prefill_part(tmp_path)] == []


def test_a_batch_stands_beside_one_sequence(tmp_path: Path) -> None:
    text = batches(tmp_path, sequences(1, 600.0), sequences(8, 690.0))
    assert "| toy-2L | 128 | 8 | 690.0\\* | 1.15x | 11594 |" in text
    assert "results/batch-h200.json" in text
    assert EARLIER in text


def test_a_prompt_stands_beside_transformers(tmp_path: Path) -> None:
    text = prompts(tmp_path, ours(), prompt("transformers, eager", 14e3))
    assert "| toy-2L | 1024 | AMK, 32 tokens a launch | 32.0\\* | 1000 |" in text
    assert "| toy-2L | 1024 | transformers, eager | 14.0 |  |" in text


def test_figures_of_the_present_code_have_no_mark(tmp_path: Path) -> None:
    one, eight = (sequences(n, 600.0, code_sha256=present_digest("toy-2L", "h200", 256, n)) for n in (1, 8))
    assert "\\*" not in batches(tmp_path, one, eight)
    stretch = ours(code_sha256=present_digest("toy-2L", "h200", 256, 32, True))
    assert "\\*" not in prompts(tmp_path, stretch, prompt("transformers, eager", 14e3))


def test_figures_of_a_width_that_there_is_no_more_are_of_earlier_code(tmp_path: Path) -> None:
    text = prompts(tmp_path, ours(stretch=8, batch=8, code_sha256="0" * 64), prompt("transformers, eager", 14e3))
    assert "AMK, 8 tokens a launch | 32.0\\* |" in text


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        ({"over_first": 1.1}, "over_first"),
        ({"tokens_per_second": 12000.0}, "tokens_per_second"),
        ({"step_us": 680.0, "over_first": 680 / 600, "tokens_per_second": 8e6 / 680}, "median"),
        ({"samples_us": [690.0] * 4}, "at least 5 samples"),
        ({"tolerance_used": None}, "correctness pass"),
        ({"tolerance_used": 1.2}, "correctness pass"),
    ],
)
def test_a_batch_that_breaks_a_rule_is_not_shown(tmp_path: Path, broken: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        batches(tmp_path, sequences(1, 600.0), sequences(8, 690.0) | broken)


def test_a_batch_needs_one_sequence_to_stand_beside(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one sequence"):
        batches(tmp_path, sequences(8, 600.0))


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([ours(us_a_launch=900.0), prompt("transformers, eager", 14e3)], "us_a_launch"),
        ([ours(prompt_us=31e3, us_a_launch=31e3 / 32), prompt("transformers, eager", 14e3)], "median"),
        ([ours(tolerance_used=None), prompt("transformers, eager", 14e3)], "correctness pass"),
        ([ours()], "transformers"),
        ([prompt("transformers, eager", 14e3)], "by AMK"),
        ([ours(), prompt("transformers, eager", 14e3, samples_us=[14e3])], "at least 5 samples"),
    ],
)
def test_prompts_that_break_a_rule_are_not_shown(tmp_path: Path, rows: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        prompts(tmp_path, *rows)


def test_a_file_of_no_card_is_not_shown(tmp_path: Path) -> None:
    data = file(sequences(1, 600.0))
    data["provenance"]["cards"] = []
    with pytest.raises(ValueError, match="must name the card"):
        list(batch_part(folder(tmp_path, batch_h200=data)))
