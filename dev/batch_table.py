"""README's tables of batches and of prefill, rendered from the results files of `dev/bench_batch.py` and `dev/bench_prefill.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amk.dev.results_check import honest_batches, honest_prompts
from amk.dev.table import EARLIER, is_present, origin, table_of

BATCHES = "Several sequences side by side, each at a position of its own, and what a step of all of them takes:"
PROMPTS = "A prompt to the logits of its last token, beside one forward pass of transformers over it in the same run:"
BATCH_HEAD = ("model", "position", "sequences", "us/step", "over one", "tokens/s")
PROMPT_HEAD = ("model", "prompt tokens", "by", "ms", "us a launch")
Row = dict[str, Any]


def batch_part(results: Path) -> Iterator[str]:
    """Heading, table and origin for each batch-*.json in `results`; ValueError if one breaks a rule of honesty."""
    for name, data, card in _files(results, "batch"):
        rows = honest_batches(name, data)
        yield from (BATCHES, table_of(BATCH_HEAD, (_batch_cells(row, card) for row in rows)), _below(name, data, rows, card))


def prefill_part(results: Path) -> Iterator[str]:
    """The same for each prefill-*.json."""
    for name, data, card in _files(results, "prefill"):
        rows = honest_prompts(name, data)
        ours = [row for row in rows if "stretch" in row]
        yield from (PROMPTS, table_of(PROMPT_HEAD, (_prompt_cells(row, card) for row in rows)), _below(name, data, ours, card))


def _files(results: Path, kind: str) -> Iterator[tuple[str, Row, str]]:
    """Name, content and card of each results file KIND-CARD.json."""
    for path in sorted(results.glob(f"{kind}-*.json")):
        yield path.name, json.loads(path.read_text(encoding="utf-8")), path.stem.removeprefix(f"{kind}-")


def _batch_cells(row: Row, card: str) -> Iterator[str]:
    yield row["model"]
    yield str(row["position"])
    yield str(row["batch"])
    yield f"{row['step_us']:.1f}{_mark(row, card)}"
    yield f"{row['over_first']:.2f}x"
    yield f"{row['tokens_per_second']:.0f}"


def _prompt_cells(row: Row, card: str) -> Iterator[str]:
    ours = "stretch" in row
    yield row["model"]
    yield str(row["tokens"])
    yield f"AMK, {row['stretch']} tokens a launch" if ours else row["entrant"]
    yield f"{row['prompt_us'] / 1e3:.1f}{_mark(row, card) if ours else ''}"
    yield f"{row['us_a_launch']:.0f}" if ours else ""


def _mark(row: Row, card: str) -> str:
    return "" if is_present(row, card) else "\\*"


def _below(name: str, data: Row, ours: Sequence[Row], card: str) -> str:
    """Where the figures come from, and of which code if some are of another."""
    earlier = "" if all(is_present(row, card) for row in ours) else f" {EARLIER}"
    return f"From {origin(name, data, 'results')}{earlier}"
