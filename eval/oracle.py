"""The oracle: judges a machine's logits and tokens against the source model's, at early and late positions.

The reference is the source model in fp32, run once over one sequence: a random prompt, its own greedy continuation, then random
tokens up to the last late position. The machine decodes the prompt and goes on by its own choice; where it chooses another token
than the source, it is put back on the source's track (teacher forcing) and judged on. Late positions begin from KV rows
of the source's own cache, so position 2000 costs no 2000 steps. Beside logits and tokens it weighs the
KV rows that the machine wrote (kv_rows.py). The statistics and their limits: docs/tolerances.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from amk.eval.kv_rows import ReadRows, Rows, expected_errors, relative_errors, typical_ratios
from amk.eval.ties import change_chance, most_changes, tie_gap
from amk.eval.tolerance import FP32_ERROR, LATE, MAX_EXPECTED, ROWS, TYPICAL, WORST
from amk.isa.attention import TWO_PART_GROUP, Attention
from amk.isa.matmul import MatMul
from amk.isa.matvec import X_NORM
from amk.isa.rmsnorm import RmsNorm
from amk.isa.seat_norm import SeatNorm
from amk.isa.stretch_attention import StretchAttention
from amk.models.rounded import RoundingPoints, rounded
from amk.models.source import SourceRun
from amk.schedule.model import DType, ModelSpec
from amk.schedule.program import Program
from amk.vm.interface import DecodeMachine

if TYPE_CHECKING:
    import torch

LATE_POSITIONS = (127, 1023, 8000)
# The prompt of models that have a tokenizer.
PROMPT_TEXT = "A megakernel is a single GPU kernel that runs the whole forward pass of a model. It is fast because"
ROWS_OF = "error of the "  # begins the name of a share that is about KV rows
MAX_TEXT = 24  # tokens of a text that are a prompt; the rest of the early steps are the source's own choice


@dataclass(frozen=True)
class Plan:
    """What is judged: `steps` tokens from position 0, the first `prompt` of them forced, and `late_steps` at each late position.

    The prompt is `text` (token ids, as many as `prompt`) where there is one, else random tokens. A trained model is better judged on
    text: on random tokens rounding moves its logits further, and small errors hide.
    """

    prompt: int
    steps: int
    late: tuple[int, ...]
    late_steps: int
    seed: int = 0
    text: tuple[int, ...] = ()


def default_plan(spec: ModelSpec, context: int, device: str, text: Sequence[int] = ()) -> Plan:
    """Positions that fit `context`, one past each sliding window; fewer steps for a deep model on the CPU, where each takes long."""
    slow = device == "cpu" and spec.layers > 4
    late_steps = 8
    furthest = 2048 if device == "cpu" else 16384  # the source model's own prefill up to there is what late positions cost
    wanted = {*LATE_POSITIONS, *(w + 3 for w in spec.windows if w is not None)}
    steps = min(context, 32 if slow else 48)
    late = sorted(p for p in wanted if steps <= p <= min(furthest, context - late_steps))
    prompt = min(len(text[:MAX_TEXT]) or 8, steps)
    return Plan(prompt=prompt, steps=steps, late=tuple(late), late_steps=late_steps, text=tuple(text[:prompt]))


def rounding_points(program: Program) -> RoundingPoints:
    """Where the program rounds activations."""
    tasks = [task for queue in program.queues for task in queue]
    return RoundingPoints(
        dtype=_dtype(program.machine.dtype),
        norms=any(isinstance(task, RmsNorm | SeatNorm) for task in tasks),
        gained=any(isinstance(task, MatMul) and task.flags & X_NORM for task in tasks),
        residuals=any(isinstance(task, MatMul) for task in tasks),
        attention_operands=any(
            isinstance(task, StretchAttention) or isinstance(task, Attention) and task.nq > TWO_PART_GROUP for task in tasks
        ),
    )


def _dtype(name: str) -> DType:
    known: dict[str, DType] = {"bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
    return known[name]


@dataclass(frozen=True, eq=False)
class Segment:
    """Steps `start`, start + 1, ...: input `tokens`, the source's `logits` [steps, vocab] after each, and the relative error that
    rounding alone is `expected` to cause at each. KV rows before `start` are the source's; `rows_expected` [layers, 2, steps] is the
    relative error that rounding is expected to cause in the K and V rows which the steps write.
    """

    start: int
    tokens: tuple[int, ...]
    logits: torch.Tensor
    expected: tuple[float, ...]
    rows_expected: torch.Tensor

    @property
    def rows(self) -> Rows:
        return Rows(self.start, self.start + len(self.tokens))

    def step(self, i: int, token: int, logits: torch.Tensor) -> Step:
        """Judges what a machine gave after input token `i`."""
        return compare(self.start + i, token, logits, self.logits[i], self.expected[i], rms(self.expected))


@dataclass(frozen=True, eq=False)
class Reference:
    """The source model's side of a judgement: it depends on model, plan and rounding points alone, so it serves many programs."""

    plan: Plan
    dtype: DType
    layers: int
    early: Segment
    late: tuple[Segment, ...]
    kv: ReadRows


def make_reference(spec: ModelSpec, eager: Any, plan: Plan, points: RoundingPoints) -> Reference:
    """Runs `eager` (the source model in fp32) over the plan's sequence, and over its judged tokens once more with rounding."""
    import torch

    rng = np.random.default_rng(plan.seed)
    run = SourceRun(eager)
    early = _early(run, _prompt(spec, plan, rng), plan)
    end = max((p + plan.late_steps for p in plan.late), default=plan.steps)
    rest = [int(t) for t in rng.integers(0, spec.vocab, end - plan.steps)]
    judged = [p + i for p in plan.late for i in range(plan.late_steps)]
    late = run.feed(rest, [p - plan.steps for p in judged])
    starts = [(0, plan.steps), *((p, plan.late_steps) for p in plan.late)]
    parts = torch.split(torch.cat([early, late]), [steps for _, steps in starts])
    with rounded(eager, points):
        segments = [_segment(run, start, logits, spec.layers, points.dtype) for (start, _), logits in zip(starts, parts, strict=True)]
    run.close()
    return Reference(plan, points.dtype, spec.layers, segments[0], tuple(segments[1:]), run.kv)


def _prompt(spec: ModelSpec, plan: Plan, rng: np.random.Generator) -> list[int]:
    if plan.text:
        return list(plan.text)
    tokens = [int(t) for t in rng.integers(0, spec.vocab, plan.prompt)]
    return tokens if spec.bos_token is None else [spec.bos_token, *tokens[1:]]


def _early(run: SourceRun, prompt: list[int], plan: Plan) -> torch.Tensor:
    """Logits after each of the first tokens: the prompt and its greedy continuation."""
    import torch

    parts = [run.feed(prompt, range(len(prompt)))]
    for _ in range(plan.steps - len(prompt)):
        parts.append(run.feed([int(parts[-1][-1].argmax())], [0]))
    return torch.cat(parts)


def _segment(run: SourceRun, start: int, logits: torch.Tensor, layers: int, dtype: DType) -> Segment:
    """A segment of the run's tokens; inside `rounded`, where the source model shows what rounding does to its logits and KV rows."""
    tokens = run.tokens[start : start + len(logits)]
    fork = run.fork(start)
    moved = fork.feed(tokens, range(len(tokens)))
    expected = [max(FP32_ERROR, relative_error(m, r)) for m, r in zip(moved, logits, strict=True)]
    rows = expected_errors(fork.kv, run.kv, layers, Rows(start, start + len(tokens)), dtype)
    return Segment(start, tuple(tokens), logits, tuple(expected), rows)


def relative_error(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """|m - r| / |r - mean r| in fp64; infinite where a logit is not finite.

    The mean is left out of the denominator, not of the error: no choice depends on it, and a large one would hide errors.
    """
    import torch

    if not bool(torch.isfinite(logits).all()):
        return math.inf
    wanted = reference.double()
    return float((logits.double() - wanted).norm() / (wanted - wanted.mean()).norm())


@dataclass(frozen=True)
class Step:
    """One judged step: errors of its logits, the error that rounding was expected to cause, and what token it chose.

    `agrees`: the source's token, or one of equal logit. `near_tie`: one nearly tied with it. `consistent`: the token is the first with the
    largest of the machine's own logits. `change_chance`: how likely rounding was to change the token, whether it did or not.
    """

    position: int
    rel_err: float
    expected: float
    max_abs_err: float
    agrees: bool
    near_tie: bool
    consistent: bool
    change_chance: float = 0.0


def compare(position: int, token: int, logits: torch.Tensor, reference: torch.Tensor, expected: float, usual: float = 0.0) -> Step:
    """Judges the fp32 logits [vocab] and the chosen token of one step; a logit that is not finite is an infinite error.

    `usual`: the expected error of the steps around. One run with rounding may move a position by less than rounding usually does, so tokens
    are nearly tied by the larger of the two.
    """
    error = relative_error(logits, reference)
    best = int(reference.argmax())
    gap = float(reference[best] - reference[token]) if 0 <= token < len(reference) else math.inf
    return Step(
        position=position,
        rel_err=error,
        expected=expected,
        max_abs_err=float((logits - reference).abs().max()) if math.isfinite(error) else math.inf,
        agrees=gap == 0,
        near_tie=gap < tie_gap(reference, expected, usual),
        consistent=math.isfinite(error) and token == int(logits.argmax()),
        change_chance=change_chance(reference, expected),
    )


def judge_steps(machine: DecodeMachine, reference: Reference) -> tuple[list[Step], list[Step], dict[str, float]]:
    """Runs the machine over the reference's segments: the early steps, the late ones, and the ratios of the early steps' KV rows.

    LaunchFailed if a launch does not finish.
    """
    early = _decode_along(machine, reference.early, reference.plan.prompt)
    errors = relative_errors(machine.read_kv, reference.kv, reference.layers, reference.early.rows)
    rows = typical_ratios(errors, reference.early.rows_expected)
    late: list[Step] = []
    for segment in reference.late:
        for layer in range(reference.layers):
            machine.seed_kv(layer, *reference.kv(layer, segment.start))
        late += _decode_along(machine, segment, len(segment.tokens))
    return early, late, rows


def _decode_along(machine: DecodeMachine, segment: Segment, forced: int) -> list[Step]:
    """Steps of a segment: the first `forced` tokens are the segment's, then the machine's own while they agree with the source's."""
    steps: list[Step] = []
    total = len(segment.tokens)
    while len(steps) < total:
        at = len(steps)
        out = machine.decode(segment.tokens[at : max(forced, at + 1)], segment.start + at, steps=total - at, logits=True)
        _require_shape(out.logits, len(out.tokens), total - at, segment.logits.shape[1])
        assert out.logits is not None
        for token, logits in zip(out.tokens, out.logits, strict=True):
            i = len(steps)
            steps.append(segment.step(i, token, logits))
            if i + 1 >= forced and i + 1 < total and token != segment.tokens[i + 1]:
                # After a near tie it goes on alone from the source's token; after a wrong one it stays on the source's track.
                forced = i + 2 if steps[-1].near_tie else total
                break
    return steps


def _require_shape(logits: Any, tokens: int, steps: int, vocab: int) -> None:
    if logits is None or tuple(logits.shape) != (steps, vocab) or tokens != steps:
        raise ValueError(f"decode must give {steps} tokens with logits [{steps}, {vocab}]")


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


def judge(machine: DecodeMachine, reference: Reference) -> Finding:
    """The finding on a machine loaded with the reference's model. LaunchFailed if a launch does not finish."""
    early, late, rows = judge_steps(machine, reference)
    return find(early, late, rows, reference.dtype)


def find(early: Sequence[Step], late: Sequence[Step], rows: Mapping[str, float], dtype: DType) -> Finding:
    """Weighs judged steps and the ratios of KV rows against the limits."""
    steps = [*early, *late]
    shares = {f"logit error over the first {len(early)} positions": _typical(early) / TYPICAL}
    shares |= {f"{ROWS_OF}{name}": ratio / ROWS for name, ratio in rows.items()}
    if late:
        shares[f"logit error over {len(late)} late positions"] = _typical(late) / LATE
    position, worst = max((pair for group in (early, late) for pair in _single(group)), key=lambda pair: pair[1])
    shares[f"logit error at position {position}"] = worst / WORST
    failures = _over_limits(shares)
    excused = sum(s.near_tie and not s.agrees for s in steps)
    failures += [*_token_failures(steps, excused), *_unjudgeable(steps, dtype)]
    return Finding(
        correct=not failures,
        rel_err=rms([s.rel_err for s in steps]),
        max_abs_err=max(s.max_abs_err for s in steps),
        top1_agreement=sum(s.agrees for s in steps) / len(steps),
        tolerance_used=max(shares.values()),
        near_ties=excused,
        positions=tuple(s.position for s in steps),
        failures=tuple(failures),
    )


def _over_limits(shares: Mapping[str, float]) -> list[str]:
    """One sentence for each limit that is passed; of the rows of many layers, the first says where it began."""
    over = [(name, share) for name, share in shares.items() if not share < 1]
    rows = [name for name, _ in over if name.startswith(ROWS_OF)]
    more = f", and {len(rows) - 1} more from there on" if rows[1:] else ""
    return [
        f"{name}: must stay below its limit, but is {share:.3g} of it" + (more if name in rows else "")
        for name, share in over
        if name not in rows[1:]
    ]


def rms(values: Sequence[float]) -> float:
    return math.sqrt(sum(v * v for v in values) / len(values))


def _typical(steps: Sequence[Step]) -> float:
    """Geometric mean over positions of error energy over expected energy: a few wild positions of a real model do not decide it.

    An error below FP32_ERROR counts as that.
    """
    ratios = [_over(max(s.rel_err, FP32_ERROR), s.expected) for s in steps]
    return math.inf if math.inf in ratios else math.exp(2 * sum(map(math.log, ratios)) / len(ratios))


def _single(steps: Sequence[Step]) -> list[tuple[int, float]]:
    """Position and error energy over the larger of its own and the group's mean expected energy."""
    mean = rms([s.expected for s in steps]) if steps else 0.0
    return [(s.position, _over(s.rel_err, max(s.expected, mean)) ** 2) for s in steps]


def _over(error: float, expected: float) -> float:
    """Their ratio; infinite where rounding alone leaves the range of numbers, so that nothing can be said of the error."""
    return error / expected if math.isfinite(expected) else math.inf


def _token_failures(steps: Sequence[Step], excused: int) -> list[str]:
    failures = []
    wrong = [s.position for s in steps if not s.agrees and not s.near_tie]
    if wrong:
        where = f"position {wrong[0]}" + (f" and {len(wrong) - 1} more" if wrong[1:] else "")
        failures.append(f"greedy tokens must be the source model's but for near ties, but differ at {where}")
    most = most_changes(s.change_chance for s in steps)
    if excused > most:
        likely = f"at most {most} of {len(steps)}, which is what rounding explains"
        failures.append(f"tokens that differ at near ties must be {likely}, but are {excused}")
    inconsistent = [s.position for s in steps if not s.consistent]
    if inconsistent:
        where = f"position {inconsistent[0]}"
        failures.append(f"the token chosen must be the first with the largest of the machine's own logits, but is not at {where}")
    return failures


def _unjudgeable(steps: Sequence[Step], dtype: DType) -> list[str]:
    expected = rms([s.expected for s in steps])
    if expected <= MAX_EXPECTED[dtype]:
        return []
    limit = f"at most {MAX_EXPECTED[dtype]:.3g}, but moves them by {expected:.3g}"
    return [f"rounding to {dtype} alone must move the source model's logits by {limit}"]
