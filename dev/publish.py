"""Everything that is published, measured step by step on the live card: each step writes its own file into results/.

    python amk_bootstrap.py amk.dev.publish [--only STEP,STEP] [--cards N] [--again] [--processes N] [--folder DIR] [--list]

A step is a command of its own, which may be run by itself as well (--list shows them). What is done at the present commit is not done again
unless --again; a step that fails or takes longer than its limit does not stop the others. At the end a table says what was found.

N cards of one machine share the steps out among themselves. Steps beside transformers come last and one by one: other work on the host
makes transformers slower, and so a ratio better than it is.
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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from amk.dev.asked import at_least, chosen, writable
from amk.dev.bench_gpu import ONE_B, SMOL, context
from amk.dev.card import visible_cards
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
    """A command `module options --out FILE`; `file` has {card} for the card's name. `processes`: it takes --processes.

    `alone`: nothing else may run on the host meanwhile.
    """

    module: str
    options: tuple[str, ...]
    file: str
    limit_s: int
    processes: bool = False
    alone: bool = False

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
    return Step("bench_gpu", ("--models", models, *options), f"bench-{{card}}-{file}.json", limit_s, processes, "--baselines" in options)


STEPS: Mapping[str, Step] = {
    "1b": _bench(ONE_B, ONE_B, 400, processes=True),
    "smollm2": _bench(SMOL, SMOL, 200, processes=True),
    "8b": _bench(EIGHT_B, EIGHT_B, 500, processes=True),
    "chain": _bench(ONE_B, "chain", 100, "--positions", "128", "--chain"),
    "int8": _bench(f"{ONE_B}@int8", f"{ONE_B}-int8", 300, processes=True),
    "fp8": _bench(f"{ONE_B}@fp8", f"{ONE_B}-fp8", 300, processes=True),
    "int4": _bench(f"{ONE_B}@int4-g128", f"{ONE_B}-int4-g128", 300, processes=True),
    "batch": Step("bench_batch", (), "batch-{card}.json", 400),
    "prefill": Step("bench_prefill", (), "prefill-{card}.json", 200, alone=True),
    "graph": _bench(f"{ONE_B},{SMOL}", "beside-cuda-graph", 300, "--positions", "128", "--baselines", "cuda-graph"),
    "compile-1b": _bench(ONE_B, f"{ONE_B}-beside-torch-compile", 400, "--positions", "128", "--baselines", "torch-compile"),
    "compile-smollm2": _bench(SMOL, f"{SMOL}-beside-torch-compile", 400, "--positions", "128", "--baselines", "torch-compile"),
    "quality": Step("quality", (), "quality.json", 400),
    "knobs": Step("knob_effects", (), "knob-effects-{card}.json", 2400),
    "sanitizer": Step("sanitize", (), "sanitizer-{card}.json", 560),
}


class State:
    """What is done at which commit, in a file of the folder."""

    def __init__(self, folder: Path) -> None:
        self.path, self.writing = folder / STATE, Lock()
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
        with self.writing:
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


class Runner:
    """Runs commands, several at once if asked by several threads; `end_all` ends them and lets no other begin."""

    def __init__(self) -> None:
        self.under_way: set[subprocess.Popen[bytes]] = set()
        self.ended = False
        self.changing = Lock()

    def run(self, step: Step, command: Sequence[str], card: str) -> tuple[int, float]:
        """Exit code (124: longer than its limit, and ended with all that it had started) and seconds, on one of the cards."""
        began = time.monotonic()
        environment = os.environ | {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": card}
        with self.changing:
            if self.ended:
                return 130, 0.0
            process = subprocess.Popen(command, start_new_session=True, env=environment)
            self.under_way.add(process)
        try:
            code = process.wait(step.limit_s)
        except BaseException as problem:
            _kill(process)
            process.wait()
            if not isinstance(problem, subprocess.TimeoutExpired):
                raise
            code = 124
        finally:
            with self.changing:
                self.under_way.discard(process)
        return code, time.monotonic() - began

    def end_all(self) -> None:
        with self.changing:
            self.ended = True
            for process in self.under_way:
                _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started, if it has not been waited for."""
    with suppress(ProcessLookupError):  # it may have ended at the same moment
        os.killpg(process.pid, signal.SIGKILL)


def share_out(names: Sequence[str], cards: Sequence[str], measure: Callable[[str, str], None], end_all: Callable[[], None]) -> None:
    """Calls `measure` with each step and the card that took it: those that may share the host first, then the others one by one.

    An interrupt ends what is under way before it goes on.
    """
    queue: SimpleQueue[str] = SimpleQueue()
    for name in names:
        if not STEPS[name].alone:
            queue.put(name)

    def work(card: str) -> None:
        while not queue.empty():
            with suppress(Empty):
                measure(queue.get_nowait(), card)

    with ThreadPoolExecutor(len(cards)) as threads:
        try:
            for ended in wait([threads.submit(work, card) for card in cards], return_when=FIRST_EXCEPTION).done:
                ended.result()
        except BaseException:
            end_all()
            raise
    for name in names:
        if STEPS[name].alone:
            measure(name, cards[0])


def publish(names: Sequence[str], asked: argparse.Namespace) -> bool:
    """Runs the steps that are not done; True if all of them ended well."""
    place, state, at, runner = choose(None, "cuda"), State(asked.folder), commit(), Runner()
    left = [name for name in names if asked.again or not state.done(name, at, asked.processes)]
    for name in names:
        if name not in left:
            print(f"{name}: done at this commit", flush=True)
    build_all([STEPS[name] for name in left], place)

    def measure(name: str, card: str) -> None:
        command = STEPS[name].command(place.target.name, asked.folder, asked.processes)
        on = f" on card {card}" if asked.cards > 1 else ""
        print(f"{time.strftime('%H:%M:%S')} {name}{on}: {shlex.join(command[2:])}", flush=True)
        code, seconds = runner.run(STEPS[name], command, card)
        state.keep(name, {"commit": at, "processes": asked.processes, "exit_code": code, "seconds": round(seconds, 1)})
        print(f"{time.strftime('%H:%M:%S')} {name}: exit code {code} after {seconds:.0f} s", flush=True)

    share_out(left, visible_cards()[: asked.cards], measure, runner.end_all)
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
    parser.add_argument("--cards", type=int, default=1, help="cards that share the steps out among themselves")
    parser.add_argument("--again", action="store_true", help="what is done at this commit too")
    parser.add_argument("--processes", type=int, default=3, help="fresh processes whose median a latency is")
    parser.add_argument("--folder", type=Path, default=Path("results"), help="where the results go")
    parser.add_argument("--list", action="store_true", help="the steps and their commands; nothing is run")
    asked = parser.parse_args()
    names = chosen(parser, "only", asked.only, list(STEPS))
    at_least(parser, "processes", asked.processes, 1)
    at_least(parser, "cards", asked.cards, 1)
    if asked.list:
        for name in names:
            print(f"{name}: {shlex.join(STEPS[name].command('CARD', asked.folder, asked.processes)[1:])}")
        return
    writable(parser, asked.folder / STATE, "folder")
    require_card("publish")
    if asked.cards > len(visible_cards()):
        parser.error(f"--cards: must be at most {len(visible_cards())}, which are there, but got {asked.cards}")
    with on_card("publish", lock=False):
        ended_well = publish(names, asked)
    sys.exit(0 if conclude(asked.folder) and ended_well else 1)


if __name__ == "__main__":
    main()
