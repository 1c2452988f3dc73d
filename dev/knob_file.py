"""The results file of knob effects: kept while it grows, and made of parts that several cards measured at once.

    python amk_bootstrap.py amk.dev.knob_file --out results/knob-effects-CARD.json [--earlier FILE] PART.json PART.json ...

Every line has the samples of the default that was timed in turns with it, on its own card: a ratio is never over another part's default.
What parts must agree in is said by `merged`. Of a file of earlier code (--earlier) those knobs are kept that no part has, marked as such; a
file with such lines is a part without them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from amk.dev.judged import IDENTITY
from amk.dev.provenance import provenance, write_json, write_results
from amk.dev.results_check import card_name, honest_rows
from amk.dev.subject import Subject, subject_of
from amk.dev.version import config_digest
from amk.schedule.config import with_value
from amk.schedule.knobs import KNOBS, Config

Row = dict[str, Any]
SAME_DEFAULT = (*IDENTITY, "context", "code_sha256")
CAME = ("commit", "cards", "time_utc")  # what a provenance has at least


class Unlike(ValueError):
    """Parts that do not belong together: the sentence says in what they differ."""


def origin_of(came: Mapping[str, Any]) -> tuple[str, frozenset[tuple[str, str]]]:
    """Commit, and name and driver of the cards, of a file's provenance: what lines of one file share."""
    return came["commit"], frozenset((card["name"], card["driver_version"]) for card in came["cards"])


def is_known(commit: str) -> bool:
    """Whether a commit says what was measured: not where the tree differed from it."""
    return commit not in ("", "unknown") and not commit.endswith("+changes")


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Lines by subject, and by knob as in the table of knobs."""
    order = {knob.name: number for number, knob in enumerate(KNOBS)}
    return sorted(rows, key=lambda row: (subject_of(row), order[row["knob"]]))


def knob_of(row: Row) -> tuple[Subject, str]:
    """Whose knob, and which one, a line is about."""
    return subject_of(row), row["knob"]


def read_part(path: Path) -> Row:
    """A file of knob effects. ValueError, which names it, for one that is cut or of another form."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path}: must be a file that knob_effects wrote, but is cut or no JSON ({problem})") from problem
    for key in ("provenance", "plain_read_gbs", "defaults", "rows"):
        if not (isinstance(data, dict) and _is_formed(key, data.get(key))):
            raise ValueError(f"{path}: must be a file that knob_effects wrote, but {key} is missing or of another form")
    return dict(data)


def _is_formed(key: str, value: object) -> bool:
    """Whether a file's `key` has the form in which knob_effects writes it, as far as others rely on it before they look."""
    if key == "provenance":
        return isinstance(value, dict) and value.keys() >= set(CAME)
    of = (int, float) if key == "plain_read_gbs" else dict
    return isinstance(value, list) and all(isinstance(item, of) for item in value)


def parts_at(paths: Sequence[Path]) -> dict[str, Row]:
    """The parts in these files by name: with its folder where two files have one name."""
    names = [path.name for path in paths]
    found: dict[str, Row] = {}
    for path in paths:
        name = path.name if names.count(path.name) == 1 else f"{path.resolve().parent.name}/{path.name}"
        if name in found:
            raise Unlike(f"{name}: must be named once, but is there again as {path}")
        found[name] = read_part(path)
    return found


class Keeper:
    """The file of a run: written anew after each knob, with what it had of the same commit, card and driver."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reads: list[float] = []
        self.defaults: list[Row] = []
        self.found: list[Row] = []
        try:
            before = read_part(path)
        except (OSError, ValueError):
            return
        now = provenance()
        if is_known(now["commit"]) and origin_of(before["provenance"]) == origin_of(now):
            self.reads, self.defaults, self.found = before["plain_read_gbs"], before["defaults"], before["rows"]

    def begin(self, default: Row, gbs: float) -> None:
        """A subject's default program, and the plain read of its process, GB/s."""
        self.reads.append(gbs)
        self.defaults = [*(row for row in self.defaults if subject_of(row) != subject_of(default)), default]

    def take(self, subject: Subject, knob: str, rows: Sequence[Row]) -> None:
        """Takes the lines of a subject's knob in place of those that it had."""
        others = [row for row in self.found if knob_of(row) != (subject, knob)]
        self.found = in_order([*others, *rows])
        write_results(self.path, {"plain_read_gbs": self.reads, "defaults": self.defaults, "rows": self.found})

    def has(self, subject: Subject, knob: str, values: Sequence[str]) -> bool:
        """Whether each of these values (as shown) of a subject's knob has been measured."""
        return {row["value"] for row in self.found if knob_of(row) == (subject, knob)} >= set(values)

    @property
    def failed(self) -> list[Row]:
        """Values that are not correct, or were timed and refused."""
        return [row for row in self.found if row["latency_us"] is None and row.get("reason") and row.get("correct") is not None]


def merged(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The parts, by name, as one file; each line says whose it is.

    Unlike if they are not of one known commit or else each line of the program and kernel that the code at hand makes, of cards of one name
    with one driver, of the same default programs with outputs of the same bits, if two have the same knob of a model, or if one has a knob
    that is none or of a model whose default it lacks. ValueError for a part that breaks a rule of honesty.
    """
    if not parts:
        raise Unlike("there must be at least one part, but there is none")
    parts = {name: {**part, "rows": [row for row in part["rows"] if "earlier" not in row]} for name, part in parts.items()}
    for name, part in parts.items():
        honest_rows(name, part, "rows")
    _require_one("cards and driver", {name: sorted(origin_of(part["provenance"])[1]) for name, part in parts.items()})
    for name, part in parts.items():
        if not is_known(commit := part["provenance"]["commit"]):
            raise Unlike(f"{name}: must be of a commit without changes, but is of {commit}")
    _require_known(parts)
    _require_apart(parts)
    if len({part["provenance"]["commit"] for part in parts.values()}) > 1:
        _require_present(parts)
    newest = max((part["provenance"] for part in parts.values()), key=lambda came: str(came["time_utc"]))
    cards = [card for part in parts.values() for card in part["provenance"]["cards"]]
    return {
        "provenance": newest | {"cards": cards},
        "parts": {name: {"commit": part["provenance"]["commit"], "plain_read_gbs": part["plain_read_gbs"]} for name, part in parts.items()},
        "plain_read_gbs": [gbs for part in parts.values() for gbs in part["plain_read_gbs"]],
        "defaults": _defaults(parts),
        "rows": in_order([row | {"part": name} for name, part in parts.items() for row in part["rows"]]),
    }


def with_earlier(whole: Mapping[str, Any], name: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """The file `whole` with the knobs of a model that it lacks from a file `name` of earlier code; their lines say of which commit.

    Unlike if that file is of other cards or drivers, of no known commit, or has a knob that is none. ValueError if it breaks a rule of
    honesty.
    """
    honest_rows(name, before, "rows")
    _require_one(
        "cards and driver", {kind: sorted(origin_of(file["provenance"])[1]) for kind, file in (("the parts", whole), (name, before))}
    )
    _require_known({name: before})
    present = set(map(knob_of, whole["rows"]))
    kept = [row | {"earlier": _commit_of(row, before)} for row in before["rows"] if knob_of(row) not in present]
    if unknown := [row["earlier"] for row in kept if not is_known(row["earlier"])]:
        raise Unlike(f"{name}: must be of commits without changes, but has lines of {unknown[0]}")
    reads = before["plain_read_gbs"] if kept else []
    return {**whole, "plain_read_gbs": [*whole["plain_read_gbs"], *reads], "rows": in_order([*whole["rows"], *kept])}


def _commit_of(row: Row, data: Mapping[str, Any]) -> str:
    """The commit at which a line of a file was measured."""
    own: str = row.get("earlier") or data.get("parts", {}).get(row.get("part"), data["provenance"])["commit"]
    return own


def _require_one(what: str, found: Mapping[str, Any]) -> None:
    """Unlike if the parts, by name, do not have the same."""
    first_name, first = next(iter(found.items()))
    for name, value in found.items():
        if value != first:
            raise Unlike(f"{what}: must be the same in every part, but {first_name} has {first} and {name} has {value}")


def _require_known(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Unlike if a line is of no knob, or of a model whose default program its part does not name."""
    knobs = {knob.name for knob in KNOBS}
    for name, part in parts.items():
        subjects = set(map(subject_of, part["defaults"]))
        for row in part["rows"]:
            if row["knob"] not in knobs:
                raise Unlike(f"{name}: must have lines of knobs, but has one of {row['knob']}")
            if subject_of(row) not in subjects:
                raise Unlike(f"{name}: must have the default of {subject_of(row)}, whose knobs it has")


def _require_present(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Unlike if a line is of another program or kernel than the code at hand makes of its value.

    A line that has another value's program is held to that: the code at hand must make the same of both.
    """
    made_of = cache(_made)  # a knob's default and its values stand in lines of several positions
    for name, part in parts.items():
        card = card_name(part["provenance"]["cards"][0]["name"])
        contexts = {subject_of(row): row["context"] for row in part["defaults"]}
        for row in part["rows"]:
            subject = subject_of(row)
            made = partial(made_of, subject, row["knob"], card, contexts[subject])
            present = made(row["value"])
            stated = made(row["same_program_as"]) if "same_program_as" in row else row.get("code_sha256", "")  # none: it was refused
            if stated != present or not (present or row["latency_us"] is None):
                either = "must be the same in every part, or every line's program and kernel those of the code at hand"
                raise Unlike(f"commit: {either}, but {row['knob']}={row['value']} of {subject} in {name} has others")


def _made(subject: Subject, knob: str, card: str, context: int, shown: str) -> str:
    """The digest of what the code at hand makes of one value of a knob, as a line shows it; empty if that is refused."""
    value = json.loads(shown)
    config = with_value(Config(), knob, tuple(value) if isinstance(value, list) else value)
    return config_digest(subject.model, config, card, context, subject.batch)


def _require_apart(parts: Mapping[str, Mapping[str, Any]]) -> None:
    """Unlike if a subject's knob is in two parts."""
    owner: dict[tuple[Subject, str], str] = {}
    for name, part in parts.items():
        for subject, knob in set(map(knob_of, part["rows"])):
            if (other := owner.setdefault((subject, knob), name)) != name:
                raise Unlike(f"{knob} of {subject}: must be in one part, but is in {other} and {name}")


def _defaults(parts: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """A subject's default program, which must be the same in every part that has the subject."""
    lines = [(name, row) for name, part in parts.items() for row in part["defaults"]]
    found = []
    for subject in sorted({subject_of(row) for _, row in lines}):
        mine = {name: row for name, row in lines if subject_of(row) == subject}
        for field in SAME_DEFAULT:
            _require_one(f"{field} of {subject}'s default", {name: row.get(field) for name, row in mine.items()})
        found.append(next(iter(mine.values())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", type=Path, help="files that dev/knob_effects.py wrote with --out")
    parser.add_argument("--earlier", type=Path, help="a file of earlier code, for the knobs that no part has")
    parser.add_argument("--out", required=True, type=Path, help="the file to write, named after the card")
    asked = parser.parse_args()
    try:
        whole = merged(parts_at(asked.parts))
        if asked.earlier:
            whole = with_earlier(whole, asked.earlier.name, read_part(asked.earlier))
        honest_rows(asked.out.name, whole, "rows")
    except (OSError, ValueError, KeyError) as problem:
        print(f"knob_file: {problem}", file=sys.stderr)
        sys.exit(1)
    write_json(asked.out, whole)
    print(f"{len(whole['rows'])} lines of {len(asked.parts)} parts in {asked.out}")


if __name__ == "__main__":
    main()
