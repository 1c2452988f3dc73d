"""Measures the validator: its verdict on random small programs and on mutants of real lowerings, against what they really do."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from multiprocessing import parent_process
from random import Random
from threading import Thread, current_thread, main_thread
from time import monotonic
from typing import Any, Literal, TypeAlias

from amk.eval.processes import own_context
from amk.eval.soundness.explorer import explore
from amk.eval.soundness.findings import TooLarge, Unsafe
from amk.eval.soundness.lowerings import random_lowering
from amk.eval.soundness.mutants import mutate
from amk.eval.soundness.random_programs import is_small, random_program
from amk.eval.soundness.trace import check_traces
from amk.isa.filter_draw import FilterDraw
from amk.isa.filter_head import FilterHead
from amk.schedule.program import Program
from amk.schedule.validate import validate

Source: TypeAlias = Literal["program", "mutant"]
Case: TypeAlias = tuple[Source, int, int]  # source, seed, number
BATCH = 50  # cases that a worker is given at a time
MAX_FALSE_REJECTS = 0.05  # of the safe cases
EXPLORED_TOKENS, TRACED_TOKENS, ORDERS = 3, 2, 64


@dataclass(frozen=True)
class Outcome:
    """One case: what was done to the program, what is wrong with it, and what the validator said.

    X is None where the validator accepted; `raised` is what it raised, which it never may.
    """

    case: str
    mutations: tuple[str, ...]
    found: str | None
    reasons: tuple[str, ...] | None
    family: str = "greedy"
    raised: str | None = None
    too_large: bool = False

    @property
    def false_accept(self) -> bool:
        return self.found is not None and self.reasons is None and self.raised is None

    @property
    def false_reject(self) -> bool:
        return self.found is None and self.reasons is not None and not self.too_large


def case_program(case: Case) -> tuple[tuple[str, ...], Program]:
    """The mutations and the program of a case; the same for the same case, always."""
    source, seed, number = case
    random = Random(f"{seed}/{source}/{number}")
    if source == "mutant":
        return _mutated(random, random_lowering(random), random.choice((1, 1, 1, 2)))
    return _small_program(random)


def _mutated(random: Random, program: Program, times: int) -> tuple[tuple[str, ...], Program]:
    names = []
    for _ in range(times):
        name, program = mutate(random, program)
        names.append(name)
    return tuple(names), program


def _small_program(random: Random) -> tuple[tuple[str, ...], Program]:
    while True:
        names, program = _mutated(random, random_program(random), random.choice((0, 1, 1, 1, 2, 2)))
        if is_small(program):
            return names, program


def judge(case: Case) -> Outcome:
    """Runs one case."""
    names, program = case_program(case)
    label, family = "/".join(map(str, (case[1], case[0], case[2]))), family_of(program)
    try:
        problem = _truth(case, program)
    except TooLarge:
        return Outcome(label, names, None, None, family, too_large=True)
    found = None if problem is None else str(problem)
    try:
        verdict = validate(program)
    except Exception as error:  # the validator may never raise: one that does is a result of this measurement
        return Outcome(label, names, found, None, family, f"{type(error).__name__}: {error}")
    reasons = tuple(map(str, verdict)) if isinstance(verdict, tuple) else None
    return Outcome(label, names, found, reasons, family)


def family_of(program: Program) -> str:
    """How it chooses tokens, or that it computes a batch or a stretch."""
    if program.machine.batch > 1:
        return "prefill" if program.machine.prefill else "batch"
    if not program.draws:
        return "greedy"
    return "filter" if any(isinstance(task, FilterHead | FilterDraw) for queue in program.queues for task in queue) else "draw"


def _truth(case: Case, program: Program) -> Unsafe | None:
    if case[0] == "program":
        return explore(program, EXPLORED_TOKENS)
    return check_traces(program, Random(f"{case[1]}/orders/{case[2]}"), TRACED_TOKENS, ORDERS)


def judge_all(cases: tuple[Case, ...]) -> list[Outcome]:
    return [judge(case) for case in cases]


def run_verify(
    programs: int = 50_000,
    mutants: int = 5_000,
    seed: int = 0,
    minutes: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    processes: int = 2,
) -> dict[str, Any]:
    """Judges `programs` random programs and `mutants` mutants of lowerings; JSON-able counts, and every wrong verdict with its case.

    Stops early after `minutes`. `progress` gets the cases judged and wanted. `processes` 1 stays in this process.
    """
    began = monotonic()
    deadline = None if minutes is None else began + 60 * minutes
    outcomes: dict[Source, list[Outcome]] = {"program": [], "mutant": []}
    for done in _judged(_batches(programs, mutants, seed), processes, deadline):
        for outcome in done:
            outcomes["mutant" if "/mutant/" in outcome.case else "program"].append(outcome)
        if progress is not None:
            progress(sum(map(len, outcomes.values())), programs + mutants)
    result: dict[str, Any] = {"seed": seed, "seconds": round(monotonic() - began, 1), "processes": processes}
    result |= {f"{source}s": summary(found) for source, found in outcomes.items()}
    parts = (result["programs"], result["mutants"])
    result["passed"] = any(part["cases"] for part in parts) and all(map(_sound, parts))
    return result


def _sound(part: dict[str, Any]) -> bool:
    return not part["false_accepts"] and not part["raised"] and part["false_reject_share"] <= MAX_FALSE_REJECTS


def _batches(programs: int, mutants: int, seed: int) -> Iterator[tuple[Case, ...]]:
    """Both kinds of case, in proportion, so that a run that is cut short has seen both."""
    slices = max(1, -(-(programs + mutants) // BATCH))
    for k in range(slices):
        yield tuple(
            (source, seed, number)
            for source, count in _counts(programs, mutants)
            for number in range(k * count // slices, (k + 1) * count // slices)
        )


def _counts(programs: int, mutants: int) -> tuple[tuple[Source, int], ...]:
    return ("program", programs), ("mutant", mutants)


def _judged(batches: Iterator[tuple[Case, ...]], processes: int, deadline: float | None) -> Iterator[list[Outcome]]:
    in_time = takewhile(lambda _: deadline is None or monotonic() < deadline, batches)
    if processes == 1:
        yield from map(judge_all, in_time)
        return
    with ProcessPoolExecutor(processes, own_context(), _end_with_parent) as pool:
        running: set[Future[list[Outcome]]] = set()
        for batch in in_time:
            with _interrupts_ignored():  # a worker that starts takes this over: what interrupts the terminal is for its parent
                running.add(pool.submit(judge_all, batch))
            if len(running) >= 2 * processes:
                done, running = wait(running, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        yield from (future.result() for future in running)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Only the main thread may say what a signal does, and only there do signals arrive."""
    if current_thread() is not main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def _end_with_parent() -> None:
    """Ends this worker when its parent is gone: a parent that is killed tells nobody, and its workers would wait for cases forever."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Counts of one source's outcomes, and its wrong verdicts."""
    judged = sorted((o for o in outcomes if not o.too_large), key=lambda o: int(o.case.rsplit("/", 1)[1]))
    safe = [o for o in judged if o.found is None]
    false_rejects = [o for o in judged if o.false_reject]
    return {
        "cases": len(judged),
        "too_large": len(outcomes) - len(judged),
        "safe": len(safe),
        "safe_share": round(len(safe) / max(1, len(judged)), 4),
        "unsafe": dict(sorted(Counter(o.found[1 : o.found.index("]")] for o in judged if o.found is not None).items())),
        "families": {
            family: {"cases": cases, "safe": sum(o.family == family for o in safe)}
            for family, cases in sorted(Counter(o.family for o in judged).items())
        },
        "mutations": dict(sorted(Counter(name for o in judged for name in o.mutations).items())),
        "false_accepts": [_line(o) for o in judged if o.false_accept],
        "raised": [_line(o) | {"raised": o.raised} for o in judged if o.raised is not None],
        "false_reject_share": round(len(false_rejects) / max(1, len(safe)), 4),
        "false_rejects": [_line(o) for o in false_rejects],
    }


def _line(outcome: Outcome) -> dict[str, Any]:
    return {
        "case": outcome.case,
        "mutations": list(outcome.mutations),
        "found": outcome.found,
        "reasons": [reason[:200] for reason in (outcome.reasons or ())[:3]],
    }
