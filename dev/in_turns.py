"""Checkouts of this project on one card in turns: what a change of the code is worth.

    python amk_bootstrap.py amk.dev.in_turns NAME=FOLDER NAME=FOLDER ... [--models A,B] [--position P] [--config JSON] [--rounds N]
                                             [--chain] [--out FILE]

Each checkout runs its own code in a process of its own, and its program is judged by its oracle before it is timed; one process at a time
takes a sample. The first checkout runs twice: what these two differ by, or what the samples scatter, whichever is more, is the noise that a
difference must exceed. --chain times builds that move no weights, which are not judged, as no result comes of them. Exit code 1 where a
checkout had nothing to time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from amk.dev.asked import at_least, below, known_model, writable
from amk.dev.bench_gpu import ONE_B, context
from amk.dev.noise import noise_us
from amk.dev.on_card import on_card, require_card
from amk.dev.provenance import write_results
from amk.eval.bench import interleaved, refuse_company

WORKER = Path(__file__).with_name("in_turns_worker.py")
TWIN = "again"  # the first checkout's second process
Row = dict[str, Any]


class NothingToTime(Exception):
    """A checkout's program was refused, is wrong or did not run: the sentence says which and why."""


class Worker:
    """A checkout's process."""

    def __init__(self, name: str, checkout: Path, options: Sequence[str], script: Path | None = None) -> None:
        self.name = name
        # -P: the script's own folder is not on the path, so that every import is the other checkout's.
        command = [sys.executable, "-P", str(script or WORKER), *options]
        path = os.pathsep.join([str(checkout / "dev" / "checkout"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def facts(self) -> Row:
        """What it says of its program once that is loaded."""
        found: Row = self._answer("facts")
        return found

    def sample_us(self) -> float:
        assert self.process.stdin is not None
        try:
            print(file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass  # it has ended; what it said last comes next
        return float(self._answer("us"))

    def _answer(self, key: str) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        said = json.loads(line) if line else {"problem": f"its process ended with exit code {self.process.wait()}"}
        if key not in said:
            raise NothingToTime(f"{self.name}: {said['problem']}")
        return said[key]


def compared(names: Sequence[str], samples: Sequence[Sequence[float]]) -> list[Row]:
    """A row for each of `names` against the first; the last of `samples` are the first's second process."""
    base, twin = samples[0], samples[-1]
    against, rows = float(np.median(base)), []
    for name, own in zip([*names, TWIN], samples, strict=True):
        latency, noise = float(np.median(own)), noise_us((base, twin), own)
        effect: Row = {"effect_pct": 100 * (latency / against - 1), "noise_pct": 100 * noise / against}
        rows.append({"name": name, "us": latency, **effect, "beyond_noise": abs(latency - against) > noise, "samples_us": list(own)})
    return rows


def measure(model: str, checkouts: Mapping[str, Path], asked: argparse.Namespace) -> list[Row]:
    """The rows of one model. NothingToTime where a checkout has none."""
    options = ["--model", model, "--config", asked.config, "--context", str(context(model)), "--position", str(asked.position)]
    options += ["--chain"] if asked.chain else []
    first, *_ = checkouts.items()
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(name, folder, options)) for name, folder in (*checkouts.items(), (TWIN, first[1]))]
        facts = [worker.facts() for worker in workers]
        samples = interleaved([worker.sample_us for worker in workers], asked.rounds)
    return [
        {"model": model, "chain": asked.chain, "same_bits": known.get("outputs_sha256") == facts[0].get("outputs_sha256")} | known | row
        for known, row in zip(facts, compared(list(checkouts), samples), strict=True)
    ]


def folders(parser: argparse.ArgumentParser, texts: Sequence[str]) -> dict[str, Path]:
    """The checkouts by name; ends the process where one is none, or a name is not the only one."""
    found: dict[str, Path] = {}
    for text in texts:
        name, _, folder = text.partition("=")
        path = Path(folder).resolve()
        if not name or not folder or not (path / "dev" / "checkout").is_dir():
            parser.error(f"NAME=FOLDER: must name a checkout of this project, but got {text!r}")
        if name in found or name == TWIN:
            parser.error(f"NAME=FOLDER: must have a name of its own, but got {name!r} again")
        found[name] = path
    return found


def show(rows: Sequence[Row]) -> None:
    table = Table("model", "checkout", "us", "against the first", "noise", "same bits")
    for row in rows:
        effect = f"{row['effect_pct']:+.2f} %" + ("" if row["beyond_noise"] else ", within the noise")
        bits = "" if row["chain"] else "yes" if row["same_bits"] else "no"
        table.add_row(
            row["model"] + (" (chain)" if row["chain"] else ""), row["name"], f"{row['us']:.1f}", effect, f"{row['noise_pct']:.2f} %", bits
        )
    Console(width=140).print(table)


def arguments() -> tuple[argparse.Namespace, dict[str, Path]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", metavar="NAME=FOLDER", nargs="+", help="a checkout and what it is called; the first is the measure")
    parser.add_argument("--models", default=ONE_B, help="built-in models, with commas between them")
    parser.add_argument("--position", type=int, default=128, help="the position that is timed")
    parser.add_argument("--config", default="{}", help="the config, as JSON")
    parser.add_argument("--rounds", type=int, default=15, help="samples of each")
    parser.add_argument("--chain", action="store_true", help="builds that move no weights: the chain of dependent steps alone")
    parser.add_argument("--out", type=Path, help="a file for all samples")
    asked = parser.parse_args()
    at_least(parser, "rounds", asked.rounds, 1)
    writable(parser, asked.out)
    try:
        json.loads(asked.config)
    except ValueError as problem:
        parser.error(f"--config: must be JSON, but is not ({problem})")
    for model in asked.models.split(","):
        known_model(parser, "models", model)
        below(parser, "position", asked.position, 0, context(model), f"the KV rows of {model}")
    return asked, folders(parser, asked.checkouts)


def main() -> None:
    asked, checkouts = arguments()
    require_card("in_turns")
    rows: list[Row] = []
    failed = False
    with on_card("in_turns"):
        refuse_company(context=False)
        for model in asked.models.split(","):
            try:
                rows += measure(model, checkouts, asked)
            except NothingToTime as problem:
                failed = True
                print(f"in_turns: {model}: {problem}", file=sys.stderr, flush=True)
            if asked.out:
                write_results(asked.out, {"rows": rows})
    show(rows)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
