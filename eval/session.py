"""A model on a device: judges candidates and generates tokens. It keeps what candidates share: weights and the oracle's reference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from amk.eval.artefacts import write_artefacts
from amk.eval.baselines import Contest, Entrant, Rival
from amk.eval.batch_oracle import judge_any
from amk.eval.bench import Timing, launch_start, measured, read_bandwidth_gbs, take
from amk.eval.candidate import Candidate, prepare
from amk.eval.card import Place
from amk.eval.card_lock import live_card_lock
from amk.eval.errors import EnvironmentProblem, UsageError
from amk.eval.latency_table import table_row
from amk.eval.oracle import PROMPT_TEXT, Finding, Reference, default_plan, make_reference, rounding_points
from amk.eval.verdict import Facts, Judgement, Latency, Verdict, failed, judged, rejected
from amk.models.model import Model
from amk.models.registry import resolve
from amk.models.rounded import RoundingPoints
from amk.schedule.cost import latency_us, streamed_bytes
from amk.schedule.program import Program
from amk.schedule.settings import Chooser
from amk.vm.build import Binary, BuildFailed, compile_kernel
from amk.vm.cuda import CudaVM, UnprovenCudaVM
from amk.vm.image import same_weights
from amk.vm.interface import DecodeMachine, LaunchFailed, PrefillMachine
from amk.vm.reference import ReferenceVM
from amk.vm.source import kernel_source

Loaded: TypeAlias = CudaVM | ReferenceVM  # a candidate's machine on either device

LATENCY_POSITION = 128
PREDICTION_NOTE = "latency is predicted by the cost model for the data sheet's bandwidth: nothing was measured"


class Session:
    """Everything about one model in one place; see Place for what "cuda" and "cpu" mean. The token is for fetching and is not kept."""

    def __init__(self, model: str, place: Place, progress: Callable[[str], None] | None = None, token: str | None = None) -> None:
        self.place = place
        self.model: Model = resolve(model, progress=progress, token=token)
        self.progress = progress or (lambda _: None)
        self._references: dict[tuple[int, RoundingPoints], Reference] = {}
        self._stretches: dict[str, Candidate] = {}
        self._bandwidth: float | None = None

    def prepare(self, config: Any, context: int | None = None, chooser: Chooser = "greedy", batch: int = 1) -> Candidate:
        return prepare(self.model.spec, self.place, config, context, chooser, batch)

    def prepare_stretch(self, candidate: Candidate, stretch: int) -> Candidate:
        """The candidate's config for prefill in stretches of so many tokens, proven once a session: every prompt may need it."""
        assert candidate.program is not None
        context = candidate.program.program.machine.context
        key = json.dumps([candidate.asked, context, stretch], sort_keys=True)
        if key not in self._stretches:
            self.progress(f"preparing prefill of {stretch} tokens a launch")
            self._stretches[key] = prepare(self.model.spec, self.place, candidate.asked, context, batch=stretch, prefill=True)
        return self._stretches[key]

    def adopt(self, candidate: Candidate) -> Candidate:
        """The candidate; prepared anew only where the weights are stored in another dtype than the model's description said."""
        return candidate if candidate.spec == self.model.spec else self._again(candidate)

    def _again(self, candidate: Candidate) -> Candidate:
        return self.prepare(candidate.asked, chooser=candidate.chooser, batch=candidate.facts.batch)

    def evaluate(self, candidate: Candidate) -> Verdict:
        """The verdict: rejected, or judged and (if correct) timed. EnvironmentProblem if its binary does not build."""
        if candidate.program is None:
            return rejected(candidate.facts, candidate.rejections)
        facts, machine = self.load(candidate)
        try:
            self.progress("judging against the source model")
            reference = self.reference(candidate.program.program)
            finding = judge_any(machine, reference)
            judgement = _judgement(facts, finding)
            latency = self.latency(candidate, facts, machine, LATENCY_POSITION)[0] if finding.correct else None
        except LaunchFailed as failure:
            return failed(facts, "timeout" if failure.kind == "timeout" else "crash", str(failure))
        finally:
            machine.close()
        predicted = (PREDICTION_NOTE,) if latency and latency.kind == "predicted" else ()
        return judged(facts, judgement, latency, [*candidate.notes, *predicted])

    def load(self, candidate: Candidate, max_steps: int = 512, beside: UnprovenCudaVM | None = None) -> tuple[Facts, Loaded]:
        """The candidate's machine on this session's device, and its facts with the binary's digest.

        It shares the weights of the machine `beside` where its program reads the same bytes.
        """
        assert candidate.program is not None
        if self.place.device == "cpu":
            return candidate.facts, ReferenceVM(candidate.program, self.model.weights)
        binary = self.build(candidate)
        shared = beside.weights if beside and same_weights(candidate.program.program, beside.program) else None
        self.progress("sharing weights" if shared else "loading weights")
        arch = self.place.target.arch
        machine = CudaVM(candidate.program, self.model.weights, arch=arch, binary=binary, max_steps=max_steps, weights=shared)
        return replace(candidate.facts, binary_digest=binary.digest), machine

    def load_prefill(self, candidate: Candidate, decoder: Loaded) -> PrefillMachine:
        """The candidate's machine for prefill, with the weights and KV rows of the one that decodes. EnvironmentProblem as for `build`."""
        assert candidate.program is not None
        if isinstance(decoder, ReferenceVM):
            return ReferenceVM(candidate.program, self.model.weights, beside=decoder)
        binary, arch = self.build(candidate), self.place.target.arch
        return CudaVM(candidate.program, self.model.weights, arch=arch, binary=binary, beside=decoder)

    def build(self, candidate: Candidate) -> Binary:
        """The candidate's kernel, from the cache where it was built before. EnvironmentProblem if it does not compile."""
        assert candidate.program is not None
        self.progress("building the kernel")
        try:
            return compile_kernel(kernel_source(candidate.program.program), self.place.target.arch)
        except BuildFailed as problem:
            raise EnvironmentProblem(f"build: {problem}") from problem

    def reference(self, program: Program) -> Reference:
        """The source model's side of the judgement, made once for programs that round at the same places."""
        context, points = program.machine.context, rounding_points(program)
        if (context, points) not in self._references:
            self.progress("running the source model")
            plan = default_plan(self.model.spec, context, self.place.device, self._text())
            eager = self.model.eager("fp32", self.place.device)
            self._references[context, points] = make_reference(self.model.spec, eager, plan, points)
        return self._references[context, points]

    def _text(self) -> list[int]:
        """The oracle's prompt in the model's own tokens; empty where it has no tokenizer, or one that knows more tokens than it does."""
        tokenizer = self.model.tokenizer()
        tokens: list[int] = tokenizer(PROMPT_TEXT)["input_ids"] if tokenizer else []
        return tokens if all(token < self.model.spec.vocab for token in tokens) else []

    def latency(
        self, candidate: Candidate, facts: Facts, machine: DecodeMachine, position: int, entrants: Sequence[Entrant] = ()
    ) -> tuple[Latency, Timing | None]:
        """Measured on the card, in turns with the baselines among `entrants`; predicted on the CPU, where there are no samples."""
        position = min(position, machine.context - 1)
        if self.place.device == "cpu":
            return self._predicted(candidate, facts, position), None
        self.progress(f"measuring at position {position}")
        assert facts.program_digest is not None and facts.binary_digest is not None and isinstance(machine, UnprovenCudaVM)
        digests, span = (facts.program_digest, facts.binary_digest), launch_start(position, machine.context)
        with live_card_lock(self.progress):
            bandwidth = self.bandwidth()
            timing = take(machine, position, [partial(rival.sample_us, span) for rival in entrants if isinstance(rival, Rival)])
        return measured(machine, self.place.target, position, bandwidth, digests, timing), timing

    def bandwidth(self) -> float:
        """The card's plain-read bandwidth, GB/s, measured once a session."""
        if self._bandwidth is None:
            self._bandwidth = read_bandwidth_gbs(self.place.target)
        return self._bandwidth

    def _predicted(self, candidate: Candidate, facts: Facts, position: int) -> Latency:
        assert candidate.program is not None and facts.program_digest is not None
        target, program = self.place.target, candidate.program.program
        return Latency(
            program_digest=facts.program_digest,
            binary_digest=facts.binary_digest,
            kind="predicted",
            position=position,
            latency_us=latency_us(program, target, position),
            streamed_bytes=streamed_bytes(program, position),
            bandwidth_gbs=target.bandwidth_gbs,
            bandwidth_kind="spec",
            spec_bandwidth_gbs=target.bandwidth_gbs,
        )

    def compile(self, candidate: Candidate, folder: Path) -> dict[str, Any]:
        """The verdict, and the files written into `folder`: none for a program that was refused. EnvironmentProblem as for `evaluate`."""
        verdict = self.evaluate(candidate).to_json()
        if candidate.program is None:
            return {"verdict": verdict, "files": []}
        files = write_artefacts(folder, candidate, self.place.target.arch, self.build(candidate), verdict)
        return {"verdict": verdict, "files": files}

    def bench(self, candidate: Candidate, positions: Sequence[int], baselines: bool = False) -> dict[str, Any]:
        """Verdict and a latency a position, in turns with the baselines where asked. UsageError for a position outside the context."""
        if candidate.program is None:
            return {"verdict": rejected(candidate.facts, candidate.rejections).to_json(), "rows": []}
        context = candidate.program.program.machine.context
        outside = [p for p in positions if not 0 <= p < context]
        if outside:
            raise UsageError(f"positions: must lie in 0..{context - 1} for this model, but got {outside[0]}")
        verdict = self.evaluate(candidate)
        if not verdict.correct:
            return {"verdict": verdict.to_json(), "rows": []}
        contest = Contest(self.model, [launch_start(p, context) for p in positions], self.progress) if baselines else None
        facts, machine = self.load(candidate)
        try:
            rows = [self._row(candidate, facts, machine, position, contest) for position in positions]
        finally:
            machine.close()
        return {"verdict": verdict.to_json(), "rows": rows}

    def _row(self, candidate: Candidate, facts: Facts, machine: DecodeMachine, position: int, contest: Contest | None) -> dict[str, Any]:
        entrants = contest.enter(launch_start(position, machine.context)) if contest else []
        return table_row(*self.latency(candidate, facts, machine, position, entrants), entrants, self.model.spec.dtype, facts.batch)


def _judgement(facts: Facts, finding: Finding) -> Judgement:
    assert facts.program_digest is not None
    return Judgement(
        program_digest=facts.program_digest,
        binary_digest=facts.binary_digest,
        correct=finding.correct,
        rel_err=finding.rel_err,
        max_abs_err=finding.max_abs_err,
        top1_agreement=finding.top1_agreement,
        tolerance_used=finding.tolerance_used,
        near_ties=finding.near_ties,
        positions=finding.positions,
        failures=finding.failures,
    )
