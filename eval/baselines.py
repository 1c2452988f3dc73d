"""The baselines of `bench`: the source model in transformers at its quickest, as a CUDA graph and through torch.compile.

Each is built for one launch (first position and tokens) with a KV cache just long enough for it, once with each attention of
transformers; those that agree with the source model are timed, and the quickest stands for the baseline. A baseline that does not build
or does not agree is a result too, with its reason.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from amk.eval.tracks import Agreement, Step, Track, agreement, make_tracks
from amk.models.model import Model
from amk.models.static_decoder import Attention, StaticDecoder
from amk.schedule.model import ModelSpec

ATTENTIONS: tuple[Attention, ...] = ("sdpa", "eager")
ROWS_MULTIPLE = 64  # the cache's length: what fused attention kernels need of a mask's
WARM_UP, TRIES = 3, 5
REASON_CHARACTERS = 300

Builder: TypeAlias = Callable[[StaticDecoder, int], tuple[Step, str]]
Span: TypeAlias = tuple[int, int]  # first position and tokens of a launch


@dataclass(frozen=True, eq=False)
class Rival:
    """A baseline that agrees with the source model, ready to be timed; `form` says in words what it is."""

    name: str
    form: str
    decoder: StaticDecoder
    step: Step
    agreement: Agreement

    def sample_us(self, span: Span) -> float:
        """Microseconds a token of one run of the span's steps, between CUDA events; the host waits at its end only."""
        import torch

        start, steps = span
        self.decoder.begin(start, 1)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        for _ in range(steps):
            self.step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / steps


@dataclass(frozen=True)
class Missing:
    """A baseline without a time: "failed" to build or run, or "refused" because it is wrong."""

    name: str
    status: Literal["failed", "refused"]
    reason: str


Entrant: TypeAlias = Rival | Missing


def graphed(decoder: StaticDecoder, start: int) -> tuple[Step, str]:
    """One decode step as a CUDA graph."""
    return captured(decoder, decoder.step, start), "transformers' decode step as a CUDA graph"


def compiled(decoder: StaticDecoder, start: int) -> tuple[Step, str]:
    """One decode step through torch.compile, without graph breaks where it can be.

    max-autotune's kernels, but its CUDA graph is made here: a replay then costs no guards and no copies on the host.
    """
    import torch
    from torch._dynamo.exc import Unsupported

    def build(fullgraph: bool) -> Step:
        step = torch.compile(decoder.step, mode="max-autotune-no-cudagraphs", fullgraph=fullgraph, dynamic=False)
        return captured(decoder, step, start)

    try:
        return build(True), "torch.compile max-autotune without graph breaks, as a CUDA graph"
    except Unsupported:
        return build(False), "torch.compile max-autotune with graph breaks, as a CUDA graph"


def captured(decoder: StaticDecoder, step: Step, start: int) -> Step:
    """The step as a CUDA graph; each replay overwrites the logits that the last one gave."""
    import torch

    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            decoder.begin(start, 1)
            step()
        decoder.begin(start, 1)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # a library's other threads may use the card meanwhile
        logits = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return logits

    return replay


BUILDERS: Mapping[str, Builder] = {"cuda-graph": graphed, "torch-compile": compiled}


class Contest:
    """The baselines of one model over several launches (`names`: some of BUILDERS); they share one copy of its weights, in its own
    dtype, on the card.
    """

    def __init__(
        self, model: Model, spans: Sequence[Span], progress: Callable[[str], None], names: Sequence[str] = tuple(BUILDERS)
    ) -> None:
        self._model, self._progress, self._names = model, progress, names
        self._native: Any = None
        self._tracks: dict[int, Track] = {}
        self._lost: str | None = None
        progress("loading the source model for the baselines")
        try:
            self._native = model.eager(model.spec.dtype, "cuda")
            self._tracks = make_tracks(model.eager("fp32", "cuda"), self._native, spans)
        except RuntimeError as problem:  # out of memory: ours is timed all the same
            self._native, self._lost = None, reason_of(problem)
        free()

    def enter(self, span: Span) -> list[Entrant]:
        """The baselines of one launch, each checked and in its quickest form; those of the launch before must no longer be run."""
        forget_compiled()
        return [self._entrant(name, BUILDERS[name], span) for name in self._names]

    def _entrant(self, name: str, build: Builder, span: Span) -> Entrant:
        if self._lost is not None:
            return Missing(name, "failed", self._lost)
        found = []
        for attention in ATTENTIONS:
            self._progress(f"building baseline {name} with {attention} attention for position {span[0]} on")
            found.append(attempt(name, build, self._model.spec, self._native, attention, span, self._tracks[span[0]]))
        ready = [entrant for entrant in found if isinstance(entrant, Rival)]
        return quickest(ready, span) if ready else all_missing(name, [m for m in found if isinstance(m, Missing)])


def attempt(name: str, build: Builder, spec: ModelSpec, native: Any, attention: Attention, span: Span, track: Track) -> Entrant:
    """One way to run a baseline, built and checked; whatever goes wrong is its result."""
    rows = -(-sum(span) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    try:
        decoder = StaticDecoder(spec, native, rows, attention)
        step, form = build(decoder, span[0])
        return admitted(name, f"{form}, {attention} attention over a static cache of {rows} rows", decoder, step, track)
    except Exception as problem:  # another system's failure, of whatever type
        return Missing(name, "failed", f"{attention} attention: {reason_of(problem)}")


def admitted(name: str, form: str, decoder: StaticDecoder, step: Step, track: Track) -> Entrant:
    """The baseline if it agrees with the source model, else why it is refused."""
    found = agreement(decoder, step, track)
    return Missing(name, "refused", f"{form}: {'; '.join(found.failures)}") if found.failures else Rival(name, form, decoder, step, found)


def quickest(ready: Sequence[Rival], span: Span) -> Rival:
    """The one with the smallest median of a few samples."""
    if len(ready) == 1:
        return ready[0]
    return min(ready, key=lambda rival: float(np.median([rival.sample_us(span) for _ in range(TRIES)])))


def all_missing(name: str, attempts: Sequence[Missing]) -> Missing:
    """Several attempts without a result as one: refused if any of them ran and was wrong."""
    status: Literal["failed", "refused"] = "refused" if any(m.status == "refused" for m in attempts) else "failed"
    return Missing(name, status, "; ".join(m.reason for m in attempts))


def reason_of(problem: Exception) -> str:
    """The type and the first line of what went wrong, cut to a readable length."""
    lines = str(problem).strip().splitlines()
    text = f"{type(problem).__name__}: {lines[0]}" if lines else type(problem).__name__
    return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 3] + "..."


def forget_compiled() -> None:
    """Drops what torch.compile has built, so that each launch is compiled for its own sizes and none counts as a recompilation."""
    import torch

    torch._dynamo.reset()
    free()


def free() -> None:
    """Gives memory that nothing refers to any more back to the card."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()
