"""Writes down how long the commands take and how much memory they need; nothing judges the figures.

Each command runs `RUNS` times in a process of its own; results/timings.json keeps every run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TypedDict

from amk.dev.provenance import write_results

ROOT = Path(__file__).resolve().parents[1]
RUNS = 3
COMMANDS: dict[str, tuple[str, ...]] = {
    "amk --help": ("amk_cli.py", "--help"),
    "amk propose toy": ("amk_cli.py", "propose", "toy"),
    "amk eval toy --device cpu": ("amk_cli.py", "eval", "toy", "--device", "cpu"),
    "amk eval smollm2-135m --device cpu": ("amk_cli.py", "eval", "smollm2-135m", "--device", "cpu"),
}


class Run(TypedDict):
    """Wall time, peak resident memory of the largest process of the command, and its exit code."""

    seconds: float
    peak_mb: float
    exit_code: int


def timed(command: tuple[str, ...], folder: Path) -> Run:
    """Run `python COMMAND` in `folder` and measure it; its output is dropped."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = round(time.perf_counter() - start, 3)
    return Run(seconds=seconds, peak_mb=round(usage.ru_maxrss / 1024, 1), exit_code=process.returncode)


def main() -> int:
    """Time every command; 1 if one failed."""
    timings: dict[str, list[Run]] = {}
    for name, command in COMMANDS.items():
        timings[name] = [timed(command, ROOT) for _ in range(RUNS)]
        for run in timings[name]:
            print(f"{name:40} {run['seconds']:8.2f} s {run['peak_mb']:8.0f} MB   exit {run['exit_code']}", flush=True)
    write_results(ROOT / "results" / "timings.json", {"timings": timings})
    return 1 if any(run["exit_code"] for runs in timings.values() for run in runs) else 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
