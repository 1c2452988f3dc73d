"""workspace/corpus.jsonl: one record a measured and correct point, with full provenance."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from amk.eval.verdict import from_json
from amk.flywheel.append import append, lines, lines_and_rest, locked, replace


class Record(TypedDict):
    """`schedule` is the config asked for, `effective` as the program realises it; `samples` are p10, p50, p90 (us) and n; `ts` is UTC."""

    model: str
    shape: dict[str, Any]
    gpu: str
    device_name: str
    dtype: str
    regime: str
    correctness: str
    latency_us: float
    latency_kind: str
    samples: dict[str, float]
    bound_us: float
    pct_of_roofline: float
    schedule: dict[str, Any]
    effective: dict[str, Any]
    program_digest: str
    binary_digest: str
    positions: list[int]
    ir_version: str
    abi_version: str
    eval_version: str
    commit: str
    driver: str
    clocks: dict[str, Any]
    ts: str
    notes: list[str]


FIELDS: tuple[str, ...] = tuple(Record.__annotations__)
QUANTILES = ("p10", "p50", "p90", "n")
FROM_VERDICT = ("model", "gpu", "device_name", "dtype", "latency_us", "latency_kind", "bound_us", "pct_of_roofline")
DIGESTS = ("program_digest", "binary_digest")
SHARE_TOLERANCE = 1e-6
BEGINNING = '{"model":"'  # of every line that is written here


def record_of(verdict: Mapping[str, Any], provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a verdict (as JSON); `provenance` gives every field that the verdict has not.

    ValueError or TypeError if the verdict breaks a rule of honesty or the point may not enter the corpus.
    """
    known = from_json(verdict).to_json()
    record = dict(provenance) | {name: known[name] for name in (*FROM_VERDICT, *DIGESTS, "positions", "notes")}
    record |= {"correctness": "PASS" if known["correct"] is True else "FAIL", "samples": known["latency_samples"]}
    check(record)
    return {name: record[name] for name in FIELDS}


def check(record: Mapping[str, Any]) -> None:
    """ValueError with every reason why the record may not enter the corpus."""
    problems = _fields(record) or _problems(record)
    if problems:
        raise ValueError(f"corpus record of {record.get('model')}: " + "; ".join(problems))


def append_record(path: Path | str, record: Mapping[str, Any]) -> None:
    """Adds the record, on the disk when this returns.

    ValueError unless it is of a measured and correct point with all its fields, or if the file holds something else than records.
    """
    check(record)
    path, line = Path(path), _line(record)
    with locked(path):
        check_records(path)
        append(path, line + "\n", _is_whole)


def check_records(path: Path) -> None:
    """ValueError if the file begins with something else than a record, or ends in something else than one or the beginning of one."""
    found, rest = lines_and_rest(path, _is_whole)
    alien = [line for line in found[:1] if not _is_ours(line)] + ([] if _is_beginning(rest) else [rest])
    if alien:
        raise ValueError(f"{path} must hold corpus records, but has the line {alien[0][:80]!r}; move it away")


def read_records(paths: Iterable[Path | str]) -> list[dict[str, Any]]:
    """The records of several corpora in order, each once; a file that is not there is empty.

    A torn last line is left out; ValueError names any other line that is no record.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in map(Path, paths):
        for number, line in enumerate(lines(path, _is_whole), start=1):
            record = _parse(path, number, line)
            found.setdefault(_line(record), record)
    return list(found.values())


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the file, under the caller's lock."""
    replace(path, "".join(_line(record) + "\n" for record in records))


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        if type(record) is not dict:
            raise ValueError(f"a record must be an object, but got a {type(record).__name__}")
        check(record)
        return record
    except ValueError as problem:
        raise ValueError(f"{path} line {number} must be a corpus record, but: {problem}") from problem


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({name: record[name] for name in FIELDS}, allow_nan=False, separators=(",", ":"))


def _is_ours(line: str) -> bool:
    return set(FROM_VERDICT) <= set(_object(line) or {})


def _is_beginning(rest: str) -> bool:
    return rest.startswith(BEGINNING) or BEGINNING.startswith(rest)


def _is_whole(line: str) -> bool:
    return _object(line) is not None


def _object(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if type(found) is dict else None


def _fields(record: Mapping[str, Any]) -> list[str]:
    missing, unknown = [f for f in FIELDS if f not in record], sorted(set(record) - set(FIELDS))
    return ([f"fields {', '.join(missing)} are missing"] if missing else []) + ([f"unknown fields {', '.join(unknown)}"] if unknown else [])


def _problems(record: Mapping[str, Any]) -> list[str]:
    samples, latency, bound = record["samples"], record["latency_us"], record["bound_us"]
    numbers = all(is_positive(v) for v in (latency, bound, record["pct_of_roofline"]))
    sampled = isinstance(samples, Mapping) and set(samples) == set(QUANTILES) and all(is_positive(samples[q]) for q in QUANTILES)
    rules = {
        f"correctness must be PASS, but got {record['correctness']!r}": record["correctness"] == "PASS",
        f"latency_kind must be measured-gpu, but got {record['latency_kind']!r}": record["latency_kind"] == "measured-gpu",
        "latency_us, bound_us and pct_of_roofline must be positive numbers": numbers,
        f"latency {latency} us must not be below the floor {bound} us": not numbers or latency >= bound,
        "pct_of_roofline must be floor over latency in percent": not numbers or _is_share(record["pct_of_roofline"], bound, latency),
        "samples must be p10, p50, p90 and n": sampled,
        "samples must rise from p10 to p90": not sampled or samples["p10"] <= samples["p50"] <= samples["p90"],
        "latency_us must lie between p10 and p90": not (numbers and sampled) or samples["p10"] <= latency <= samples["p90"],
        "positions must name what was judged": isinstance(record["positions"], list | tuple) and len(record["positions"]) > 0,
        "program_digest and binary_digest must name what ran": _are_names(record, DIGESTS),
        "device_name and commit must name the card and the code": _are_names(record, ("device_name", "commit")),
    }
    return [sentence for sentence, holds in rules.items() if not holds]


def _are_names(record: Mapping[str, Any], names: Iterable[str]) -> bool:
    return all(type(record[name]) is str and record[name] for name in names)


def is_positive(value: Any) -> bool:
    """A number, not a bool or a text, above zero and finite."""
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _is_share(percent: float, bound_us: float, latency_us: float) -> bool:
    return math.isclose(percent, 100 * bound_us / latency_us, rel_tol=SHARE_TOLERANCE)
