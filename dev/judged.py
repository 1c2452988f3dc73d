"""A program on the live card that may be timed: found correct by the oracle, and giving the same bits each time it runs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from amk.dev.version import code_digest
from amk.eval.candidate import Candidate
from amk.eval.oracle import judge
from amk.eval.session import Session
from amk.vm.cuda import UnprovenCudaVM
from amk.vm.interface import DecodeMachine

RUNS, STEPS, PROMPT = 3, 24, 8  # launches whose bits are compared; their tokens, and how many of those are given


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


def judged(session: Session, candidate: Candidate, label: str) -> JudgedMachine:
    """The candidate's machine, to be closed by the caller. NotCorrect, with the reasons, where there is nothing to time."""
    if candidate.program is None:
        raise NotCorrect("; ".join(candidate.rejections))
    program = candidate.program.program
    facts, machine = session.load(candidate)
    assert isinstance(machine, UnprovenCudaVM) and facts.program_digest and facts.binary_digest
    try:
        finding = judge(machine, session.reference(program))
        if not finding.correct:
            raise NotCorrect("; ".join(finding.failures))
        bits = same_bits(machine, session.model.spec.vocab)
    except BaseException:
        machine.close()
        raise
    known = {
        "model": session.model.spec.name, "config": label, "effective": candidate.effective, "correct": finding.correct,
        "tolerance_used": finding.tolerance_used, "judged_positions": len(finding.positions), "schedule_id": facts.schedule_id,
        "program_digest": facts.program_digest, "binary_digest": facts.binary_digest, "model_digest": session.model.digest,
        "code_sha256": code_digest(program), "outputs_sha256": bits, "identical_runs": RUNS, "arena_bytes": 8 * program.arena_packets,
        "registers": machine.kernel.binary.registers,
    }  # fmt: skip
    return JudgedMachine(machine, known)


def same_bits(machine: DecodeMachine, vocab: int, runs: int = RUNS) -> str:
    """SHA-256 of the tokens and logits of one sequence, which must be the same in each of `runs` launches: NotCorrect otherwise."""
    prompt = [(7919 * i + 1) % vocab for i in range(PROMPT)]
    found = [_digest(machine.decode(prompt, 0, steps=min(STEPS, machine.context), logits=True)) for _ in range(runs)]
    if len(set(found)) != 1:
        raise NotCorrect(f"{runs} launches of the same tokens must give the same bits, but gave {len(set(found))} different outputs")
    return found[0]


def _digest(decoded: Any) -> str:
    logits = decoded.logits.contiguous().cpu().numpy()
    return hashlib.sha256(repr(decoded.tokens).encode() + logits.tobytes()).hexdigest()
