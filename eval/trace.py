"""Where the time of one token goes: a traced build of a program that was found correct, its timeline as a file, and its sums.

The traced build is a binary of its own and slower than the one that is measured: its times say where time goes, not how long a token takes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amk.eval.candidate import Candidate
from amk.eval.errors import EnvironmentProblem, UsageError
from amk.eval.session import Session
from amk.eval.timeline import Span, by_actor, by_task, chrome_events, timeline
from amk.schedule.program import Program
from amk.vm.build import compile_kernel
from amk.vm.cuda import CudaVM, UnprovenCudaVM
from amk.vm.source import traced_source
from amk.vm.trace import Recording, record

ROOM = 12288  # events a warp: three tokens of an 8-billion-parameter model with a wait for every chunk


def trace(session: Session, candidate: Candidate, *, position: int, out: Path) -> dict[str, Any]:
    """A shapes.Trace; the timeline of the token at `position` goes to the file `out`. UsageError for a position outside the context."""
    if candidate.program is not None:
        context = candidate.program.program.machine.context
        if not 0 <= position < context:
            raise UsageError(f"position: must lie in 0..{context - 1} for this model, but got {position}")
    verdict = session.evaluate(candidate)
    if not verdict.correct:
        return untraced(verdict.to_json(), position)
    assert candidate.program is not None
    program = candidate.program.program
    start, steps = launch(position, program.machine.context)
    recording = recorded(session, candidate, start, steps)
    spans = timeline(recording.events, program.machine.consumer_warps, position - start)
    write_chrome_trace(out, spans, program)
    return {"verdict": verdict.to_json(), "position": position, "file": str(out), **summary(spans, program, recording.lost)}


def untraced(verdict: dict[str, Any], position: int) -> dict[str, Any]:
    """What is said of a program that was refused or found wrong: nothing but that."""
    return {"verdict": verdict, "position": position, "file": None, **nothing()}


def launch(position: int, context: int) -> tuple[int, int]:
    """First position and tokens of the traced launch: the token at `position` between two others, where there are such."""
    start = max(0, position - 1)
    return start, min(position + 2, context) - start


def recorded(session: Session, candidate: Candidate, start: int, steps: int) -> Recording:
    """What a traced launch wrote down. EnvironmentProblem if it chose other tokens than the build that was judged."""
    assert candidate.program is not None
    _, machine = session.load(candidate)
    assert isinstance(machine, UnprovenCudaVM)
    session.progress("building the traced kernel")
    arch = session.place.target.arch
    binary = compile_kernel(traced_source(candidate.program.program, ROOM), arch)
    traced = CudaVM(candidate.program, session.model.weights, arch=arch, weights=machine.weights, binary=binary)
    try:
        session.progress(f"tracing {steps} tokens from position {start}")
        recording = record(traced, ROOM, start, steps)
        expected = machine.decode([1], start, steps=steps).tokens
    finally:
        traced.close()
        machine.close()
    if recording.tokens != expected:
        raise EnvironmentProblem(f"trace: the traced build must choose the tokens {expected}, but chose {recording.tokens}")
    return recording


def write_chrome_trace(path: Path, spans: Sequence[Span], program: Program) -> None:
    """The timeline as a file that Perfetto and chrome://tracing open; one event a line. OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ns", "traceEvents": [\n')
        file.write(",\n".join(json.dumps(event, separators=(",", ":")) for event in chrome_events(spans, program)))
        file.write("\n]}\n")


def nothing() -> dict[str, Any]:
    return {"traced_us": None, "lost_events": 0, "by_actor": [], "by_task": []}


def summary(spans: Sequence[Span], program: Program, lost: int) -> dict[str, Any]:
    """How long the token took on the SM that was longest at it, and where that time went."""
    if not spans:
        return nothing()
    traced = max(_periods(spans).values())
    return {"traced_us": traced, "lost_events": lost, "by_actor": by_actor(spans), "by_task": by_task(spans, program)}


def _periods(spans: Sequence[Span]) -> dict[tuple[int, str, int], float]:
    """For each consumer and storer, us from its first task of the token to the end of its last.

    Not from the first of all to the last of all: an SM whose tasks are early ones begins to wait for the next token while others are
    still at this one. The feeder runs ahead, into the token before, and the watcher with it.
    """
    extents: dict[tuple[int, str, int], tuple[float, float]] = {}
    for span in (span for span in spans if span.role in ("consumer", "storer")):
        begin, end = extents.get((span.sm, span.role, span.warp), (span.begin_us, span.end_us))
        extents[span.sm, span.role, span.warp] = min(begin, span.begin_us), max(end, span.end_us)
    return {actor: end - begin for actor, (begin, end) in extents.items()}
