"""What a weight format costs, as README says it below a table: from results/quality.json, with where the figures come from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from amk.dev.results_check import card_name
from amk.dev.table import is_present

LEAST_TEXT = 4000  # tokens
Quality = Mapping[str, Any]


def quality_line(quality: Quality | None, model: str) -> str | None:
    """What the weight format of NAME@FORMAT costs, in words; None where results/quality.json (`quality`) does not say it of a correct
    program of that format beside a correct one that is not quantised, over a text that is long enough, at a commit and on a card. It has
    a mark where one of the two programs, or its kernel, is not what the code at hand compiles.
    """
    found = _rows(quality, model.rpartition("@")[2])
    if quality is None or found is None:
        return None
    form, (bf16, row) = model.rpartition("@")[2], found
    against = f"perplexity {row['perplexity']:.3f} against {bf16['perplexity']:.3f} in {bf16['layers']}"
    same = f"the same first choice at {100 * row['same_top1']:.1f} % of {quality['text']['tokens']} tokens"
    mark = "\\*" if is_earlier(quality, model) else ""
    costs = f"{against}, mean KL divergence {row['kl_mean']:.4f} nats, {same}{mark}"
    return f"What {form} costs, of {_named(bf16)}: {costs} ({_origin(quality)})."


def is_earlier(quality: Quality | None, model: str) -> bool:
    """Whether what is said of NAME@FORMAT was measured at an earlier version of the program or its kernel; nothing said is not."""
    found = _rows(quality, model.rpartition("@")[2])
    if quality is None or found is None:
        return False
    card = card_name(quality["provenance"]["cards"][0]["name"])
    return not all(is_present(row | {"model": row.get("described_as") or ""}, card) for row in found)


def _rows(quality: Quality | None, form: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The line of what is not quantised and that of the format; None where they may not be shown."""
    if quality is None or quality["baseline"]["correct"] is not True or quality["device"] != "cuda":
        return None
    came = quality["provenance"]
    if not came["cards"] or came["commit"].partition("+")[0] in ("", "unknown") or quality["text"]["tokens"] < LEAST_TEXT:
        return None
    row = next((r for r in quality["formats"] if r["model"].rpartition("@")[2] == form and r["correct"] is True), None)
    return None if row is None else (quality["baseline"], row)


def _named(bf16: Mapping[str, Any]) -> str:
    """The checkpoint, and the built-in model with its description where it is called otherwise."""
    known = bf16.get("described_as")
    return str(bf16["model"]) if known in (None, bf16["model"]) else f"{bf16['model']} (described as {known})"


def _origin(quality: Quality) -> str:
    came = quality["provenance"]
    commit, _, changes = came["commit"].partition("+")
    cards = "; ".join(dict.fromkeys(f"{card['name']}, driver {card['driver_version']}" for card in came["cards"]))
    at = f"commit `{commit[:12]}`" + (f" with {changes}" if changes else "")
    return f"[`results/quality.json`](results/quality.json); {cards}; {at}; {came['time_utc'][:10]}"
