"""A long prompt's way into the KV cache: stretch by stretch, by a program beside the one that decodes. A short one is decoded itself."""

from __future__ import annotations

from amk.eval.candidate import Candidate
from amk.eval.session import Loaded, Session
from amk.eval.shapes import Prefill
from amk.schedule.settings import STRETCHES
from amk.vm.kv import has_same_rows

# The second program is lowered and proven once a session, for about 0.7 s at 1B and 2 s at 8B, and built once a machine, for 3 s. A token
# that is decoded takes 0.3 to 3.4 ms, 128 of a launch 1.5 ms at 1B. So a session's first prompt gains from about a thousand tokens on and
# those that follow at once; below this many they would gain less than anybody notices.
LEAST_PROMPT = 256
WIDEST_FIRST = tuple(sorted(STRETCHES, reverse=True))  # tokens of a launch, best first


def prefill(session: Session, candidate: Candidate, decoder: Loaded, prompt: list[int]) -> Prefill:
    """Makes the KV rows of all of the prompt but its last token, from which `decoder`, the candidate's machine, goes on. Or says why not.

    EnvironmentProblem if the program does not build, LaunchFailed if a launch does not finish.
    """
    if len(prompt) < LEAST_PROMPT:
        return _none(f"the prompt must have at least {LEAST_PROMPT} tokens to be worth a second program, but has {len(prompt)}")
    found = stretch_program(session, candidate)
    if isinstance(found, str):
        return _none(found)
    machine, tokens = session.load_prefill(found, decoder), prompt[:-1]
    try:
        if session.place.device == "cuda":
            machine.prefill(tokens[:1], 0)  # a first launch loads the kernel: not the prompt's time
        session.progress(f"prefilling {len(tokens)} tokens, {machine.batch} a launch")
        elapsed_us = machine.prefill(tokens, 0)
    finally:
        machine.close()
    launches = -(-len(tokens) // machine.batch)
    return {"stretch": machine.batch, "launches": launches, "tokens": len(tokens), "elapsed_us": elapsed_us, "reason": None}


def stretch_program(session: Session, candidate: Candidate) -> Candidate | str:
    """The widest program for prefill that can run beside the candidate's, or why the narrowest cannot."""
    reason = ""
    for stretch in WIDEST_FIRST:
        found = session.prepare_stretch(candidate, stretch)
        reason = _against(found, candidate)
        if not reason:
            return found
    return f"there is no program for prefill: {reason}"


def _against(found: Candidate, candidate: Candidate) -> str:
    """Why a program for prefill cannot run beside the candidate's; empty where it can."""
    if found.program is None:
        return "; ".join(found.rejections)
    assert candidate.program is not None
    if has_same_rows(found.program.program, candidate.program.program):
        return ""
    found_bytes, own_bytes = (c.program.program.machine.stage_bytes for c in (found, candidate) if c.program)
    return f"it must stream the weights as the program that decodes, but its stages have {found_bytes} bytes, and those {own_bytes}"


def _none(reason: str) -> Prefill:
    return {"stretch": None, "launches": 0, "tokens": 0, "elapsed_us": None, "reason": reason}
