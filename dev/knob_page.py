"""docs/knob-effects.md: what each knob does, rendered from results/knob-effects-*.json; every figure in it is in one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amk.dev.results_check import honest_rows
from amk.dev.table import is_present, origin, table_of
from amk.schedule.knobs import KNOBS, Knob

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEAD = """# What each knob does

Rendered by `dev/knob_page.py` from the results of `dev/knob_effects.py`. Each value of a knob is timed in turns with the default,
everything else being the default's. An effect counts where it is beyond the noise of that round: what the samples scatter, or what a
second copy of the default differs by, whichever is more. Plus is slower. The choices themselves are in [knobs.md](knobs.md)."""
NOTHING = "*Nothing is measured yet: there is no `results/knob-effects-CARD.json`.*"
Row = dict[str, Any]


def render() -> str:
    """The whole page."""
    return page(RESULTS)


def page(results: Path) -> str:
    """The page with two tables for each knob-effects-*.json in `results`; ValueError if one breaks a rule of honesty."""
    files = sorted(results.glob("knob-effects-*.json"))
    return "\n\n".join([HEAD, *(_file_part(path) for path in files)] if files else [HEAD, NOTHING]) + "\n"


def _file_part(path: Path) -> str:
    data = json.loads(path.read_text(encoding="utf-8"))
    rows = honest_rows(path.name, data, "rows")
    where = [table_of(("knob", "has an effect"), ((f"`{k.name}`", _where(k, rows)) for k in KNOBS))]
    models = sorted({row["model"] for row in rows})
    head = ("knob", "value", *models)
    values = [table_of(head, _value_lines(rows, models))]
    return "\n\n".join([f"{origin(path.name, data, '../results')}{_earlier(path, data)}", *where, *values])


def _earlier(path: Path, data: dict[str, Any]) -> str:
    """Said of a file whose default programs are not what the code at hand compiles."""
    card = path.stem.removeprefix("knob-effects-")
    old = [row["model"] for row in data["defaults"] if not is_present(row, card)]
    return f" Measured at an earlier version of the program or its kernel: {', '.join(sorted(old))}." if old else ""


def _where(knob: Knob, rows: Sequence[Row]) -> str:
    """At which models and positions some value of the knob has an effect, with the largest."""
    mine = [row for row in rows if row["knob"] == knob.name]
    if not mine:
        return "not measured"
    found = []
    for model, position in sorted({(row["model"], row["position"]) for row in mine if row["latency_us"] is not None}):
        here = [row for row in mine if (row["model"], row.get("position")) == (model, position) and row["latency_us"] is not None]
        most = max((row for row in here if row["beyond_noise"]), key=lambda row: abs(row["effect_pct"]), default=None)
        found += [f"{model} at {position}: {most['effect_pct']:+.1f} % (`{most['value']}`)"] if most else []
    found += sorted({f"{row['model']}: arena {_ratio(row)}" for row in mine if _arena_differs(row) and knob.name == "page_allocation"})
    return "; ".join(found) or "none beyond the noise"


def _arena_differs(row: Row) -> bool:
    return row["latency_us"] is not None and row["arena_bytes"] != row["default_arena_bytes"]


def _ratio(row: Row) -> str:
    return f"{row['default_arena_bytes']} to {row['arena_bytes']} bytes (`{row['value']}`)"


def _value_lines(rows: Sequence[Row], models: Sequence[str]) -> Iterator[Sequence[str]]:
    order = {knob.name: number for number, knob in enumerate(KNOBS)}
    for knob, value in dict.fromkeys((row["knob"], row["value"]) for row in sorted(rows, key=lambda row: order[row["knob"]])):
        mine = [row for row in rows if (row["knob"], row["value"]) == (knob, value)]
        yield (
            f"`{knob}`",
            f"`{value}`",
            *("; ".join(_cell(row) for row in mine if row["model"] == model) or "not measured" for model in models),
        )


def _cell(row: Row) -> str:
    if row["latency_us"] is None:
        return f"as `{row['same_program_as']}`" if "same_program_as" in row else row["reason"].replace("|", "\\|")
    effect = f"**{row['effect_pct']:+.1f} %**" if row["beyond_noise"] else f"{row['effect_pct']:+.1f} %"
    at = f" at {row['position']}" if row["position"] != 128 else ""
    return f"{row['latency_us']:.1f} us{at}, {effect} ± {row['noise_pct']:.1f}"
