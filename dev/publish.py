"""Everything that is published, measured in sequence on the live card: each step writes its own file into results/.

    python amk_bootstrap.py amk.dev.publish [--only STEP,STEP] [--again] [--processes N] [--folder DIR] [--list]

A step is a command of its own, which may be run by itself as well (--list shows them). What is done at the present commit is not done again
unless --again; a step that fails or takes longer than its limit does not stop the others. At the end a table says what was found.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amk.dev.asked import at_least, chosen
from amk.dev.bench_gpu import ONE_B, SMOL, context
from amk.dev.on_card import on_card, require_card
from amk.dev.prebuild import Build, ahead
from amk.dev.readme_table import table
from amk.eval.card import Place, choose
from amk.flywheel.origin import commit
from amk.vm.build import BuildFailed

ROOT = Path(__file__).resolve().parents[1]
STATE = "publish.json"
EIGHT_B = "llama-3.1-8b-shape"


@dataclass(frozen=True)
class Step:
    """A command `module options --out FILE`; `file` has {card} for the card's name. `processes`: it takes --processes."""

    module: str
    options: tuple[str, ...]
    file: str
    limit_s: int
    processes: bool = False

    def command(self, card: str, folder: Path, processes: int) -> list[str]:
        many = ["--processes", str(processes)] if self.processes else []
        out = ["--out", str(folder / self.file.format(card=card))]
        return [sys.executable, str(ROOT / "amk_bootstrap.py"), f"amk.dev.{self.module}", *self.options, *many, *out]

    @property
    def builds(self) -> list[Build]:
        """The kernels that it needs, where it does not build them ahead itself."""
        if self.module != "bench_gpu":
            return []
        models = self.options[self.options.index("--models") + 1].split(",")
        macros = (("DRY_FEED", 1),) if "--chain" in self.options else ()
        return [Build(model, {}, context(model), macros) for model in models]


def _bench(models: str, file: str, limit_s: int, *options: str, processes: bool = False) -> Step:
    return Step("bench_gpu", ("--models", models, *options), f"bench-{{card}}-{file}.json", limit_s, processes)


STEPS: Mapping[str, Step] = {
    "1b": _bench(ONE_B, ONE_B, 400, processes=True),
    "smollm2": _bench(SMOL, SMOL, 200, processes=True),
    "8b": _bench(EIGHT_B, EIGHT_B, 500, processes=True),
    "chain": _bench(ONE_B, "chain", 100, "--positions", "128", "--chain"),
    "int8": _bench(f"{ONE_B}@int8", f"{ONE_B}-int8", 300, processes=True),
    "int4": _bench(f"{ONE_B}@int4-g128", f"{ONE_B}-int4-g128", 300, processes=True),
    "batch": Step("bench_batch", (), "batch-{card}.json", 400),
    "prefill": Step("bench_prefill", (), "prefill-{card}.json", 200),
    "graph": _bench(f"{ONE_B},{SMOL}", "beside-cuda-graph", 300, "--positions", "128", "--baselines", "cuda-graph"),
    "compile-1b": _bench(ONE_B, f"{ONE_B}-beside-torch-compile", 400, "--positions", "128", "--baselines", "torch-compile"),
    "compile-smollm2": _bench(SMOL, f"{SMOL}-beside-torch-compile", 400, "--positions", "128", "--baselines", "torch-compile"),
    "quality": Step("quality", (), "quality.json", 400),
    "knobs": Step("knob_effects", (), "knob-effects-{card}.json", 580),
    "sanitizer": Step("sanitize", (), "sanitizer-{card}.json", 560),
}


class State:
    """What is done at which commit, in a file of the folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / STATE
        try:
            self.steps: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self.steps = {}

    def done(self, name: str, at: str, processes: int) -> bool:
        """Whether the step ended well at this commit, which must be clean, with as many processes."""
        known = self.steps.get(name, {})
        exact = not at.endswith("+changes") and at != "unknown"
        return exact and (known.get("commit"), known.get("processes"), known.get("exit_code")) == (at, processes, 0)

    def keep(self, name: str, outcome: dict[str, Any]) -> None:
        self.steps[name] = outcome
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.steps, indent=1) + "\n", encoding="utf-8")


def build_all(steps: Sequence[Step], place: Place) -> None:
    """Every kernel of the steps into the cache of cubins, on all cores; what does not build is told, and its step will fail."""
    builds = list(dict.fromkeys(_key(build) for step in steps for build in step.builds))
    cases = [Build(model, {}, rows, macros) for model, rows, macros in builds]
    if not cases:
        return
    began = time.monotonic()
    with ahead(cases, place) as futures:
        for case, future in zip(cases, futures, strict=True):
            try:
                future.result()
            except BuildFailed as problem:
                print(f"building {case.model}: {problem}", file=sys.stderr, flush=True)
    print(f"{len(cases)} kernels built in {time.monotonic() - began:.0f} s", flush=True)


def _key(build: Build) -> tuple[str, int | None, tuple[tuple[str, int], ...]]:
    return build.model, build.context, build.macros


def run(step: Step, command: Sequence[str]) -> tuple[int, float]:
    """Exit code (124: longer than its limit, and ended with all that it had started) and seconds."""
    began = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        code = process.wait(step.limit_s)
    except BaseException as problem:
        with suppress(ProcessLookupError):  # it may have ended at the same moment
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if not isinstance(problem, subprocess.TimeoutExpired):
            raise
        code = 124
    return code, time.monotonic() - began


def publish(names: Sequence[str], asked: argparse.Namespace) -> bool:
    """Runs the steps that are not done; True if all of them ended well."""
    place, state, at = choose(None, "cuda"), State(asked.folder), commit()
    left = [name for name in names if asked.again or not state.done(name, at, asked.processes)]
    for name in names:
        if name not in left:
            print(f"{name}: done at this commit", flush=True)
    build_all([STEPS[name] for name in left], place)
    for name in left:
        command = STEPS[name].command(place.target.name, asked.folder, asked.processes)
        print(f"{time.strftime('%H:%M:%S')} {name}: {shlex.join(command[2:])}", flush=True)
        code, seconds = run(STEPS[name], command)
        state.keep(name, {"commit": at, "processes": asked.processes, "exit_code": code, "seconds": round(seconds, 1)})
        print(f"{time.strftime('%H:%M:%S')} {name}: exit code {code} after {seconds:.0f} s", flush=True)
    return all(state.steps.get(name, {}).get("exit_code") == 0 for name in names)


def conclude(folder: Path) -> bool:
    """Prints the table of all that the folder holds; False where a file may not be shown."""
    try:
        print(f"\n{table(folder)}", flush=True)
    except (ValueError, KeyError) as problem:
        print(f"publish: {problem}", file=sys.stderr)
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(STEPS), help=f"some of {', '.join(STEPS)}, with commas between them")
    parser.add_argument("--again", action="store_true", help="what is done at this commit too")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes whose median a latency is")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="where the results go")
    parser.add_argument("--list", action="store_true", help="the steps and their commands; nothing is run")
    asked = parser.parse_args()
    names = chosen(parser, "only", asked.only, list(STEPS))
    at_least(parser, "processes", asked.processes, 1)
    if asked.list:
        for name in names:
            print(f"{name}: {shlex.join(STEPS[name].command('CARD', asked.folder, asked.processes)[1:])}")
        return
    require_card("publish")
    with on_card("publish", lock=False):
        ended_well = publish(names, asked)
    sys.exit(0 if conclude(asked.folder) and ended_well else 1)


if __name__ == "__main__":
    main()
