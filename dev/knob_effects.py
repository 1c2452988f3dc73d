"""What each knob does on the live card: every value offered, in turns with the default. Writes results/knob-effects-CARD.json.

    python amk_bootstrap.py amk.dev.knob_effects [--models A,B] [--knobs NAME,NAME] [--out FILE]

Kernels are built ahead, in a process a core. Every program is judged by the oracle before it is timed. One knob's values are timed in one
round: the default, the default once more from another place in memory, each value, and again. What the two defaults differ by, or what
the samples of default and value scatter, whichever is more, is the noise that an effect must exceed. The file is written anew after each
knob; a file of the same commit and card is gone on with, and what was asked for takes the place of what it has.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from amk.dev.judged import JudgedMachine, NotCorrect, judged
from amk.dev.noise import noise_us
from amk.dev.prebuild import Build, ahead
from amk.dev.provenance import provenance, write_results
from amk.eval.bench import interleaved, launch_start, launch_us, refuse_company
from amk.eval.candidate import Candidate
from amk.eval.card import choose, live_card
from amk.eval.card_lock import live_card_lock
from amk.eval.errors import EvalError
from amk.eval.session import Session
from amk.schedule.config import config_dict, with_value
from amk.schedule.cost import streamed_bytes
from amk.schedule.knobs import KNOBS, Config, Knob
from amk.vm.build import BuildFailed
from amk.vm.interface import LaunchFailed

MODELS = ("llama-3.2-1b-shape", "smollm2-135m-shape")
CONTEXT = 4096
POSITION = 128
# How attention is shared out matters more the later the position.
LATE_POSITION, LATE_KNOBS = 1024, ("tiling.attention.kv_block", "kernel_knobs.kv_splits")
SAMPLES = 9
# Of a knob with a wide range: values from end to end.
SOME_OF = {"pipelining_depth": (1, 2, 4, 8, 12), "smem_bytes_per_block": (32768, 65536, 131072)}
TWIN = "default again"
Row = dict[str, Any]


def other_values(knob: Knob) -> list[Any]:
    """The values that are tried: every choice but the default, some of a range, a set without each of its entries and empty."""
    if knob.type == "set":
        return [*combinations(knob.choices, len(knob.choices) - 1), ()]
    return [value for value in SOME_OF.get(knob.name, knob.choices) if value != knob.default]


def shown(value: Any) -> str:
    """A knob's value as a user writes it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def positions(knob: Knob) -> tuple[int, ...]:
    return (POSITION, LATE_POSITION) if knob.name in LATE_KNOBS else (POSITION,)


def timed_rows(
    held: Sequence[tuple[Row, JudgedMachine]], default: JudgedMachine, twin: JudgedMachine, position: int, gbs: float
) -> list[Row]:
    """The machines at one position in turns with the two defaults: a row each. What is under the floor has no latency."""
    span = launch_start(position, CONTEXT)
    refuse_company()
    samplers = [partial(launch_us, entry.machine, *span) for entry in (default, twin, *(entry for _, entry in held))]
    ours, again, *others = interleaved(samplers, SAMPLES)
    refuse_company()
    base = float(np.median(ours))
    rows = []
    for (head, entry), samples in zip(held, others, strict=True):
        latency, noise = float(np.median(samples)), noise_us(ours, again, samples)
        streamed = streamed_bytes(entry.machine.program, position)
        floor = streamed / gbs * 1e-3
        measured: Row = {
            "position": position, "latency_us": latency, "floor_us": floor, "streamed_bytes": streamed, "samples_us": samples,
            "default_us": base, "default_samples_us": ours, "twin_us": float(np.median(again)), "twin_samples_us": again,
            "default_arena_bytes": default.facts["arena_bytes"],
            "noise_us": noise, "effect_pct": 100 * (latency / base - 1), "noise_pct": 100 * noise / base,
            "beyond_noise": abs(latency - base) > noise,
        }  # fmt: skip
        refused = {"latency_us": None, "position": position, "reason": f"{latency:.1f} us is under the floor of {floor:.1f} us"}
        rows.append(entry.facts | head | (measured if latency >= floor else refused))
    return rows


@dataclass
class Bench:
    """One model on the card: its default twice, and the values that have been seen by the id of their program."""

    session: Session
    default: JudgedMachine
    twin: JudgedMachine

    def close(self) -> None:
        for entry in (self.default, self.twin):
            entry.machine.close()

    def knob_rows(self, knob: Knob, candidates: Sequence[Candidate]) -> list[Row]:
        """A row for each value of a knob and position; values without a program of their own say whose they have."""
        rows: list[Row] = []
        held: list[tuple[Row, JudgedMachine]] = []
        seen = {self.default.facts["schedule_id"]: shown(knob.default)}
        try:
            for value, candidate in zip(other_values(knob), candidates, strict=True):
                head = {"model": self.session.model.spec.name, "knob": knob.name, "value": shown(value)}
                same = seen.get(candidate.facts.schedule_id or "")
                if same is not None:
                    rows.append(head | {"latency_us": None, "same_program_as": same})
                    continue
                entry = self._judged(head, candidate, rows)
                if entry is not None:
                    seen[entry.facts["schedule_id"]] = shown(value)
                    held.append((head, entry))
            for position in positions(knob) if held else ():
                rows += timed_rows(held, self.default, self.twin, position, self.session.bandwidth())
        finally:
            for _, entry in held:
                entry.machine.close()
        return rows

    def _judged(self, head: Row, candidate: Candidate, rows: list[Row]) -> JudgedMachine | None:
        """The machine; what was refused or is wrong becomes a row without a latency."""
        try:
            return judged(self.session, candidate, f"{head['knob']}={head['value']}", beside=self.default.machine)
        except (NotCorrect, LaunchFailed) as problem:
            if isinstance(problem, LaunchFailed) and problem.kind == "crash":
                raise  # the card's context is gone: nothing after it would be measured
            refused = candidate.program is None
            rows.append(head | {"latency_us": None, "correct": None if refused else False, "reason": str(problem)})
            return None


def configs(model: str, knobs: Sequence[Knob]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """The configs of a model by model, knob and value; the default's under the empty name."""
    found = {
        (knob.name, shown(value)): config_dict(with_value(Config(), knob.name, value)) for knob in knobs for value in other_values(knob)
    }
    return {(model, "", ""): {}} | {(model, *key): config for key, config in found.items()}


def measure(models: Sequence[str], knobs: Sequence[Knob], keeper: Keeper) -> None:
    """Measures each model's knobs, one after the other, and gives the rows of each to the keeper."""
    place = choose(None, "cuda")
    refuse_company(context=False)
    wanted = {key: config for model in models for key, config in configs(model, knobs).items()}
    with ahead([Build(model, config, CONTEXT) for (model, _, _), config in wanted.items()], place) as futures:
        cases = dict(zip(wanted, futures, strict=True))
        for model in models:
            session = Session(model, place, partial(say, model))
            bench = Bench(session, *(judged(session, cases[model, "", ""].result(), name) for name in ("default", TWIN)))
            keeper.begin(bench.default.facts, session.bandwidth())
            for knob in knobs:
                candidates = [cases[model, knob.name, shown(value)].result() for value in other_values(knob)]
                keeper.take(model, knob, bench.knob_rows(knob, candidates))
            bench.close()


def say(model: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {model}: {text}", file=sys.stderr, flush=True)


class Keeper:
    """The results file: written anew after each knob, with what it had of the same commit and card."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reads: list[float] = []
        self.defaults: list[Row] = []
        self.found: list[Row] = []
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        came, now = before["provenance"], provenance()
        clean = now["commit"] != "unknown" and not now["commit"].endswith("+changes")
        if clean and came["commit"] == now["commit"] and [c["name"] for c in came["cards"]] == [c["name"] for c in now["cards"]]:
            self.reads, self.defaults, self.found = before["plain_read_gbs"], before["defaults"], before["rows"]

    def begin(self, default: Row, gbs: float) -> None:
        """A model's default program, and the plain read of its process."""
        self.reads.append(gbs)
        self.defaults = [*(row for row in self.defaults if row["model"] != default["model"]), default | {"context": CONTEXT}]

    def take(self, model: str, knob: Knob, rows: list[Row]) -> None:
        """Takes the rows of a model's knob in place of those that it had."""
        for row in rows:
            print(line(row), flush=True)
        others = [row for row in self.found if (row["model"], row["knob"]) != (model, knob.name)]
        order = [k.name for k in KNOBS]
        self.found = sorted([*others, *rows], key=lambda row: (row["model"], order.index(row["knob"])))
        write_results(self.path, {"plain_read_gbs": self.reads, "defaults": self.defaults, "rows": self.found})

    @property
    def failed(self) -> list[Row]:
        """Values that are not correct, or were timed and refused."""
        return [row for row in self.found if row["latency_us"] is None and row.get("reason") and row.get("correct") is not None]


def line(row: Row) -> str:
    head = f"{row['model']:20} {row['knob']:28} {row['value']:22}"
    if row["latency_us"] is None:
        return f"{head} " + (f"same program as {row['same_program_as']}" if "same_program_as" in row else row["reason"])
    beyond = "" if row["beyond_noise"] else ", within the noise"
    effect = f"{row['effect_pct']:+6.2f} % (noise {row['noise_pct']:.2f} %){beyond}"
    return f"{head} position {row['position']:5}: {row['latency_us']:7.1f} us, default {row['default_us']:7.1f} us: {effect}"


def chosen(parser: argparse.ArgumentParser, option: str, text: str, allowed: Sequence[str]) -> list[str]:
    """The names that were asked for, in the order of `allowed`; ends the process where one is unknown."""
    asked = text.split(",")
    if unknown := [name for name in asked if name not in allowed]:
        parser.error(f"--{option}: must be some of {', '.join(allowed)}, but got {unknown[0]!r}")
    return [name for name in allowed if name in asked]


def main() -> None:
    names = [knob.name for knob in KNOBS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="some of the models, with commas between them")
    parser.add_argument("--knobs", default=",".join(names), help="some of the knobs, with commas between them")
    parser.add_argument("--out", type=Path, help="the results file; results/knob-effects-CARD.json where none is named")
    asked = parser.parse_args()
    models, knobs = chosen(parser, "models", asked.models, MODELS), chosen(parser, "knobs", asked.knobs, names)
    if live_card() is None:
        print("knob_effects: needs an NVIDIA card and its driver, but none was found", file=sys.stderr)
        sys.exit(3)
    try:
        with live_card_lock(partial(print, flush=True)):
            keeper = Keeper(asked.out or Path("results") / f"knob-effects-{choose(None, 'cuda').target.name}.json")
            measure(models, [knob for knob in KNOBS if knob.name in knobs], keeper)
    except (EvalError, NotCorrect, LaunchFailed, BuildFailed) as problem:
        print(f"knob_effects: {problem}", file=sys.stderr)
        sys.exit(getattr(problem, "exit_code", 1))
    if keeper.failed:
        print(f"knob_effects: {len(keeper.failed)} values are not correct or not honest; see {keeper.path}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
