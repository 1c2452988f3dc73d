"""workspace/runs/<id>/trial.json: the truth about each trial, from which the log and the corpus are rebuilt."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from amk.eval.verdict import Verdict, from_json
from amk.flywheel import corpus
from amk.flywheel.append import sync_folder
from amk.flywheel.log import Correctness, Row, Tag

FILE = "trial.json"
PARTIAL = ".partial-"
ID_CHARACTERS = 12


def new_id() -> str:
    """An id that no other process makes: UTC time to the microsecond, so that ids sort by age, and 32 random bits."""
    micros = time.time_ns() // 1000
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime(micros // 1_000_000))}-{micros % 1_000_000:06d}-{secrets.token_hex(4)}"


def utc_now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One config and what came of it. `verdict` is a verdict as JSON; `config` what was asked for; `record` its corpus record, if any.

    ValueError or TypeError if the verdict breaks a rule of honesty, if `tag` does not fit it, or if `record` may not enter the corpus.
    """

    id: str = field(default_factory=new_id)
    experiment: str
    tag: Tag
    loop: str
    regime: str
    source: str
    description: str
    config: Any
    verdict: dict[str, Any]
    record: dict[str, Any] | None = None
    ts: str = field(default_factory=utc_now)

    def __post_init__(self) -> None:
        if not self.id or self.id.startswith(".") or Path(self.id).name != self.id:
            raise ValueError(f"trial id must be the name of a folder, but got {self.id!r}")
        row = self.row
        if self.record is not None:
            corpus.check(self.record)
            if self.record["program_digest"] != self.verdict["program_digest"] or self.record["latency_us"] != row.latency_us:
                raise ValueError(f"trial {self.id}: its corpus record must be about the program and latency of its verdict")

    @property
    def row(self) -> Row:
        """The trial's line of the log; latency and correctness are the verdict's."""
        verdict = from_json(self.verdict)
        return Row(
            experiment=self.experiment,
            tag=self.tag,
            loop=self.loop,
            model=verdict.model,
            gpu=verdict.gpu,
            regime=self.regime,
            correctness=_correctness(verdict),
            latency_us=verdict.latency_us,
            pct_of_roofline=verdict.pct_of_roofline,
            schedule_id=verdict.schedule_id or "",
            kernel_id=(verdict.binary_digest or "")[:ID_CHARACTERS],
            description=self.description,
            latency_kind=verdict.latency_kind or "",
            device=verdict.device,
            source=self.source,
            trial=self.id,
            ts=self.ts,
        )


def _correctness(verdict: Verdict) -> Correctness:
    if verdict.correct is None:
        return ""
    return "PASS" if verdict.correct else "FAIL"


def tag_of(verdict: Mapping[str, Any], *, kept: bool | None) -> Tag:
    """How a trial with this verdict ended. A correct one was tried where nothing was decided: `kept` is None, or it has no latency."""
    status = verdict["status"]
    if status == "correct":
        return "tried" if verdict["latency_us"] is None or kept is None else "kept" if kept else "revert"
    ends: dict[str, Tag] = {"rejected": "rejected", "incorrect": "failed", "timeout": "timeout", "crash": "crash"}
    return ends[status]


def save_trial(runs: Path | str, trial: Trial) -> Path:
    """Writes the trial's folder and renames it into place; on the disk when this returns. FileExistsError if the id is taken."""
    runs = Path(runs)
    final, partial = runs / trial.id, runs / f"{PARTIAL}{trial.id}-{secrets.token_hex(4)}"
    text = json.dumps(asdict(trial), allow_nan=False, indent=1)
    partial.mkdir(parents=True)
    with (partial / FILE).open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    sync_folder(partial)
    try:
        partial.rename(final)  # fails where a folder with something in it stands
    except OSError as problem:
        (partial / FILE).unlink()
        partial.rmdir()
        raise FileExistsError(f"trial {trial.id} must be new, but {final} exists; trials are never overwritten") from problem
    sync_folder(runs)
    return final


def read_trials(runs: Path | str) -> list[Trial]:
    """Every finished trial, oldest first. Folders of killed writers are passed over; ValueError names a file that is no trial."""
    return [_read(path) for path in sorted(Path(runs).glob(f"*/{FILE}")) if not path.parent.name.startswith(PARTIAL)]


def _read(path: Path) -> Trial:
    try:
        trial = Trial(**json.loads(path.read_bytes()))
    except (TypeError, ValueError, KeyError) as problem:
        raise ValueError(f"{path} must be a trial, but: {problem}") from problem
    if trial.id != path.parent.name:
        raise ValueError(f"{path} must hold the trial that its folder names, but holds {trial.id}")
    return trial
