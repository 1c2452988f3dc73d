"""Tokens from a prompt: launches of many tokens that end at stop tokens, compared with the source model where asked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from amk.eval.candidate import Candidate, require_program
from amk.eval.errors import UsageError
from amk.eval.oracle import relative_error, rms, rounding_points
from amk.eval.prefill import prefill
from amk.eval.session import Session
from amk.eval.ties import tie_gap
from amk.eval.tolerance import FP32_ERROR
from amk.isa.sampling import F32, GREEDY, STOP_TOKENS, Sampling, kept_tokens, perturbed, scores_of
from amk.models.rounded import rounded
from amk.models.source import SourceRun
from amk.schedule.program import Program
from amk.schedule.rejection import show
from amk.schedule.settings import Chooser
from amk.vm.interface import DecodeMachine

if TYPE_CHECKING:
    import torch

TOKENS_A_LAUNCH = 256
TOKENS_BETWEEN_TEXTS = 16  # of a launch where the host looks for texts to stop at: what comes after them is made in vain
INCOMPLETE = "\ufffd"  # what a tokenizer writes for the bytes of half a character
SURROGATE = re.compile("[\ud800-\udfff]")  # what Python makes of a byte that is not UTF-8, and no tokenizer takes
OnToken = Callable[[int, int, str], None]


def check_request(
    prompt: str | None, prompt_ids: Sequence[int] | None, max_tokens: int, stop: Sequence[str], sampling: Sampling = GREEDY
) -> None:
    """UsageError for what no model could do, before one is fetched: no prompt, two, no tokens asked for, or values that mean nothing."""
    if (prompt is None) == (prompt_ids is None):
        raise UsageError("prompt: must be given once, as text or as ids")
    if max_tokens < 1:
        raise UsageError(f"max_tokens: must be at least 1, but got {max_tokens}")
    if isinstance(stop, str):
        raise UsageError(f"stop: must be a list of texts, but got the text {stop!r} alone")
    if not (isinstance(stop, Iterable) and all(isinstance(text, str) for text in stop)):
        raise UsageError(f"stop: must be a list of texts, but got {show(stop)}")
    if "" in stop:
        raise UsageError("stop: must be a text, but got an empty one, which is everywhere")
    for name, text in (("prompt", prompt or ""), *(("stop", text) for text in stop)):
        if SURROGATE.search(text):
            raise UsageError(f"{name}: must be Unicode text, which a surrogate alone is not, but got {show(text)}")
    problems = list(sampling.problems())
    if problems:
        raise UsageError("; ".join(problems))


def chooser_for(sampling: Sampling) -> Chooser:
    """The program that generates: with filters where there are any. It ends at stop tokens, greedy or not."""
    return "filter" if sampling.filters else "draw"


def prompt_tokens(session: Session, text: str | None, ids: Sequence[int] | None) -> tuple[list[int], Any]:
    """The prompt as token ids, and the tokenizer (None where the model has none). UsageError for ids that the model has not, or none."""
    tokenizer = session.model.tokenizer()
    if text is not None:
        if tokenizer is None:
            raise UsageError(f"prompt: must be ids for {session.model.spec.name}, which has no tokenizer")
        ids = tokenizer(text)["input_ids"]
    assert ids is not None
    vocab = session.model.spec.vocab
    wrong = [i for i in ids if not 0 <= i < vocab]
    if wrong or not ids:
        raise UsageError(f"prompt: must be at least one token id from 0 to {vocab - 1}, but got {wrong[0] if wrong else 'none'}")
    return list(ids), tokenizer


def generate(
    session: Session,
    candidate: Candidate,
    *,
    prompt: str | None = None,
    prompt_ids: Sequence[int] | None = None,
    max_tokens: int = 64,
    stop: Sequence[str] = (),
    sampling: Sampling = GREEDY,
    verify: bool = False,
    stream: bool = False,
    on_token: OnToken | None = None,
) -> dict[str, Any]:
    """Tokens after the prompt, chosen as `sampling` says (with the model's stop tokens); with `stream`, `on_token` hears of each at once.

    Rejected for a config that was refused, UsageError for what does not fit the context.
    """
    program = require_program(candidate).program
    tokens, tokenizer = prompt_tokens(session, prompt, prompt_ids)
    if stop and tokenizer is None:
        raise UsageError(f"stop: must be left out for {session.model.spec.name}, which has no tokenizer")
    context = program.machine.context
    if len(tokens) + max_tokens > context + 1:
        raise UsageError(f"prompt: {len(tokens)} tokens and {max_tokens} new ones must fit the context of {context}")
    facts, machine = session.load(candidate, max_steps=max(TOKENS_A_LAUNCH, len(tokens) + max_tokens))
    try:
        if machine_is_quick(session):
            machine.decode(tokens[:1], 0)  # a first launch loads the kernel: not the prompt's time
        sampling = replace(sampling, stop_tokens=session.model.spec.stop_tokens[:STOP_TOKENS])
        hearer = Hearer(session.model.spec.stop_tokens, stop, max_tokens, tokenizer, on_token if stream else None)
        done = prefill(session, candidate, machine, tokens)
        tokens_a_launch = launch_tokens(machine_is_quick(session), bool(stop))
        per_token = _decode(machine, tokens[done["tokens"] :], done["tokens"], sampling, hearer, tokens_a_launch)
    finally:
        machine.close()
    new = hearer.tokens
    text = tokenizer.decode(new) if tokenizer else None
    result = {
        "text": text,
        "tokens": [*tokens, *new],
        "generated": new,
        "prompt_tokens": len(tokens),
        "prefill": done,
        "tokens_per_second": 1e6 / per_token if per_token else None,
        "latency_us_per_token": per_token,
        "divergence_index": None,
        "matches_eager": None,
        "near_tie": None,
        "stop_reason": hearer.reason,
        "device": session.place.device,
        "device_name": facts.device_name,
        "model": session.model.spec.name,
        "gpu": session.place.target.name,
        "schedule_id": facts.schedule_id,
    }
    return result | (compare(session, program, tokens, new, sampling) if verify else {})


def _decode(
    machine: DecodeMachine, prompt: list[int], start: int, sampling: Sampling, hearer: Hearer, tokens_a_launch: int
) -> float | None:
    """The device's microseconds a token (None on the CPU), of what `prompt` has from position `start` on too.

    That and as many new tokens as fit share a launch.
    """
    pending, position, elapsed = list(prompt), start, 0.0
    while hearer.reason is None:
        before = len(pending) - 1  # steps whose choice the prompt overrules
        steps = before + min(tokens_a_launch, hearer.wanted)

        def hear(step: int, token: int, before: int = before) -> None:
            hearer.hear(token, overruled=step < before)

        out = machine.decode(pending, position, steps=steps, sampling=sampling, on_token=hear)
        elapsed += out.elapsed_us or 0.0
        position += len(out.tokens)
        pending = [out.tokens[-1]]
    return elapsed / (position - start) if elapsed else None


class Hearer:
    """Takes tokens as they come: what is generated, told to `on_token`, and the `reason` why no more are wanted, None before."""

    def __init__(self, stop_tokens: Sequence[int], stop: Sequence[str], count: int, tokenizer: Any, on_token: OnToken | None) -> None:
        self.tokens: list[int] = []
        self.reason: str | None = None
        self._stop_tokens, self._stop, self._count, self._on_token = stop_tokens, stop, count, on_token
        self._spoken = Spoken(tokenizer)

    @property
    def wanted(self) -> int:
        """Tokens still to come."""
        return self._count - len(self.tokens)

    def hear(self, token: int, overruled: bool = False) -> None:
        if overruled or self.reason is not None:
            return
        if token in self._stop_tokens:
            self.reason = "stop_token"
            return
        self.tokens.append(token)
        piece = self._spoken.hear(token) if self._on_token or self._stop else ""
        if self._on_token:
            self._on_token(len(self.tokens) - 1, token, piece)
        if any(text in self._spoken.text for text in self._stop):
            self.reason = "stop_text"
        elif not self.wanted:
            self.reason = "max_tokens"


class Spoken:
    """The text of tokens that come one by one: a character made of several of them is complete with its last."""

    def __init__(self, tokenizer: Any) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # from where the last piece began, since how a token is written depends on the one before
        self._told = 0  # characters of them that `text` has

    def hear(self, token: int) -> str:
        """What the token adds to `text`: nothing while a character is incomplete, or where there is no tokenizer (None)."""
        if self._tokenizer is None:
            return ""
        self._tokens.append(token)
        written: str = self._tokenizer.decode(self._tokens)
        if written.endswith(INCOMPLETE):
            return ""
        piece = written[self._told :]
        self.text += piece
        self._tokens = self._tokens[-1:]
        self._told = len(self._tokenizer.decode(self._tokens))
        return piece


def launch_tokens(quick: bool, texts: bool) -> int:
    """New tokens of each launch: one on the CPU; on the card many, or a few where there are texts to stop at."""
    if not quick:
        return 1
    return TOKENS_BETWEEN_TEXTS if texts else TOKENS_A_LAUNCH


def machine_is_quick(session: Session) -> bool:
    """On the card a launch of many tokens costs milliseconds; on the CPU each token is awaited for."""
    return session.place.device == "cuda"


def compare(session: Session, program: Program, prompt: list[int], new: list[int], sampling: Sampling = GREEDY) -> dict[str, Any]:
    """Where the new tokens leave the source model's choice, given the same tokens before and the same noise.

    Near ties (eval.tolerance) are excused: of a greedy choice those of logits, of a draw also those with the edge of a filter.
    """
    if not new:
        return {"divergence_index": None, "matches_eager": True, "near_tie": False}
    eager = session.model.eager("fp32", session.place.device)
    tokens, first = [*prompt, *new[:-1]], len(prompt) - 1
    judged = range(first, len(tokens))
    logits = SourceRun(eager).feed(tokens, judged)
    with rounded(eager, rounding_points(program)):
        moved = SourceRun(eager).feed(tokens, judged)
    expected = [max(FP32_ERROR, relative_error(m, r)) for m, r in zip(moved, logits, strict=True)]
    ties = tie_gaps(logits, expected)
    gaps = [_gaps(row.numpy(), token, sampling, first + i, tie) for i, (row, token, tie) in enumerate(zip(logits, new, ties, strict=True))]
    wrong = [i for i, ((_, excusable), tie) in enumerate(zip(gaps, ties, strict=True)) if excusable >= tie and excusable > 0]
    return {
        "divergence_index": wrong[0] if wrong else None,
        "matches_eager": not wrong,
        "near_tie": any(gap > 0 for i, (gap, _) in enumerate(gaps) if i not in wrong),
    }


def tie_gaps(logits: torch.Tensor, expected: Sequence[float]) -> list[float]:
    """`tie_gap` of each row of `logits` [steps, vocab], whose expected errors are given; usual is what they are together."""
    usual = rms(expected)
    return [tie_gap(row, own, usual) for row, own in zip(logits, expected, strict=True)]


def _gaps(logits: F32, token: int, sampling: Sampling, position: int, tie: float) -> tuple[float, float]:
    """How far, in logits, the token is from the source model's choice: as it is, and where tokens near the filters' edge may go either way.

    Infinite for a token that is not kept.
    """
    scores = scores_of(logits, sampling.temperature)
    noisy = perturbed(scores, sampling, position, 0, 0)
    warmth = sampling.temperature or 1.0

    def gap(must: Any, may: Any) -> float:
        return max(0.0, float(noisy[must].max() - noisy[token]) * warmth) if may[token] else math.inf

    kept = kept_tokens(scores, sampling)
    if not sampling.filters:
        return (exact := gap(kept, kept)), exact
    near = tie / warmth
    narrow = kept_tokens(scores, replace(sampling, top_p=sampling.top_p * math.exp(-near)))
    wide = kept_tokens(scores, replace(sampling, top_p=min(1.0, sampling.top_p * math.exp(near))))
    certain = narrow & (scores >= min(scores[narrow].min() + near, scores.max()))
    return gap(kept, kept), gap(certain, wide | (scores >= scores[wide].min() - np.float32(near)))
