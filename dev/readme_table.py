"""README's performance tables, rendered from the results files that `dev/bench_gpu.py` wrote; every figure in them is in one of them.

A table a card. A line takes its latency from one file and each baseline from a file of its own where they were measured apart; numbers
say which. Of several files with the same line that of the present code stands, then that of more processes, then the newest.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amk.dev.batch_table import batch_part, prefill_part
from amk.dev.quality_note import is_earlier, quality_line
from amk.dev.results_check import card_name, honest_chains, honest_rows
from amk.dev.table import EARLIER, is_present, origin, table_of
from amk.models.registry import describe

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance: rendered by dev/readme_table.py -->", "<!-- end of performance -->"
NOTHING = "*Nothing is measured yet: there is no `results/bench-CARD.json`.*"
BASELINES = {"cuda-graph": "transformers, CUDA graph", "torch-compile": "torch.compile"}
HEAD = ("model", "position", "us/token", "share of the floor", *(f"{title}: us (ratio)" for title in BASELINES.values()), "from")
CHAIN = "Without memory traffic, a build that computes nothing and is no result (the chain of dependent steps alone)"
Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A results file: its number in the list of files, name and content."""

    number: str
    name: str
    data: dict[str, Any]

    @property
    def card(self) -> str:
        """The target that its card is, "auto" if it is none of the table."""
        return card_name(self.data["provenance"]["cards"][0]["name"])


@dataclass(frozen=True)
class Found:
    """A line of a results file, and whether it is about the present code."""

    row: Row
    source: Source
    present: bool

    @property
    def standing(self) -> tuple[bool, int, str]:
        """What is shown of several is that with the greatest."""
        came = self.source.data
        return self.present, came.get("processes", 1), came["provenance"]["time_utc"]


def render() -> str:
    """The whole of README.md with the tables that results/ gives."""
    return with_table((ROOT / "README.md").read_text(encoding="utf-8"), table(ROOT / "results"))


def with_table(readme: str, text: str) -> str:
    """`readme` with `text` between the two markers; ValueError if they are not there, once each and in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"README.md must have {BEGIN!r} and then {END!r}, each once")
    return f"{before}{begin}\n{text}\n{end}{after}"


def table(results: Path) -> str:
    """The tables of all bench-*.json in `results` and where they come from; ValueError if a file breaks a rule of honesty."""
    read = [(path.name, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(results.glob("bench-*.json"))]
    sources = [Source(str(number), name, data) for number, (name, data) in enumerate(read, 1)]
    if not sources:
        return NOTHING
    for source in sources:  # before anything is asked of a file
        honest_rows(source.name, source.data, "latency")
    found = [
        Found(row, source, is_present(row, source.card))
        for source in sources
        for row in honest_rows(source.name, source.data, "latency")
        if row["config"] == "default"
    ]
    quality = _read(results / "quality.json")
    parts = [_card_part(card, sources, found, quality) for card in sorted({source.card for source in sources})]
    files = "\n".join(f"{s.number}. {origin(s.name, s.data, 'results')}" for s in sources)
    return "\n\n".join([*parts, files, *batch_part(results), *prefill_part(results)])


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _card_part(card: str, sources: Sequence[Source], found: Sequence[Found], quality: dict[str, Any] | None) -> str:
    """One card's table, what must be said below it, and its chains."""
    mine = [entry for entry in found if entry.source.card == card]
    keys = dict.fromkeys((entry.row["model"], entry.row["position"]) for entry in mine)
    groups = {key: [entry for entry in mine if (entry.row["model"], entry.row["position"]) == key] for key in sorted(keys)}
    lines_of_quality = {model: quality_line(quality, model) for model, _ in groups if describe(model).quantised}
    shown = {key: entries for key, entries in groups.items() if lines_of_quality.get(key[0], "") is not None}
    withheld = [f"{model} at {position}" for model, position in groups if (model, position) not in shown]
    body = table_of(HEAD, map(_cells, shown.values()))
    old = any(not _best(entries).present for entries in shown.values()) or any(is_earlier(quality, model) for model in lines_of_quality)
    notes = [EARLIER] if old else []
    notes += [text for text in dict.fromkeys(lines_of_quality.values()) if text]
    if withheld:
        notes.append(f"Measured and withheld, as `results/quality.json` does not say what the format costs: {', '.join(withheld)}.")
    chains = list(_chains(source for source in sources if source.card == card))
    notes += [f"{CHAIN}: {', '.join(chains)}."] if chains else []
    return "\n\n".join([body, *notes])


def _chains(sources: Iterable[Source]) -> Iterator[str]:
    for source in sources:
        for row in honest_chains(source.name, source.data):
            earlier = "" if is_present(row, source.card) else "\\*"
            yield f"{row['model']} at {row['position']}: {row['chain_us']:.1f} us{earlier} ({source.number})"


def _best(entries: Sequence[Found]) -> Found:
    return max(entries, key=lambda entry: entry.standing)


def _cells(entries: Sequence[Found]) -> Iterator[str]:
    """The cells of one line: a model at a position."""
    best = _best(entries)
    row, spread = best.row, best.row.get("spread_pct", 0)
    yield row["model"]
    yield str(row["position"])
    yield f"{row['latency_us']:.1f}" + ("" if best.present else "\\*") + (f" (spread {spread:.1f} %)" if spread else "")
    yield f"{row['pct_of_roofline']:.1f} %"
    numbers = [best.source.number]
    for name in BASELINES:
        text, number = _baseline(name, entries, best)
        numbers += [number] if number else []
        yield text
    yield ", ".join(dict.fromkeys(numbers))


def _baseline(name: str, entries: Sequence[Found], best: Found) -> tuple[str, str]:
    """The cell of a baseline and the number of its file: that with a time which stands best, else why there is none."""
    have = [(entry, b) for entry in entries for b in entry.row.get("baselines", ()) if b["name"] == name]
    if not have:
        return "not measured", ""
    entry, baseline = max(have, key=lambda pair: (pair[1]["latency_us"] is not None, pair[0].standing))
    if baseline["latency_us"] is None or baseline["ratio"] is None:
        return str(baseline["status"]), entry.source.number
    earlier = "\\*" if best.present and not entry.present else ""
    return f"{baseline['latency_us']:.1f} ({baseline['ratio']:.2f}x{earlier})", entry.source.number
