"""How far the cost model is from what was measured: each line of bench-*.json and knob-effects-*.json beside its prediction.

python amk_bootstrap.py amk.dev.cost_error [RESULTS...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from amk.models.registry import describe
from amk.schedule.compile import lower
from amk.schedule.config import parse_config
from amk.schedule.cost import ErrorReport, error_report, latency_us
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.targets import TARGETS

RESULTS = Path(__file__).resolve().parents[1] / "results"
Row = dict[str, Any]


@cache
def _program(model: str, effective: str, gpu: str, context: int) -> Program:
    config = parse_config(json.loads(effective))
    assert isinstance(config, Config), config
    return lower(describe(model), config, TARGETS[gpu], context=context)


def predicted(row: Row, gpu: str) -> float:
    """Microseconds a token that the cost model predicts for a line of a results file, at the bandwidth that its own floor is of: a file of
    parts has that of several cards."""
    bandwidth_gbs = row["streamed_bytes"] / row["floor_us"] * 1e-3
    context = max(4096, row["position"] + 1024)
    program = _program(row["model"], json.dumps(row["effective"], sort_keys=True), gpu, context)
    return latency_us(program, TARGETS[gpu], row["position"], bandwidth_gbs)


def lines(files: Sequence[Path]) -> Iterator[tuple[Row, float]]:
    """Every line of one sequence in the files with its prediction; not those that are marked as of earlier code."""
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        gpu = next(part for part in file.stem.split("-") if part in TARGETS)
        for row in [*found.get("latency", ()), *found.get("knobs", ()), *found.get("rows", ())]:
            if row["latency_us"] is not None and "earlier" not in row and row.get("batch", 1) == 1:
                yield row, predicted(row, gpu)


def default_files() -> list[Path]:
    """All that is published with a latency a line."""
    return sorted([*RESULTS.glob("bench-*.json"), *RESULTS.glob("knob-effects-*.json")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="RESULTS", nargs="*", type=Path, help="results files; all of bench and knob-effects by default")
    files = parser.parse_args().files or default_files()
    for file in files:
        if not file.is_file() or not set(file.stem.split("-")) & set(TARGETS):
            parser.error(f"RESULTS: must be a results file named after its card, but got {str(file)!r}")
    table = Table("model", "config", "position", "measured us", "predicted us", "error")
    pairs = []
    for row, guess in lines(files):
        pairs.append((guess, row["latency_us"]))
        error = f"{100 * (guess / row['latency_us'] - 1):+.1f} %"
        table.add_row(row["model"], row["config"], str(row["position"]), f"{row['latency_us']:.1f}", f"{guess:.1f}", error)
    Console().print(table)
    report: ErrorReport = error_report(pairs)
    errors = f"mean error {report.mean_abs_pct:.1f} %, bias {report.bias_pct:+.1f} %, worst {report.worst_pct:.1f} %"
    print(f"{report.points} points: {errors}, rank correlation {report.rank:.2f}")


if __name__ == "__main__":
    main()
