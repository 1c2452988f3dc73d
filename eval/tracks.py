"""What a baseline is checked against before it is timed: the source model in fp32, and its own error in the run's dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amk.eval.oracle import relative_error
from amk.eval.ties import tie_gap
from amk.eval.tolerance import FP32_ERROR
from amk.models.source import SourceRun
from amk.models.static_decoder import StaticDecoder

if TYPE_CHECKING:
    import torch

CHECK_STEPS = 8
# A baseline may round elsewhere than the source model does in its dtype, but not to more than this many times its error.
ERROR_LIMIT = 2.0
Step = Callable[[], "torch.Tensor"]  # one token of a decoder: its logits [vocab]


@dataclass(frozen=True, eq=False)
class Track:
    """Tokens from `start` on, and what the source model says: fp32 logits [steps, vocab] after each.

    `expected` is the relative error (root mean square) of the same model in the run's dtype; `kv(layer)` are its KV rows before `start`.
    """

    start: int
    tokens: tuple[int, ...]
    logits: torch.Tensor
    expected: float
    kv: Callable[[int], tuple[torch.Tensor, torch.Tensor]]


def make_tracks(exact: Any, native: Any, spans: Sequence[tuple[int, int]], seed: int = 0) -> dict[int, Track]:
    """A track for each (start, steps): at most CHECK_STEPS of one random sequence, which both models run through once.

    `exact` and `native` are the source model in fp32 and in the run's dtype. `exact` is not needed afterwards.
    """
    checked = {start: range(start, start + min(steps, CHECK_STEPS)) for start, steps in spans}
    wanted = sorted({position for positions in checked.values() for position in positions})
    rng = np.random.default_rng(seed)
    tokens = [int(t) for t in rng.integers(0, exact.config.vocab_size, wanted[-1] + 1)]
    logits = SourceRun(exact).feed(tokens, wanted)
    own = SourceRun(native)
    moved = own.feed(tokens, wanted)
    errors = [relative_error(m, r) for m, r in zip(moved, logits, strict=True)]
    own.close()

    def track(start: int, positions: range) -> Track:
        rows = slice(wanted.index(positions[0]), wanted.index(positions[-1]) + 1)
        expected = max(FP32_ERROR, _rms(errors[rows]))
        return Track(start, tuple(tokens[p] for p in positions), logits[rows], expected, lambda layer: own.kv(layer, start))

    return {start: track(start, positions) for start, positions in checked.items()}


@dataclass(frozen=True)
class Agreement:
    """How far a baseline's logits are from the source model's, how far that model's own are in the same dtype, and what failed."""

    rel_err: float
    expected: float
    failures: tuple[str, ...]


def agreement(decoder: StaticDecoder, step: Step, track: Track) -> Agreement:
    """Runs a baseline along the track, and then on tokens of its own choice; `step` runs the decoder once, by whatever means."""
    for layer in range(decoder.spec.layers):
        decoder.seed(layer, *track.kv(layer))
    forced = [_forced(decoder, step, track.start + i, token) for i, token in enumerate(track.tokens)]
    error = _rms([relative_error(logits, reference) for (logits, _), reference in zip(forced, track.logits, strict=True)])
    limit = ERROR_LIMIT * track.expected
    failures = []
    if not error < limit:
        own = f"{ERROR_LIMIT:g} times the source model's own error in this dtype, {track.expected:.3g}"
        failures.append(f"the error of its logits must stay below {own}, but is {error:.3g}")
    failures += _token_failures(forced, track, limit)
    failures += _feeding_failures(decoder, step, track, limit)
    return Agreement(error, track.expected, tuple(failures))


def _forced(decoder: StaticDecoder, step: Step, position: int, token: int | None) -> tuple[torch.Tensor, int]:
    """Logits as fp32 on the CPU and the choice of one step."""
    decoder.begin(position, token)
    return _run(decoder, step)


def _run(decoder: StaticDecoder, step: Step) -> tuple[torch.Tensor, int]:
    logits = step().float().cpu()
    return logits, int(decoder.token)


def _token_failures(forced: Sequence[tuple[torch.Tensor, int]], track: Track, limit: float) -> list[str]:
    for i, ((logits, token), reference) in enumerate(zip(forced, track.logits, strict=True)):
        where = f"position {track.start + i}"
        if not float(logits[token]) == float(logits.max()):
            return [f"its token must have the largest of its own logits, but has not at {where}"]
        if not float(reference.max() - reference[token]) < tie_gap(reference, limit):
            return [f"its greedy tokens must be the source model's but for near ties, but differ at {where}"]
    return []


def _feeding_failures(decoder: StaticDecoder, step: Step, track: Track, limit: float) -> list[str]:
    """Steps that feed themselves must do what the same tokens do when they are fed one by one."""
    decoder.begin(track.start, track.tokens[0])
    fed = [_run(decoder, step) for _ in track.tokens]
    told = [track.tokens[0], *(token for _, token in fed[:-1])]
    again = [_forced(decoder, step, track.start + i, token) for i, token in enumerate(told)]
    moved = max(relative_error(a, b) for (a, _), (b, _) in zip(fed, again, strict=True))
    if moved < limit:
        return []
    return [f"steps that take their own tokens must equal steps that are given them, but their logits differ by {moved:.3g}"]


def _rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))
