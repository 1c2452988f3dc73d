"""Where a measured point comes from: versions, commit, driver and clocks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

from amk.isa.abi import text_hash
from amk.isa.registry import headers

ROOT = Path(__file__).resolve().parents[1]
EVAL_VERSION = "1"  # rises when the oracle or the bench judges or times differently
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def point_provenance(effective: Any, schedule: Any, shape: dict[str, Any], regime: str, ts: str) -> dict[str, Any]:
    """The fields of a corpus record that a verdict has not."""
    return {
        "shape": shape,
        "regime": regime,
        "schedule": schedule,
        "effective": effective,
        "ir_version": f"{text_hash(headers()):08x}",
        "abi_version": f"{text_hash(headers()):08x}",
        "eval_version": EVAL_VERSION,
        "commit": commit(),
        "driver": _query(["driver_version"]).get("driver_version", "unknown"),
        "clocks": _query(list(CLOCK_FIELDS)),
        "ts": ts,
    }


def commit() -> str:
    """AMK_COMMIT where a copy without git was told, else git's HEAD, else "unknown"."""
    told = os.environ.get("AMK_COMMIT")
    return told or _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip() or "unknown"


def _query(names: list[str]) -> dict[str, str]:
    row = _output(["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"]).splitlines()[:1]
    cells = row[0].split(", ") if row else []
    return dict(zip(names, cells, strict=True)) if len(cells) == len(names) else {}


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
