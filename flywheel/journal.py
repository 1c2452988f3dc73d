"""Where trials are written down: each one's folder first, then the log and the corpus, which can be rebuilt from the folders."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from amk.eval.candidate import Candidate
from amk.eval.errors import UsageError
from amk.eval.writable import require_appendable_file, require_writable_folder
from amk.flywheel.append import lock_of
from amk.flywheel.corpus import append_record, check_records, record_of
from amk.flywheel.log import append_row, check_columns
from amk.flywheel.provenance import point_provenance
from amk.flywheel.trials import Trial, save_trial, tag_of, utc_now
from amk.schedule.config import config_dict
from amk.schedule.knobs import Config
from amk.schedule.rejection import show, show_name

REGIME = "single-stream"
MOST_NESTED, MOST_BITS = 16, 1024  # far beyond any config; Python raises on much deeper data and on much longer numbers


@dataclass(frozen=True)
class Journal:
    """The log at `results`, the trials' folders in `runs/` beside it, and the corpus. `open_journal` makes one that can be written."""

    results: Path
    corpus: Path

    @property
    def runs(self) -> Path:
        return self.results.parent / "runs"

    def write(self, trial: Trial) -> None:
        """All of it is on the disk when this returns; any number of processes may write at once. OSError if the disk fails."""
        save_trial(self.runs, trial)
        append_row(self.results, trial.row)
        if trial.record is not None:
            append_record(self.corpus, trial.record)


def journal_at(results: Path, corpus: Path | None = None) -> Journal:
    """The journal at `results`, its corpus beside it where no other is named, whether or not it can be written."""
    return Journal(results, corpus or results.parent / "corpus.jsonl")


def open_journal(results: Path | str, corpus: Path | str | None = None) -> Journal:
    """`journal_at` the paths. UsageError unless all of it can be written."""
    journal = journal_at(Path(results), None if corpus is None else Path(corpus))
    _require_apart(journal)
    for file, option in ((journal.results, "results"), (journal.corpus, "corpus")):
        require_appendable_file(file, option)
        require_appendable_file(lock_of(file), option)
    require_writable_folder(journal.runs, "results")
    _require_own(check_columns, journal.results, "results")
    _require_own(check_records, journal.corpus, "corpus")
    return journal


def _require_apart(journal: Journal) -> None:
    """UsageError unless log, corpus and the folder of trials are three places."""
    results, corpus, runs = map(os.path.realpath, (journal.results, journal.corpus, journal.runs))
    if results == corpus:
        raise UsageError(f"corpus: must be another file than the results, but both are {journal.results}")
    for place, option in ((results, "results"), (corpus, "corpus")):
        if place == runs:
            raise UsageError(f"{option}: must be another place than the folder of trials, but both are {journal.runs}")


def _require_own(check: Callable[[Path], None], file: Path, option: str) -> None:
    try:
        check(file)
    except ValueError as problem:
        raise UsageError(f"{option}: {problem}") from problem


def trial_of(candidate: Candidate, verdict: dict[str, Any], *, kept: bool | None, loop: str, source: str, experiment: str) -> Trial:
    """The trial of a candidate that got the verdict (as JSON); `kept` is None where nothing was decided."""
    now = utc_now()
    return Trial(
        experiment=experiment,
        tag=tag_of(verdict, kept=kept),
        loop=loop,
        regime=REGIME,
        source=source,
        description=changes(candidate.asked),
        config=_recordable(candidate.asked),
        verdict=verdict,
        record=_record(candidate, verdict, now),
        ts=now,
    )


def _record(candidate: Candidate, verdict: Mapping[str, Any], ts: str) -> dict[str, Any] | None:
    if verdict["latency_kind"] != "measured-gpu":
        return None
    return record_of(verdict, point_provenance(candidate.effective, candidate.asked, asdict(candidate.spec), REGIME, ts))


def _recordable(config: Any) -> Any:
    """The config where it is JSON data of a config's depth; else, since it was refused, only what it looks like."""
    return config if _is_json(config, MOST_NESTED) else show(config)


def _is_json(value: Any, depth: int) -> bool:
    if isinstance(value, dict | list) and not depth:
        return False
    if isinstance(value, dict):
        return all(type(key) is str and _is_json(item, depth - 1) for key, item in value.items())
    if isinstance(value, list):
        return all(_is_json(item, depth - 1) for item in value)
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or type(value) is str or (isinstance(value, int) and value.bit_length() <= MOST_BITS)


def changes(config: Any, default: Any = None, at: str = "") -> str:
    """Where a config (JSON data, whatever it holds) differs from the default, in words."""
    default = config_dict(Config()) if default is None else default
    if not isinstance(config, Mapping):
        return f"no config: a {type(config).__name__}"
    parts = []
    for key, value in config.items():
        known = default.get(key)
        if isinstance(value, Mapping) and isinstance(known, Mapping):
            parts.append(changes(value, known, f"{at}{key}."))
        elif value != known or type(value) is not type(known):  # 3.0 and true are refused where 3 and 1 are not
            parts.append(f"{at}{show_name(key)}={show(value)}" if isinstance(key, str) else f"{at}{show(key)}")
    return ", ".join(filter(None, parts)) or ("" if at else "default")
