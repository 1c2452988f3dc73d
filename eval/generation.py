"""Tokens from a prompt: launches of many tokens, stopped at stop tokens, compared with the source model where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from amk.eval.candidate import Candidate, require_program
from amk.eval.errors import UsageError
from amk.eval.oracle import relative_error, rounding_points
from amk.eval.session import Session
from amk.eval.tolerance import FP32_ERROR, TIE
from amk.models.rounded import rounded
from amk.models.source import SourceRun
from amk.schedule.program import Program
from amk.vm.interface import DecodeMachine

TOKENS_A_LAUNCH = 256
# A launch that begins costs tens of microseconds and its tokens are known when it ends: 16 are a few milliseconds, one screen update.
STREAMED_TOKENS = 16
INCOMPLETE = "\ufffd"  # what a tokenizer writes for the bytes of half a character
OnToken = Callable[[int, int, str], None]


def check_request(prompt: str | None, prompt_ids: Sequence[int] | None, max_tokens: int, stop: Sequence[str]) -> None:
    """UsageError for what no model could do, before one is fetched: no prompt, two, no tokens asked for, or an empty text to stop at."""
    if (prompt is None) == (prompt_ids is None):
        raise UsageError("prompt: must be given once, as text or as ids")
    if max_tokens < 1:
        raise UsageError(f"max_tokens: must be at least 1, but got {max_tokens}")
    if isinstance(stop, str):
        raise UsageError(f"stop: must be a list of texts, but got the text {stop!r} alone")
    if "" in stop:
        raise UsageError("stop: must be a text, but got an empty one, which is everywhere")


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
    verify: bool = False,
    stream: bool = False,
    on_token: OnToken | None = None,
) -> dict[str, Any]:
    """Greedy tokens after the prompt; with `stream`, `on_token` hears of each once its launch ends (STREAMED_TOKENS).

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
        heard = on_token if stream else None
        new, reason, elapsed = _decode(machine, session, tokens, max_tokens, stop, tokenizer, heard)
    finally:
        machine.close()
    text = tokenizer.decode(new) if tokenizer else None
    per_token = elapsed / (len(tokens) + len(new) - 1) if elapsed else None
    result = {
        "text": text,
        "tokens": [*tokens, *new],
        "generated": new,
        "prompt_tokens": len(tokens),
        "tokens_per_second": 1e6 / per_token if per_token else None,
        "latency_us_per_token": per_token,
        "divergence_index": None,
        "matches_eager": None,
        "near_tie": None,
        "stop_reason": reason,
        "device": session.place.device,
        "device_name": facts.device_name,
        "model": session.model.spec.name,
        "gpu": session.place.target.name,
        "schedule_id": facts.schedule_id,
    }
    return result | (compare(session, program, tokens, new) if verify else {})


def _decode(
    machine: DecodeMachine, session: Session, prompt: list[int], count: int, stop: Sequence[str], tokenizer: Any, on_token: OnToken | None
) -> tuple[list[int], str, float | None]:
    """New tokens, why they end, and the device's microseconds (None on the CPU). The prompt and as many tokens as fit share a launch."""
    new: list[int] = []
    spoken = Spoken(tokenizer)
    pending, position, elapsed = list(prompt), 0, 0.0
    launches = launch_tokens(machine_is_quick(session), on_token is not None)
    while True:
        steps = len(pending) + min(next(launches), count - len(new)) - 1
        out = machine.decode(pending, position, steps=steps)
        elapsed += out.elapsed_us or 0.0
        position += steps
        for token in out.tokens[len(pending) - 1 :]:
            if token in session.model.spec.stop_tokens:
                return new, "stop_token", elapsed or None
            new.append(token)
            piece = spoken.hear(token) if on_token or stop else ""
            if on_token:
                on_token(len(new) - 1, token, piece)
            if any(s in spoken.text for s in stop):
                return new, "stop_text", elapsed or None
            if len(new) == count:
                return new, "max_tokens", elapsed or None
        pending = [out.tokens[-1]]


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


def launch_tokens(quick: bool, streamed: bool) -> Iterator[int]:
    """New tokens of each launch: one on the CPU; on the card many, or where they are streamed the first alone and then a few."""
    if quick and streamed:
        yield 1
    while True:
        yield (STREAMED_TOKENS if streamed else TOKENS_A_LAUNCH) if quick else 1


def machine_is_quick(session: Session) -> bool:
    """On the card a launch of many tokens costs milliseconds; on the CPU each token is awaited for."""
    return session.place.device == "cuda"


def compare(session: Session, program: Program, prompt: list[int], new: list[int]) -> dict[str, Any]:
    """Where the new tokens leave the source model's greedy choice, given the same tokens before; near ties (eval.tolerance) are excused."""
    import torch

    if not new:
        return {"divergence_index": None, "matches_eager": True, "near_tie": False}
    eager = session.model.eager("fp32", session.place.device)
    tokens, first = [*prompt, *new[:-1]], len(prompt) - 1
    judged = range(first, len(tokens))
    logits = SourceRun(eager).feed(tokens, judged)
    with rounded(eager, rounding_points(program)):
        moved = SourceRun(eager).feed(tokens, judged)
    expected = torch.tensor([max(FP32_ERROR, relative_error(m, r)) for m, r in zip(moved, logits, strict=True)])
    gaps = logits.max(dim=1).values - logits[torch.arange(len(new)), torch.tensor(new)]
    excused = gaps < TIE * expected * logits.std(dim=1)
    wrong = ((gaps > 0) & ~excused).nonzero().flatten().tolist()
    return {
        "divergence_index": wrong[0] if wrong else None,
        "matches_eager": not wrong,
        "near_tie": bool(((gaps > 0) & excused).any()),
    }
