"""Where a figure comes from: the head of every file under results/."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import TypedDict

ROOT = Path(__file__).resolve().parents[1]
NVIDIA_SMI_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


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
        commit=_commit(),
        time_utc=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=f"{platform.system()} {platform.machine()}",
        cores=os.cpu_count() or 0,
        python=platform.python_version(),
        cards=cards(),
    )


def cards() -> list[dict[str, str]]:
    """Name, driver, clocks and power limit of each NVIDIA card, as nvidia-smi prints them."""
    query = _output(["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader"])
    rows = [line.split(", ") for line in query.splitlines()]
    return [dict(zip(NVIDIA_SMI_FIELDS, row, strict=True)) for row in rows if len(row) == len(NVIDIA_SMI_FIELDS)]


def write_results(path: Path, results: dict[str, object]) -> None:
    """Write `results` under their provenance as JSON; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps({"provenance": provenance(), **results}, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def _commit() -> str:
    """AMK_COMMIT where a copy without its git folder was told, else what git says, else "unknown"."""
    if told := os.environ.get("AMK_COMMIT"):
        return told
    commit = _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip()
    changed = _output(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]).strip()
    return (commit + ("+changes" if changed else "")) or "unknown"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
