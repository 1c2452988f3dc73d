"""What each knob does on the live card: some of its values, in turns with the default. Writes results/knob-effects-CARD.json.

    python amk_bootstrap.py amk.dev.knob_effects [--models "A,B,B x8"] [--knobs NAME,NAME] [--share K/N] [--all] [--again] [--out FILE]

A model's name with x8 or x16 behind it is a batch of as many sequences, and its times are of a step of all of them.

Kernels are built ahead, in a process a core. Every program is judged by the oracle before it is timed. One knob's values are timed in one
round: four copies of the default, two of them with weights of their own, each value, and again, each time with the arenas in another place.
How far apart the copies are, or what the samples of default and value scatter, whichever is more, is the noise that an effect must exceed.
The file is written anew after each knob; a file of the same commit and card is gone on with: what it has is not measured again, but with
--again.

On N cards at once, a process each measures the knobs of `--share K/N` into a file of its own (--out); dev/knob_file.py puts them together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from amk.dev.asked import chosen, share_of, writable
from amk.dev.judged import JudgedMachine, NotCorrect, judged
from amk.dev.knob_file import Keeper
from amk.dev.noise import noise_us, usual_us
from amk.dev.on_card import on_card, require_card
from amk.dev.places import Places
from amk.dev.prebuild import Build, ahead
from amk.dev.subject import Subject, subject_of
from amk.eval.bench import interleaved, launch_start, refuse_company
from amk.eval.candidate import Candidate
from amk.eval.card import choose
from amk.eval.session import Session
from amk.schedule.config import config_dict, with_value
from amk.schedule.cost import streamed_bytes
from amk.schedule.knobs import KNOBS, Config, Knob
from amk.vm.interface import LaunchFailed

SUBJECTS = (
    Subject("llama-3.2-1b-shape"),
    Subject("smollm2-135m-shape"),
    Subject("llama-3.2-1b-shape@int8"),
    Subject("llama-3.2-1b-shape@int4-g128"),
    Subject("llama-3.2-1b-shape", 8),
    Subject("llama-3.2-1b-shape", 16),
)
CONTEXT = 4096
POSITION = 128
# How attention is shared out matters more the later the position.
LATE_POSITION, LATE_KNOBS = 1024, ("tiling.attention.kv_block", "kernel_knobs.kv_splits")
SAMPLES = 9
# Of a knob with more than three other values: those that are tried. Of a set: without each of its entries.
SOME_OF: dict[str, tuple[Any, ...]] = {
    "tiling.gemv.N_tile": (32, 64, 128),
    "tiling.attention.kv_block": (16, 64, 256),
    "pipelining_depth": (2, 4, 8),
    "smem_bytes_per_block": (32768, 65536, 131072),
    "kernel_knobs.stage_bytes": (8192, 24576, 32768),
    "kernel_knobs.poll_sleep_ns": (1, 50, 100),  # 0 is one of the first two
    "kernel_knobs.release_early": (0, 4, 8),
    "kernel_knobs.high_watermark": (2, 4, 8),
    "kernel_knobs.reduction_slots": (1, 4, 8),  # 0 is one of the first two
    "kernel_knobs.kv_splits": (1, 4, 8),
    "kernel_knobs.weight_feed": ("cp_async", "plain"),  # auto is bulk where there is that
}
# Of a range that a search goes through in small steps, where every value is asked for: from end to end.
WIDE = {"pipelining_depth": (1, 2, 4, 8, 12), "smem_bytes_per_block": (32768, 65536, 131072)}
COPIES = 4  # of the default
Row = dict[str, Any]


def other_values(knob: Knob, every: bool = False) -> list[Any]:
    """The values that are tried beside the default: two or three, or `every` choice (of a range some, of a set the empty one too)."""
    if knob.type == "set":
        return [*combinations(knob.choices, len(knob.choices) - 1), *([()] if every else [])]
    tried = (WIDE if every else SOME_OF).get(knob.name, knob.values)
    return [value for value in tried if value != knob.default]


def shown(value: Any) -> str:
    """A knob's value as a user writes it."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def positions(knob: Knob) -> tuple[int, ...]:
    return (POSITION, LATE_POSITION) if knob.name in LATE_KNOBS else (POSITION,)


def timed_rows(held: Sequence[tuple[Row, JudgedMachine]], defaults: Sequence[JudgedMachine], position: int, gbs: float) -> list[Row]:
    """The machines at one position in turns with the defaults: a row each. What is under the floor has no latency."""
    span, machines = launch_start(position, CONTEXT), [entry.machine for entry in (*defaults, *(entry for _, entry in held))]
    refuse_company()
    places = Places(machines)
    samplers = [places.sampler(machine, span) for machine in machines]
    taken = interleaved(samplers, SAMPLES)
    refuse_company()
    copies, others = taken[: len(defaults)], taken[len(defaults) :]
    base = usual_us(copies)
    rows = []
    for (head, entry), samples in zip(held, others, strict=True):
        latency, noise = float(np.median(samples)), noise_us(copies, samples)
        streamed = streamed_bytes(entry.machine.program, position)
        floor = streamed / gbs * 1e-3
        measured: Row = {
            "position": position, "latency_us": latency, "floor_us": floor, "streamed_bytes": streamed, "samples_us": samples,
            "default_us": base, "copies_samples_us": copies, "default_arena_bytes": defaults[0].facts["arena_bytes"],
            "noise_us": noise, "effect_pct": 100 * (latency / base - 1), "noise_pct": 100 * noise / base,
            "beyond_noise": abs(latency - base) > noise,
        }  # fmt: skip
        refused = {"latency_us": None, "position": position, "reason": f"{latency:.1f} us is under the floor of {floor:.1f} us"}
        rows.append(entry.facts | head | (measured if latency >= floor else refused))
    return rows


@dataclass
class Bench:
    """One subject on the card, with copies of its default."""

    subject: Subject
    session: Session
    defaults: Sequence[JudgedMachine]

    @classmethod
    def of(cls, subject: Subject, session: Session, default: Candidate) -> Bench:
        """Every second copy has weights of its own, the others those of the copy before."""
        copies: list[JudgedMachine] = []
        for number in range(COPIES):
            before, beside = (copies[0].facts if copies else None), (copies[-1].machine if number % 2 else None)
            copies.append(judged(session, default, "default", before, beside))
        return cls(subject, session, copies)

    def close(self) -> None:
        for entry in reversed(self.defaults):
            entry.machine.close()

    def knob_rows(self, knob: Knob, values: Mapping[str, Candidate]) -> list[Row]:
        """A row for each value (as shown) of a knob and position; values without a program of their own say whose they have."""
        rows: list[Row] = []
        held: list[tuple[Row, JudgedMachine]] = []
        seen = {self.defaults[0].facts["schedule_id"]: shown(knob.default)}
        try:
            for value, candidate in values.items():
                head = {"model": self.subject.model, "batch": self.subject.batch, "knob": knob.name, "value": value}
                same = seen.get(candidate.facts.schedule_id or "")
                if same is not None:
                    rows.append(head | {"latency_us": None, "same_program_as": same})
                    continue
                entry = self._judged(head, candidate, rows)
                if entry is not None:
                    seen[entry.facts["schedule_id"]] = value
                    held.append((head, entry))
            for position in positions(knob) if held else ():
                rows += timed_rows(held, self.defaults, position, self.session.bandwidth())
        finally:
            for _, entry in held:
                entry.machine.close()
        return rows

    def _judged(self, head: Row, candidate: Candidate, rows: list[Row]) -> JudgedMachine | None:
        """The machine; what was refused or is wrong becomes a row without a latency."""
        try:
            return judged(self.session, candidate, f"{head['knob']}={head['value']}", beside=self.defaults[0].machine)
        except (NotCorrect, LaunchFailed) as problem:
            if isinstance(problem, LaunchFailed) and problem.kind == "crash":
                raise  # the card's context is gone: nothing after it would be measured
            refused = candidate.program is None
            rows.append(head | {"latency_us": None, "correct": None if refused else False, "reason": str(problem)})
            return None


Values = Mapping[Knob, Sequence[Any]]  # of each knob, those that are tried


def configs(subject: Subject, tried: Values) -> dict[tuple[Subject, str, str], dict[str, Any]]:
    """The configs of a subject by subject, knob and value; the default's under the empty name."""
    found = {
        (knob.name, shown(value)): config_dict(with_value(Config(), knob.name, value)) for knob, values in tried.items() for value in values
    }
    return {(subject, "", ""): {}} | {(subject, *key): config for key, config in found.items()}


def left(subject: Subject, tried: Values, keeper: Keeper) -> Values:
    """Those knobs of a subject that the keeper has not, or not with all of these values."""
    return {knob: values for knob, values in tried.items() if not keeper.has(subject, knob.name, list(map(shown, values)))}


def measure(todo: Mapping[Subject, Values], keeper: Keeper) -> None:
    """Measures the knobs of each subject, one after the other, and gives the rows of each to the keeper."""
    place = choose(None, "cuda")
    refuse_company(context=False)
    wanted = {key: config for subject, tried in todo.items() for key, config in configs(subject, tried).items()}
    with ahead([Build(s.model, config, CONTEXT, batch=s.batch) for (s, _, _), config in wanted.items()], place) as futures:
        cases = dict(zip(wanted, futures, strict=True))
        for subject, tried in todo.items():
            session = Session(subject.model, place, partial(say, subject))
            bench = Bench.of(subject, session, cases[subject, "", ""].result())
            keeper.begin(bench.defaults[0].facts | {"batch": subject.batch, "context": CONTEXT}, session.bandwidth())
            for knob, values in tried.items():
                rows = bench.knob_rows(knob, {shown(value): cases[subject, knob.name, shown(value)].result() for value in values})
                keeper.take(subject, knob.name, rows)
                print(*map(line, rows), sep="\n", flush=True)
            bench.close()


def say(subject: Subject, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {subject}: {text}", file=sys.stderr, flush=True)


def line(row: Row) -> str:
    head = f"{subject_of(row)!s:20} {row['knob']:28} {row['value']:22}"
    if row["latency_us"] is None:
        return f"{head} " + (f"same program as {row['same_program_as']}" if "same_program_as" in row else row["reason"])
    beyond = "" if row["beyond_noise"] else ", within the noise"
    effect = f"{row['effect_pct']:+6.2f} % (noise {row['noise_pct']:.2f} %){beyond}"
    return f"{head} position {row['position']:5}: {row['latency_us']:7.1f} us, default {row['default_us']:7.1f} us: {effect}"


def share(text: str, knobs: Sequence[Knob]) -> list[Knob]:
    """The knobs of part K of N, "K/N": every Nth of them. ValueError where K is not from 1 to N."""
    number, count = share_of(text)
    return list(knobs[number - 1 :: count])


def main() -> None:
    names = [knob.name for knob in KNOBS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(map(str, SUBJECTS)), help="some of the models, with commas between them")
    parser.add_argument("--knobs", default=",".join(names), help="some of the knobs, with commas between them")
    parser.add_argument("--share", default="1/1", help="K/N: the Kth of N equal parts of these knobs")
    parser.add_argument("--all", action="store_true", help="every value that is offered, not two or three a knob")
    parser.add_argument("--again", action="store_true", help="what the results file has of this commit and card too")
    parser.add_argument("--out", type=Path, help="the results file; results/knob-effects-CARD.json where none is named")
    asked = parser.parse_args()
    models, named = chosen(parser, "models", asked.models, list(map(str, SUBJECTS))), chosen(parser, "knobs", asked.knobs, names)
    try:
        knobs = share(asked.share, [knob for knob in KNOBS if knob.name in named])
    except ValueError as problem:
        parser.error(f"--share: {problem}")
    writable(parser, asked.out)
    require_card("knob_effects")
    with on_card("knob_effects"):
        keeper = Keeper(asked.out or Path("results") / f"knob-effects-{choose(None, 'cuda').target.name}.json")
        tried = {knob: other_values(knob, asked.all) for knob in knobs}
        subjects = [subject for subject in SUBJECTS if str(subject) in models]
        todo = {subject: tried if asked.again else left(subject, tried, keeper) for subject in subjects}
        measure({subject: some for subject, some in todo.items() if some}, keeper)
    if keeper.failed:
        print(f"knob_effects: {len(keeper.failed)} values are not correct or not honest; see {keeper.path}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
