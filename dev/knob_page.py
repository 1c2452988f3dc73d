"""docs/knob-effects.md: what each knob does, rendered from results/knob-effects-*.json; every figure in it is in one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from amk.dev.knob_effects import POSITION, SUBJECTS
from amk.dev.results_check import honest_rows
from amk.dev.subject import Subject, subject_of
from amk.dev.table import EARLIER, is_present, origin, table_of
from amk.schedule.knobs import KNOBS, Knob

RESULTS = Path(__file__).resolve().parents[1] / "results"
HEAD = """# What each knob does

Rendered by `dev/knob_page.py` from the results of `dev/knob_effects.py`. Each value of a knob is timed in turns with the default,
everything else being the default's. A cell has the time of a token in us, its ratio to the default of the same run ± the noise of that
round, and the default's time; above 1 is slower. A ratio is **bold** where it is beyond the noise: what the samples scatter, or how far
apart copies of the default are, whichever is more. Copies, and of x8 and x16 samples too, lie in different places in memory. The position
is 128 where none is named; x8 and x16 are batches of as many sequences, and the time is that of a step of all of them. The choices
themselves are in [knobs.md](knobs.md)."""
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
    subjects = list(dict.fromkeys([*SUBJECTS, *sorted(map(subject_of, rows))]))
    columns = list(map(str, subjects))
    most = [table_of(("knob: largest effect", *columns), ((f"`{k.name}`", *(_most(k, rows, each) for each in subjects)) for k in KNOBS))]
    values = [table_of(("knob", "value", *columns), _value_lines(rows, subjects))]
    notes = _older_lines(rows)
    return "\n\n".join([f"{origin(path.name, data, '../results')}{_parts(data)}{_earlier(path, data)}", *most, *notes, *values, *notes])


def _parts(data: dict[str, Any]) -> str:
    """Said of a file that several runs were put together to."""
    parts = data.get("parts", {})
    if len(parts) < 2:
        return ""
    of_others = sorted({part["commit"][:12] for part in parts.values()} - {data["provenance"]["commit"][:12]})
    same = f"; at `{'`, `'.join(of_others)}` too, whose programs and kernels are the same" if of_others else ""
    return f" Measured in {len(parts)} parts on cards of this name, each with a default of its own{same}."


def _earlier(path: Path, data: dict[str, Any]) -> str:
    """Said of a file whose default programs are not what the code at hand compiles."""
    card = path.stem.removeprefix("knob-effects-")
    old = [str(subject_of(row)) for row in data["defaults"] if not is_present(row, card)]
    return f" Measured at an earlier version of the program or its kernel: {', '.join(sorted(old))}." if old else ""


def _older_lines(rows: Sequence[Row]) -> list[str]:
    """Said beneath a table in which lines have a star, with the commits that they are of."""
    commits = sorted({row["earlier"][:12] for row in rows if "earlier" in row})
    return [f"{EARLIER.removesuffix('.')}: `{'`, `'.join(commits)}`."] if commits else []


def _star(row: Row) -> str:
    return "\\*" if "earlier" in row else ""


def _most(knob: Knob, rows: Sequence[Row], subject: Subject) -> str:
    """The largest effect of some value of the knob on a subject, at each position; of the arena's size too."""
    mine = [row for row in rows if (row["knob"], subject_of(row)) == (knob.name, subject)]
    timed = [row for row in mine if row["latency_us"] is not None]
    found = []
    for position in sorted({row["position"] for row in timed}):
        beyond = [row for row in timed if row["position"] == position and row["beyond_noise"]]
        most = max(beyond, key=lambda row: abs(row["effect_pct"]), default=None)
        found += [f"`{most['value']}`: {_timed(most)}"] if most else []
    found += [f"`{row['value']}`: {_arena(row)}{_star(row)}" for row in timed if knob.name == "page_allocation" and _arena_differs(row)]
    return "; ".join(found) or ("none beyond the noise" if timed else "not measured")


def _arena_differs(row: Row) -> bool:
    return bool(row["arena_bytes"] != row["default_arena_bytes"])


def _arena(row: Row) -> str:
    return f"arena {row['arena_bytes']} bytes of {row['default_arena_bytes']}"


def _value_lines(rows: Sequence[Row], subjects: Sequence[Subject]) -> Iterator[Sequence[str]]:
    order = {knob.name: number for number, knob in enumerate(KNOBS)}
    for knob, value in dict.fromkeys((row["knob"], row["value"]) for row in sorted(rows, key=lambda row: order[row["knob"]])):
        mine = [row for row in rows if (row["knob"], row["value"]) == (knob, value)]
        yield (
            f"`{knob}`",
            f"`{value}`",
            *("; ".join(_cell(row) for row in mine if subject_of(row) == subject) or "not measured" for subject in subjects),
        )


def _cell(row: Row) -> str:
    if row["latency_us"] is None:
        return (f"as `{row['same_program_as']}`" if "same_program_as" in row else row["reason"].replace("|", "\\|")) + _star(row)
    return _timed(row)


def _timed(row: Row) -> str:
    """Time, ratio and default of one line, and the position where it is not the usual one."""
    ratio = f"{row['latency_us'] / row['default_us']:.3f}"
    at = f" at {row['position']}" if row["position"] != POSITION else ""
    against = f"{f'**{ratio}**' if row['beyond_noise'] else ratio} ± {row['noise_pct'] / 100:.3f} of {row['default_us']:.1f}"
    return f"{row['latency_us']:.1f} us{at}, {against}{_star(row)}"
