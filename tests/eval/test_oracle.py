"""What the oracle does with machines that are not wrong in their arithmetic but in what they hand back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from amk.eval.kv_rows import Rows, expected_errors, typical_ratios
from amk.eval.oracle import Finding, Plan, Reference, Segment, Step, compare, default_plan, find, judge, rounding_points
from amk.eval.ties import change_chance
from amk.eval.tolerance import FP32_ERROR, ROWS, TIE
from amk.isa.attention import TWO_PART_GROUP
from amk.models.registry import describe
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.targets import small_target
from amk.vm.interface import Decoded, LaunchFailed

VOCAB, STEPS, PROMPT, LAYERS = 97, 12, 3, 4
EXPECTED = 0.01


def reference() -> Reference:
    """Random logits after a prompt and its greedy continuation; no late positions."""
    logits = torch.randn(STEPS, VOCAB, generator=torch.Generator().manual_seed(3)) * 2
    tokens = [5, 6, 7]
    for row in logits[PROMPT - 1 : -1]:
        tokens.append(int(row.argmax()))
    segment = Segment(0, tuple(tokens), logits, (EXPECTED,) * STEPS, torch.full((LAYERS, 2, STEPS), EXPECTED))
    return Reference(Plan(PROMPT, STEPS, (), 0), "bf16", LAYERS, segment, (), source_rows)


def source_rows(layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randn(2, 2, STEPS, 8, generator=torch.Generator().manual_seed(layer))
    return rows[0, :, :stop], rows[1, :, :stop]


@dataclass
class Echo:
    """A machine that gives the reference's logits, changed by `edit`, and their best token or the one that `edit` returns; its KV rows
    are the reference's, changed by `edit_rows`.
    """

    reference: Reference
    edit: Any = None
    edit_rows: Any = None
    context: int = 64
    launches: list[tuple[tuple[int, ...], int, int]] = field(default_factory=list)

    def seed_kv(self, layer: int, keys: Any, values: Any) -> None:
        raise AssertionError("nothing is seeded without late positions")

    def read_kv(self, layer: int, stop: int) -> tuple[Any, Any]:
        rows = source_rows(layer, stop)
        if self.edit_rows:
            self.edit_rows(layer, *rows)
        return rows

    def decode(self, tokens: Sequence[int], position: int, *, steps: int | None = None, logits: bool = False) -> Decoded:
        count = steps or len(tokens)
        self.launches.append((tuple(tokens), position, count))
        rows = self.reference.early.logits[position : position + count].clone()
        told = [self.edit(position + i, row) if self.edit else None for i, row in enumerate(rows)]
        chosen = [int(row.argmax()) if token is None else token for token, row in zip(told, rows, strict=True)]
        return Decoded(tuple(chosen), rows, None)

    def close(self) -> None:
        pass


def found(edit: Any = None) -> tuple[Finding, Echo]:
    machine = Echo(reference(), edit)
    return judge(machine, machine.reference), machine


def test_the_source_itself_is_correct_and_runs_in_one_launch() -> None:
    finding, machine = found()
    assert finding.correct and finding.top1_agreement == 1 and finding.positions == tuple(range(STEPS))
    assert [(position, count) for _, position, count in machine.launches] == [(0, STEPS)]
    assert len(machine.launches[0][0]) == PROMPT


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_logit_that_is_not_finite_fails(value: float) -> None:
    def poison(position: int, row: torch.Tensor) -> None:
        if position == 5:
            row[0] = value

    finding, _ = found(poison)
    assert not finding.correct and not finding.tolerance_used < 1


def test_a_buffer_that_was_never_written_fails() -> None:
    def never_written(position: int, row: torch.Tensor) -> None:
        row.fill_(math.nan)

    assert not found(never_written)[0].correct


def test_right_logits_with_another_token_fail() -> None:
    finding, _ = found(lambda position, row: 1 if position == 7 else None)
    assert not finding.correct and any("own logits" in text for text in finding.failures)


def test_a_token_outside_the_vocabulary_fails() -> None:
    finding, _ = found(lambda position, row: VOCAB if position == 7 else None)
    assert not finding.correct


def test_after_a_wrong_token_the_machine_is_put_back_on_the_track_and_judged_to_the_end() -> None:
    def wrong(position: int, row: torch.Tensor) -> None:
        if position == 4:
            row[int(row.argmin())] = row.max() + 1

    finding, machine = found(wrong)
    assert not finding.correct and finding.positions == tuple(range(STEPS))
    tokens = machine.reference.early.tokens
    assert machine.launches[1] == (tokens[5:], 5, STEPS - 5)


def near_tie(position: int, row: torch.Tensor) -> None:
    """Lifts the runner-up just over the best, by less than the tie limit."""
    first, second = row.topk(2).indices
    if position in (4, 8):
        row[second] = row[first] + 1e-4


@pytest.mark.parametrize(("gap", "correct"), [(0.5, True), (0.97, False)])
def test_near_ties_are_excused_but_not_more_than_rounding_explains(gap: float, correct: bool) -> None:
    """Two tokens of twelve differ where the source's two best are `gap` of the limit of a near tie apart: by chances of 0.08 or 0.003."""
    machine = Echo(reference(), near_tie)
    for position, row in enumerate(machine.reference.early.logits):
        first, second = row.topk(2).indices
        row[first] += 1  # elsewhere nothing is tied
        if position in (4, 8):
            row[second] = row[first] - gap * TIE * EXPECTED * row.std()
    finding = judge(machine, machine.reference)
    assert finding.near_ties == 2
    told = "tokens that differ at near ties must be at most 1 of 12, which is what rounding explains, but are 2"
    assert finding.failures == (() if correct else (told,))
    assert [position for _, position, _ in machine.launches] == [0, 5, 9]


@pytest.mark.parametrize(("factor", "correct"), [(1.6, True), (1.65, False)])
def test_errors_are_weighed_against_what_rounding_does(factor: float, correct: bool) -> None:
    """Energy over expected energy must stay below 2.6, the square of 1.612."""
    noise = torch.randn(STEPS, VOCAB, generator=torch.Generator().manual_seed(8))

    def shake(position: int, row: torch.Tensor) -> None:
        spread = (row - row.mean()).norm()
        row += noise[position] / noise[position].norm() * spread * EXPECTED * factor

    steps = []
    machine = Echo(reference(), shake)
    for i, row in enumerate(machine.reference.early.logits):
        moved = row.clone()
        shake(i, moved)
        steps.append(compare(i, int(moved.argmax()), moved, row, EXPECTED))
    assert not [text for text in find(steps, [], {}, "bf16").failures if "logit" in text and "own" not in text] == correct


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(("factor", "correct"), [(1.7, True), (1.8, False)])
def test_kv_rows_are_weighed_against_what_rounding_does(factor: float, correct: bool, kind: int) -> None:
    """As logits are: energy over expected energy must stay below 3. The first layer that is wrong is named."""

    def shake(layer: int, *rows: torch.Tensor) -> None:
        if layer >= 2:
            noise = torch.randn(rows[kind].shape, generator=torch.Generator().manual_seed(9))
            rows[kind].add_(noise / noise.norm(dim=(0, 2), keepdim=True) * rows[kind].norm(dim=(0, 2), keepdim=True) * EXPECTED * factor)

    finding = judge(Echo(reference(), edit_rows=shake), reference())
    assert finding.correct == correct
    name = "KV"[kind]
    assert correct or finding.failures == (
        f"error of the {name} rows of layer 2: must stay below its limit, but is 1.08 of it, and 1 more from there on",
    )


def test_one_kv_row_without_error_does_not_hide_the_others() -> None:
    errors = torch.full((1, 2, 10), 0.1)
    errors[0, 1, 3] = 0
    ratios = typical_ratios(errors, torch.full((1, 2, 10), EXPECTED))
    assert ratios["K rows of layer 0"] == pytest.approx(100) and ROWS < ratios["V rows of layer 0"] < 100


def test_kv_rows_that_rounding_does_not_move_may_err_as_sums_in_another_order_do() -> None:
    assert expected_errors(source_rows, source_rows, LAYERS, Rows(2, STEPS), "fp32").unique().tolist() == [FP32_ERROR]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_kv_row_that_is_not_finite_fails(value: float) -> None:
    def poison(layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if layer == 3:
            values[1, 5, 2] = value

    finding = judge(Echo(reference(), edit_rows=poison), reference())
    assert not finding.correct and finding.tolerance_used == math.inf


def test_a_constant_added_to_every_logit_is_an_error() -> None:
    assert compare(0, 1, torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), EXPECTED).rel_err == pytest.approx(1.0)


@pytest.mark.parametrize(("usual", "near"), [(0.0, False), (0.5, False), (2.0, True)])
def test_where_rounding_happened_to_move_little_what_it_usually_does_makes_a_near_tie(usual: float, near: bool) -> None:
    """Two logits one and a half times further apart than the position's own expected error excuses; `usual` in expected errors."""
    row = torch.randn(VOCAB, generator=torch.Generator().manual_seed(3))
    first, second = row.topk(2).indices
    row[second] = row[first] - 1.5 * TIE * EXPECTED * row.std()
    step = compare(0, int(second), row, row, EXPECTED, usual * EXPECTED)
    assert step.near_tie == near
    assert step.change_chance == change_chance(row, EXPECTED)  # however much it usually does


def steps_of(*errors: tuple[float, float]) -> list[Step]:
    """Steps that choose the right token, of (relative error, expected one)."""
    return [Step(i, error, expected, 0.0, agrees=True, near_tie=True, consistent=True) for i, (error, expected) in enumerate(errors)]


@pytest.mark.parametrize(("last", "correct"), [((0.01, 0.001), True), ((0.07, 0.01), True), ((0.0715, 0.01), False)])
def test_no_single_position_may_err_by_fifty_times_the_energy_that_its_group_is_expected_to(
    last: tuple[float, float], correct: bool
) -> None:
    """A position that one run with rounding moved by little is weighed against the mean; seven times the mean error is the limit."""
    steps, noisy = steps_of(*[(0.01, 0.01)] * 7, last), steps_of(*[(0.08, 0.08)] * 8)
    for finding in (find(steps, [], {}, "bf16"), find(noisy, steps, {}, "bf16"), find(steps, noisy, {}, "bf16")):
        assert finding.correct == correct
        assert all(text.startswith("logit error at position 7: ") for text in finding.failures)


def test_a_model_that_rounding_alone_upsets_is_not_judged() -> None:
    assert not find(steps_of((0.3, 0.3)), [], {}, "bf16").correct


@pytest.mark.parametrize("error", [0.0, 0.3, math.inf])
@pytest.mark.parametrize("expected", [math.inf, math.nan])
def test_a_model_that_rounding_takes_out_of_the_range_of_numbers_is_not_judged(expected: float, error: float) -> None:
    """As fp16 weights whose activations pass 65504."""
    steps = [
        Step(i, rel_err=error, expected=expected if i else 0.01, max_abs_err=1.0, agrees=True, near_tie=True, consistent=True)
        for i in range(3)
    ]
    finding = find(steps[:2], steps[2:], {}, "fp16")
    assert not finding.correct and any("rounding to fp16 alone" in text for text in finding.failures)
    assert finding.tolerance_used == math.inf


def test_a_shorter_answer_than_asked_for_is_refused() -> None:
    class Short(Echo):
        def decode(self, tokens: Sequence[int], position: int, *, steps: int | None = None, logits: bool = False) -> Decoded:
            whole = super().decode(tokens, position, steps=steps, logits=logits)
            return Decoded(whole.tokens[:-1], whole.logits, None)

    with pytest.raises(ValueError, match="decode must give"):
        judge(Short(reference()), reference())


def test_a_launch_that_does_not_finish_is_not_a_finding() -> None:
    class Hangs(Echo):
        def decode(self, tokens: Sequence[int], position: int, *, steps: int | None = None, logits: bool = False) -> Decoded:
            raise LaunchFailed("timeout", "a wait ran out")

    with pytest.raises(LaunchFailed):
        judge(Hangs(reference()), reference())


@pytest.mark.parametrize("name", ["toy", "small", "smollm2-135m", "llama-3.2-1b-shape"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_at_least_eight_positions_are_judged_and_one_past_1000(name: str, device: str) -> None:
    spec = describe(name)
    plan = default_plan(spec, min(spec.max_context, 16384), device)
    judged = [*range(plan.steps), *(p + i for p in plan.late for i in range(plan.late_steps))]
    assert len(judged) >= 8 and max(judged) > 1000


def test_positions_fit_a_short_context() -> None:
    plan = default_plan(describe("toy"), 32, "cuda")
    assert plan.steps <= 32 and plan.late == ()


@pytest.mark.parametrize(("context", "late"), [(134, ()), (135, (127,)), (1030, (127,)), (1031, (127, 1023))])
def test_a_late_position_is_judged_where_all_its_steps_fit_the_context(context: int, late: tuple[int, ...]) -> None:
    assert default_plan(describe("toy"), context, "cuda").late == late


def test_a_position_past_each_sliding_window_is_judged() -> None:
    windowed = replace(describe("toy"), layers=2, windows=(512, None))
    assert default_plan(windowed, 1024, "cuda").late == (127, 515)


@pytest.mark.parametrize(("group", "rounded"), [(TWO_PART_GROUP, False), (TWO_PART_GROUP + 1, True)])
def test_the_yardstick_rounds_attention_operands_where_they_have_no_second_part(group: int, rounded: bool) -> None:
    program = lower(replace(describe("toy"), heads=group, kv_heads=1), Config(), small_target(2))
    assert rounding_points(program).attention_operands == rounded


def test_fp32_is_held_to_one_in_ten_thousand() -> None:
    assert find(steps_of((9e-5, FP32_ERROR)), [], {}, "fp32").correct and not find(steps_of((1e-4, FP32_ERROR)), [], {}, "fp32").correct
