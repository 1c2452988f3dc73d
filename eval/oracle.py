"""The oracle: judges a machine's logits and tokens against the source model's, at early and late positions.

The reference is the source model in fp32, run once over one sequence: a random prompt, its own greedy continuation, then random
tokens up to the last late position. The machine decodes the prompt and goes on by its own choice; where it chooses another token
than the source, it is put back on the source's track (teacher forcing) and judged on. Late positions begin from KV rows
of the source's own cache, so position 2000 costs no 2000 steps. Statistics and tolerances: docs/tolerances.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amk.eval.tolerance import NEAR_TIE_SHARE, Tolerance
from amk.models.source import SourceRun
from amk.schedule.model import ModelSpec
from amk.vm.interface import DecodeMachine

if TYPE_CHECKING:
    import torch

LATE_POSITIONS = (127, 1023, 8000)


@dataclass(frozen=True)
class Plan:
    """What is judged: `steps` tokens from position 0, the first `prompt` of them forced, and `late_steps` at each late position."""

    prompt: int
    steps: int
    late: tuple[int, ...]
    late_steps: int
    seed: int = 0


def default_plan(spec: ModelSpec, context: int, device: str) -> Plan:
    """Positions that fit `context`, past the longest sliding window where there is one; fewer steps where each is slow.

    The reference machine needs about a second for a token of a deep model, the card well under a millisecond.
    """
    slow = device == "cpu" and spec.layers > 4
    late_steps = 2 if slow else 4
    windows = {w + 3 for w in spec.windows if w is not None}
    wanted = {*LATE_POSITIONS[: 2 if device == "cpu" else 3], *(windows if device != "cpu" or max(windows, default=0) < 4096 else ())}
    last = context - late_steps
    late = sorted(p for p in wanted if p <= last)
    steps = min(context, 17 if slow else 48)
    return Plan(prompt=min(8, steps), steps=steps, late=tuple(p for p in late if p >= steps), late_steps=late_steps)


@dataclass(frozen=True, eq=False)
class Segment:
    """Steps `start`, start + 1, ...: input `tokens`, and the source's `logits` [steps, vocab] after each. KV rows before it are the source's."""

    start: int
    tokens: tuple[int, ...]
    logits: torch.Tensor


@dataclass(frozen=True, eq=False)
class Reference:
    """The source model's side of a judgement; it depends on model and plan alone, so one serves every program of a model."""

    plan: Plan
    layers: int
    early: Segment
    late: tuple[Segment, ...]
    kv: Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


def make_reference(spec: ModelSpec, eager: Any, plan: Plan) -> Reference:
    """Runs `eager` (the source model in fp32) once over the plan's sequence."""
    rng = np.random.default_rng(plan.seed)
    run = SourceRun(eager)
    early = _early(run, _prompt(spec, plan, rng), plan)
    end = max((p + plan.late_steps for p in plan.late), default=plan.steps)
    rest = [int(t) for t in rng.integers(0, spec.vocab, end - plan.steps)]
    judged = [p + i for p in plan.late for i in range(plan.late_steps)]
    logits = run.feed(rest, [p - plan.steps for p in judged])
    n = plan.late_steps
    late = [Segment(p, tuple(run.tokens[p : p + n]), logits[i * n : (i + 1) * n]) for i, p in enumerate(plan.late)]
    return Reference(plan, spec.layers, early, tuple(late), run.kv)


def _prompt(spec: ModelSpec, plan: Plan, rng: np.random.Generator) -> list[int]:
    tokens = [int(t) for t in rng.integers(0, spec.vocab, plan.prompt)]
    return tokens if spec.bos_token is None else [spec.bos_token, *tokens[1:]]


def _early(run: SourceRun, prompt: list[int], plan: Plan) -> Segment:
    import torch

    parts = [run.feed(prompt, range(len(prompt)))]
    for _ in range(plan.steps - len(prompt)):
        parts.append(run.feed([int(parts[-1][-1].argmax())], [0]))
    return Segment(0, tuple(run.tokens), torch.cat(parts))


@dataclass(frozen=True)
class Step:
    """One judged step: relative and absolute error of its logits, and whether it chose the source's token, or one nearly tied with it.

    `consistent`: the token that the machine chose is the lowest with the largest of its own logits.
    """

    position: int
    rel_err: float
    max_abs_err: float
    agrees: bool
    near_tie: bool
    consistent: bool


def compare(position: int, token: int, logits: torch.Tensor, reference: torch.Tensor, tie: float) -> Step:
    """Judges the fp32 logits [vocab] and the chosen token of one step; anything that is not finite is an infinite error."""
    import torch

    spread = reference - reference.mean()
    error = logits.double() - reference.double()
    finite = bool(torch.isfinite(error).all())
    best = int(reference.argmax())
    known = 0 <= token < len(reference)
    gap = float(reference[best] - reference[token]) if known else float("inf")
    return Step(
        position=position,
        rel_err=float(error.norm() / spread.double().norm()) if finite else float("inf"),
        max_abs_err=float(error.abs().max()) if finite else float("inf"),
        agrees=token == best or gap == 0,
        near_tie=gap < tie * float(spread.std()),
        consistent=finite and token == int(logits.argmax()),
    )


def judge_steps(machine: DecodeMachine, reference: Reference, limits: Tolerance) -> tuple[list[Step], list[Step]]:
    """Runs the machine over the reference's segments: the early steps and the late ones. LaunchFailed if a launch does not finish."""
    early = _decode_along(machine, reference.early, reference.plan.prompt, limits.tie)
    late: list[Step] = []
    for segment in reference.late:
        for layer in range(reference.layers):
            machine.seed_kv(layer, *reference.kv(layer, segment.start))
        late += _decode_along(machine, segment, len(segment.tokens), limits.tie)
    return early, late


def _decode_along(machine: DecodeMachine, segment: Segment, forced: int, tie: float) -> list[Step]:
    """Steps of a segment: `forced` tokens are the segment's, then the machine's own while they agree with the source's."""
    steps: list[Step] = []
    total = len(segment.tokens)
    while len(steps) < total:
        at = len(steps)
        out = machine.decode(segment.tokens[at : max(forced, at + 1)], segment.start + at, steps=total - at, logits=True)
        if out.logits is None or tuple(out.logits.shape) != (total - at, segment.logits.shape[1]) or len(out.tokens) != total - at:
            raise ValueError(f"decode must give {total - at} tokens with logits [{total - at}, {segment.logits.shape[1]}]")
        for token, logits in zip(out.tokens, out.logits, strict=True):
            i = len(steps)
            steps.append(compare(segment.start + i, token, logits, segment.logits[i], tie))
            if i + 1 >= forced and i + 1 < total and token != segment.tokens[i + 1]:
                # A wrong token ends free running for good; after a near tie it goes on from the source's token.
                forced = i + 2 if steps[-1].near_tie else total
                break
    return steps


@dataclass(frozen=True)
class Finding:
    """The oracle's result; `tolerance_used` is the largest share of any limit that was used, and 1 or more fails."""

    correct: bool
    rel_err: float
    max_abs_err: float
    top1_agreement: float
    tolerance_used: float
    near_ties: int
    positions: tuple[int, ...]
    failures: tuple[str, ...]


def judge(machine: DecodeMachine, reference: Reference, limits: Tolerance) -> Finding:
    """The judgement of a machine loaded with the reference's model. LaunchFailed if a launch does not finish."""
    early, late = judge_steps(machine, reference, limits)
    return find(early, late, limits)


def find(early: Sequence[Step], late: Sequence[Step], limits: Tolerance) -> Finding:
    """Weighs judged steps against the limits."""
    steps = [*early, *late]
    worst = max(steps, key=lambda s: s.rel_err)
    excused = sum(s.near_tie and not s.agrees for s in steps)
    used = {
        f"mean relative logit error over the first {len(early)} positions": _mean(early) / limits.mean,
        f"mean relative logit error over {len(late)} late positions": _mean(late) / limits.mean,
        f"relative logit error at position {worst.position}": worst.rel_err / limits.worst,
    }
    failures = [f"{name}: must stay below its tolerance, but is {share:.3g} of it" for name, share in used.items() if not share < 1]
    failures += _token_failures(steps, excused)
    return Finding(
        correct=not failures,
        rel_err=_mean(steps),
        max_abs_err=max(s.max_abs_err for s in steps),
        top1_agreement=sum(s.agrees for s in steps) / len(steps),
        tolerance_used=max(used.values()),
        near_ties=excused,
        positions=tuple(s.position for s in steps),
        failures=tuple(failures),
    )


def _mean(steps: Sequence[Step]) -> float:
    return sum(s.rel_err for s in steps) / len(steps) if steps else 0.0


def _token_failures(steps: Sequence[Step], excused: int) -> list[str]:
    failures = []
    wrong = [s.position for s in steps if not s.agrees and not s.near_tie]
    if wrong:
        failures.append(f"greedy token differs from the source model's at position {wrong[0]}, where it has no near tie ({len(wrong)} in all)")
    # Of a short run, one near tie is always allowed.
    if excused > max(1, NEAR_TIE_SHARE * len(steps)):
        failures.append(f"tokens that differ at near ties: must be at most {NEAR_TIE_SHARE:.0%}, but are {excused} of {len(steps)}")
    inconsistent = [s.position for s in steps if not s.consistent]
    if inconsistent:
        failures.append(f"the token chosen is not the largest of the machine's own logits at position {inconsistent[0]}")
    return failures
