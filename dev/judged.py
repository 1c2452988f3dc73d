"""A program on the live card that may be timed: found correct by the oracle, and giving the same bits each time it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amk.dev.version import code_digest
from amk.eval.batch_oracle import judge_any
from amk.eval.candidate import Candidate
from amk.eval.session import Session
from amk.vm.cuda import UnprovenCudaVM

RUNS, STEPS, PROMPT = 3, 24, 8  # launches whose bits are compared; their tokens, and how many of those are given

IDENTITY = ("model", "program_digest", "binary_digest", "model_digest", "outputs_sha256")


class NotCorrect(Exception):
    """The program was refused, is wrong, or gives other bits when it runs again: nothing of it may be timed."""


@dataclass(frozen=True, eq=False)
class JudgedMachine:
    """The machine, and what a line of results says of its program: what it is, and how it was found to be correct."""

    machine: UnprovenCudaVM
    facts: dict[str, Any]

    @property
    def digests(self) -> tuple[str, str]:
        return self.facts["program_digest"], self.facts["binary_digest"]


def judged(
    session: Session,
    candidate: Candidate,
    label: str,
    before: Mapping[str, Any] | None = None,
    beside: UnprovenCudaVM | None = None,
) -> JudgedMachine:
    """The candidate's machine, to be closed by the caller. NotCorrect, with the reasons, where there is nothing to time.

    `before` is what another process found of the same program moments ago: if program, binary, weights and output bits are the same, its
    judgement stands. Weights are shared with the machine `beside` where the programs read the same bytes.
    """
    if candidate.program is None:
        raise NotCorrect("; ".join(candidate.rejections))
    program = candidate.program.program
    facts, machine = session.load(candidate, beside=beside)
    assert isinstance(machine, UnprovenCudaVM) and facts.program_digest and facts.binary_digest
    known = {
        "model": session.model.spec.name, "config": label, "effective": candidate.effective, "schedule_id": facts.schedule_id,
        "program_digest": facts.program_digest, "binary_digest": facts.binary_digest, "model_digest": session.model.digest,
        "code_sha256": code_digest(program), "identical_runs": RUNS, "arena_bytes": 8 * program.arena_packets,
        "registers": machine.kernel.binary.registers,
    }  # fmt: skip
    try:
        session.progress(f"running it {RUNS} times")
        known["outputs_sha256"] = same_bits(machine, session.model.spec.vocab)
        return JudgedMachine(machine, known | (judged_before(known, before) or judgement(session, machine)))
    except BaseException:
        machine.close()
        raise


def judgement(session: Session, machine: UnprovenCudaVM) -> dict[str, Any]:
    """What the oracle finds of a machine that is correct; NotCorrect otherwise."""
    reference = session.reference(machine.program)
    session.progress("judging against the source model")
    finding = judge_any(machine, reference)
    if not finding.correct:
        raise NotCorrect("; ".join(finding.failures))
    return {"correct": finding.correct, "tolerance_used": finding.tolerance_used, "judged_positions": len(finding.positions)}


def judged_before(known: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The judgement of a line about the same program, binary and weights with outputs of the same bits; None if `before` is not that."""
    if before is None or any(known[name] != before.get(name) for name in IDENTITY) or before.get("correct") is not True:
        return None
    return {name: before[name] for name in ("correct", "tolerance_used", "judged_positions")} | {
        "judged": "by another process, the same bits"
    }


def same_bits(machine: UnprovenCudaVM, vocab: int, runs: int = RUNS) -> str:
    """SHA-256 of tokens and logits, which must be the same in each of `runs` launches: NotCorrect otherwise.

    Each row of a batch has a prompt of its own.
    """
    prompts = [[(7919 * i + row + 1) % vocab for i in range(PROMPT)] for row in range(machine.batch)]
    steps = min(STEPS, machine.context)
    if machine.batch == 1:
        found = [_digest(machine.decode(prompts[0], 0, steps=steps, logits=True)) for _ in range(runs)]
    else:
        found = [_digest(machine.decode_batch(prompts, [0] * machine.batch, steps=steps, logits=True)) for _ in range(runs)]
    if len(set(found)) != 1:
        raise NotCorrect(f"{runs} launches of the same tokens must give the same bits, but gave {len(set(found))} different outputs")
    return found[0]


def _digest(decoded: Any) -> str:
    logits = decoded.logits.contiguous().cpu().numpy()
    return hashlib.sha256(repr(decoded.tokens).encode() + logits.tobytes()).hexdigest()
