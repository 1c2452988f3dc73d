"""The oracle for a batch: every row against the source model, with rows at different positions in the same launch.

Each row decodes the reference's first tokens, by its own choice while it agrees with the source; then rows begin from the source's
KV rows at late positions, each at another. Each row is judged by itself, with the statistics and limits of a single stream
(eval/oracle.py): in one mean over all, a wrong row would hide behind the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from amk.eval.kv_rows import relative_errors, typical_ratios
from amk.eval.oracle import Finding, Reference, Segment, Step, find, judge, rms
from amk.vm.cuda import UnprovenCudaVM
from amk.vm.interface import BatchMachine, DecodedBatch
from amk.vm.reference import ReferenceVM

APART = 4  # rows of one late position begin up to this many tokens apart, or half of its steps: a row is judged at the rest


def judge_any(machine: UnprovenCudaVM | ReferenceVM, reference: Reference) -> Finding:
    """The finding on a machine of one sequence or of a batch. LaunchFailed if a launch does not finish."""
    return judge(machine, reference) if machine.batch == 1 else judge_batch(machine, reference)


def judge_batch(machine: BatchMachine, reference: Reference) -> Finding:
    """The finding on a machine of a batch loaded with the reference's model. LaunchFailed if a launch does not finish."""
    early = _early(machine, reference)
    written = [_row_ratios(machine, reference, row) for row in range(machine.batch)]
    turns = [_late(machine, reference, turn) for turn in range(len(reference.late))]
    late = [[step for turn in turns for step in turn[row]] for row in range(machine.batch)]
    return together([find(*of_row, reference.dtype) for of_row in zip(early, late, written, strict=True)])


def together(rows: Sequence[Finding]) -> Finding:
    """One finding on all rows: of their shares the largest, of their failures those of the first row that fails."""
    wrong = [row for row, finding in enumerate(rows) if not finding.correct]
    more = f" and {len(wrong) - 1} more" if wrong[1:] else ""
    return Finding(
        correct=not wrong,
        rel_err=rms([finding.rel_err for finding in rows]),
        max_abs_err=max(finding.max_abs_err for finding in rows),
        top1_agreement=sum(finding.top1_agreement for finding in rows) / len(rows),
        tolerance_used=max(finding.tolerance_used for finding in rows),
        near_ties=sum(finding.near_ties for finding in rows),
        positions=tuple(position for finding in rows for position in finding.positions),
        failures=tuple(f"row {row}{more}: {text}" for row in wrong[:1] for text in rows[row].failures),
    )


def _row_ratios(machine: BatchMachine, reference: Reference, row: int) -> dict[str, float]:
    """The ratios of the KV rows that one row of the batch wrote in the early steps."""
    errors = relative_errors(lambda layer, stop: machine.read_kv(layer, stop, row), reference.kv, reference.layers, reference.early.rows)
    return typical_ratios(errors, reference.early.rows_expected)


def _early(machine: BatchMachine, reference: Reference) -> list[list[Step]]:
    """Every row over the early segment: alone from the prompt as far as it agrees, and once more on the source's track for the rest."""
    segment, prompt = reference.early, reference.plan.prompt
    rows, start = range(machine.batch), [segment.start] * machine.batch
    free = machine.decode_batch([segment.tokens[:prompt]] * len(rows), start, steps=len(segment.tokens), logits=True)
    judged = [_judged(free, row, segment, 0, _agreed(free.tokens[row], segment.tokens, prompt)) for row in rows]
    if any(len(steps) < len(segment.tokens) for steps in judged):
        forced = machine.decode_batch([segment.tokens] * len(rows), start, logits=True)
        judged = [
            [*steps, *_judged(forced, row, segment, len(steps), len(segment.tokens))] for row, steps in zip(rows, judged, strict=True)
        ]
    return judged


def _agreed(chosen: Sequence[int], track: Sequence[int], prompt: int) -> int:
    """Steps whose inputs were the track's."""
    return next((i + 1 for i in range(prompt - 1, len(track) - 1) if chosen[i] != track[i + 1]), len(track))


def _late(machine: BatchMachine, reference: Reference, turn: int) -> list[list[Step]]:
    """Row r at late position r + turn (in turn), and those that come to the same one some tokens apart."""
    segments = reference.late
    apart = min(APART, max(1, reference.plan.late_steps // 2))
    places = [(segments[(row + turn) % len(segments)], row // len(segments) % apart) for row in range(machine.batch)]
    for row, (segment, skip) in enumerate(places):
        for layer in range(reference.layers):
            machine.seed_kv(layer, *reference.kv(layer, segment.start + skip), row)
    steps = reference.plan.late_steps - apart + 1
    tokens = [segment.tokens[skip : skip + steps] for segment, skip in places]
    decoded = machine.decode_batch(tokens, [segment.start + skip for segment, skip in places], logits=True)
    return [_judged(decoded, row, segment, skip, skip + steps, skip) for row, (segment, skip) in enumerate(places)]


def _judged(decoded: DecodedBatch, row: int, segment: Segment, first: int, stop: int, begin: int = 0) -> list[Step]:
    """Steps [first, stop) of a segment by one row of a launch that began with step `begin`."""
    assert decoded.logits is not None
    return [segment.step(i, decoded.tokens[row][i - begin], decoded.logits[i - begin, row]) for i in range(first, stop)]
