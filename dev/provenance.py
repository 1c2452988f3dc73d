"""Where a figure comes from: the head of every file under results/."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import TypedDict

from amk.flywheel.origin import cards, commit


class Provenance(TypedDict):
    """`commit` ends in "+changes" when the tree differs from it; `cards` is empty where no NVIDIA card is seen."""

    commit: str
    time_utc: str
    machine: str
    cores: int
    python: str
    cards: list[dict[str, str]]


def provenance() -> Provenance:
    """What this process can say about the code and the machine; never raises."""
    return Provenance(
        commit=commit(),
        time_utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count() or 0,
        python=platform.python_version(),
        cards=cards(),
    )


def write_results(path: Path, results: dict[str, object]) -> None:
    """`write_json` of what this process has found, under its provenance."""
    write_json(path, {"provenance": provenance(), **results})


def write_json(path: Path, data: dict[str, object]) -> None:
    """Write `data` as JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)
