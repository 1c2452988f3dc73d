"""The code and the card of this process, as git and nvidia-smi state them; imports nothing of ours. It never raises."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NVIDIA_SMI_FIELDS = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
SOURCES = ("*.py", "*.cuh", "*.cu")


def commit(root: Path = ROOT) -> str:
    """AMK_COMMIT where a copy without its git folder was told, else what git says of `root`, else "unknown".

    It ends in "+changes" when a file that git tracks differs from that commit, or a source is new.
    """
    if told := os.environ.get("AMK_COMMIT"):
        return told
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return "unknown"
    head = _output(["git", "-C", str(root), "rev-parse", "--verify", "--quiet", "HEAD"]).strip()
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "--untracked-files=no"]).strip()
    return (head + "+changes" if changed or _has_new_source(root) else head) if head else "unknown"


def _has_new_source(root: Path) -> bool:
    """Whether a source that git neither tracks nor ignores lies beside tracked ones: isa/ is searched for instructions."""
    listed = ["git", "-C", str(root), "ls-files", "-z"]
    tracked, new = (_output([*listed, *which, "--", *SOURCES]) for which in ([], ["--others", "--exclude-standard"]))
    return not _folders(tracked).isdisjoint(_folders(new))


def _folders(names: str) -> set[str]:
    return {os.path.dirname(name) for name in names.split("\0") if name}


def cards() -> list[dict[str, str]]:
    """Name, driver, clocks and power limit of each NVIDIA card that CUDA may use, as nvidia-smi prints them; empty where none is seen."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    chosen = [f"--id={visible}"] if visible else []
    query = _output(["nvidia-smi", *chosen, f"--query-gpu={','.join(NVIDIA_SMI_FIELDS)}", "--format=csv,noheader"])
    rows = [line.split(", ") for line in query.splitlines()]
    return [dict(zip(NVIDIA_SMI_FIELDS, row, strict=True)) for row in rows if len(row) == len(NVIDIA_SMI_FIELDS)]


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=60).stdout
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return ""
