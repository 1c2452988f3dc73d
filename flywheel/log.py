"""workspace/results.tsv: one line a trial, whatever its end."""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from amk.flywheel.append import append, lines, lines_and_rest, locked, replace

Tag: TypeAlias = Literal["kept", "tried", "revert", "rejected", "failed", "timeout", "crash"]
Correctness: TypeAlias = Literal["PASS", "FAIL", ""]
TAGS: tuple[str, ...] = get_args(Tag)
CORRECTNESS: tuple[str, ...] = get_args(Correctness)
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trial; the fields are the columns, in order.

    `tag` is how the trial ended; `correctness` is empty where nothing was judged; `latency_us` (with its kind) and `pct_of_roofline`
    need a PASS. `trial` is the trial's id, or empty where there is no folder for it. `ts` is the time in UTC; it ends the line, so
    that a line without it is known to be torn. ValueError if a rule of honesty is broken.
    """

    experiment: str
    tag: Tag
    loop: str
    model: str
    gpu: str
    regime: str
    correctness: Correctness
    latency_us: float | None = None
    pct_of_roofline: float | None = None
    schedule_id: str = ""
    kernel_id: str = ""
    description: str = ""
    latency_kind: str = ""
    device: str = ""
    source: str = ""
    trial: str = ""
    ts: str

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ValueError(f"row of {self.model} ({self.schedule_id or self.trial}): " + "; ".join(problems))


COLUMNS: tuple[str, ...] = tuple(f.name for f in fields(Row))
HEADER = "\t".join(COLUMNS)
NUMBERS = ("latency_us", "pct_of_roofline")


def _problems(row: Row) -> list[str]:
    passed, timed = row.correctness == "PASS", row.latency_us is not None
    rules = {
        f"tag must be one of {', '.join(TAGS)}, but got {row.tag!r}": row.tag in TAGS,
        f"correctness must be PASS, FAIL or empty, but got {row.correctness!r}": row.correctness in CORRECTNESS,
        f"a latency needs a correctness PASS, but got {row.correctness!r}": passed or not timed,
        f"a share of the roofline needs a latency, but got {row.pct_of_roofline} alone": timed or row.pct_of_roofline is None,
        f"a latency and its kind go together, but got {row.latency_us} and {row.latency_kind!r}": timed == bool(row.latency_kind),
        "a kept trial needs a correctness PASS and a latency": row.tag != "kept" or (passed and timed),
        f"a trial that ended as {row.tag} cannot have passed": row.tag in ("kept", "tried", "revert") or not passed,
        f"ts must be a UTC time such as 2026-01-31T12:00:00Z, but got {row.ts!r}": TIME.fullmatch(row.ts) is not None,
    }
    rules |= {f"{name} must be a positive number, but got {getattr(row, name)}": _is_number(getattr(row, name)) for name in NUMBERS}
    return [sentence for sentence, holds in rules.items() if not holds]


def _is_number(value: float | None) -> bool:
    return value is None or (math.isfinite(value) and value > 0)


def append_row(path: Path | str, row: Row) -> None:
    """Adds the row, on the disk when this returns; a row whose trial is already there is not added twice.

    ValueError if the file begins with other columns, OSError if it cannot be written.
    """
    path = Path(path)
    with locked(path):
        present = _body(path)
        if row.trial and any(_cells(line)[COLUMNS.index("trial")] == row.trial for line in present if row.trial in line):
            return
        head = "" if _has_header(path) else HEADER + "\n"
        append(path, head + format_row(row) + "\n", _is_whole)


def check_columns(path: Path) -> None:
    """ValueError if the file begins with other columns."""
    _body(path)


def read_rows(path: Path | str) -> list[Row]:
    """Every row in order, none if there is no file. A torn last line is left out; ValueError names any other line that is no row."""
    path = Path(path)
    rows = []
    for number, line in enumerate(_body(path), start=2):
        try:
            rows.append(parse_row(line))
        except ValueError as problem:
            mend = f"rebuild the file from the trials: python -m amk.flywheel.rebuild {shlex.quote(str(path))}"
            raise ValueError(f"{path} line {number} must be a row, but: {problem}; {mend}") from problem
    return rows


def write_rows(path: Path, rows: list[Row]) -> None:
    """Replaces the file, under the caller's lock."""
    replace(path, "".join(line + "\n" for line in (HEADER, *map(format_row, rows))))


def format_row(row: Row) -> str:
    """The line without its newline: cells escaped, numbers exact, None empty."""
    return "\t".join(_cell(getattr(row, name)) for name in COLUMNS)


def parse_row(line: str) -> Row:
    """The row that `format_row` gave; ValueError if it is none."""
    cells = _cells(line)
    if len(cells) != len(COLUMNS):
        raise ValueError(f"a row must have {len(COLUMNS)} cells, but got {len(cells)}")
    values: dict[str, Any] = dict(zip(COLUMNS, map(unescape, cells), strict=True))
    for name in NUMBERS:
        values[name] = float(values[name]) if values[name] else None
    return Row(**values)


def _cells(line: str) -> list[str]:
    return line.split("\t")


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    return escape(value) if isinstance(value, str) else repr(float(value))


def _is_whole(line: str) -> bool:
    cells = _cells(line)
    return line == HEADER or (len(cells) == len(COLUMNS) and TIME.fullmatch(cells[-1]) is not None)


def _has_header(path: Path) -> bool:
    return bool(lines(path, _is_whole))


def _body(path: Path) -> list[str]:
    """The lines below the header, which must be ours, or the beginning of ours and all that there is."""
    found, rest = lines_and_rest(path, _is_whole)
    if found[0] != HEADER if found else not HEADER.startswith(rest):
        begins = (found or [rest])[0][:80]
        raise ValueError(f"{path} must begin with the columns {', '.join(COLUMNS)}, but begins with {begins!r}; move it away")
    return found[1:]


# Backslash, control characters, line ends of any kind, and what UTF-8 cannot hold.
SPECIAL = re.compile("[\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
SHORT = {"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"}
LONG = {short: char for char, short in SHORT.items()}


def escape(text: str) -> str:
    """`text` on one line and in one cell; `unescape` inverts it."""
    return SPECIAL.sub(lambda found: SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", text)


def unescape(text: str) -> str:
    """What `escape` was given."""
    return re.sub(r"\\u[0-9a-f]{4}|\\.", lambda found: LONG.get(found[0]) or chr(int(found[0][2:], 16)), text)
