"""A real checkpoint on the card: 256 greedy tokens from a text prompt, through one launch, equal to transformers'."""

from __future__ import annotations

from typing import Any

import pytest

from amk.eval.card import choose
from amk.eval.generation import compare
from amk.eval.session import Session

pytestmark = pytest.mark.cuda
PROMPT = "Once upon a time, in a small village by the sea,"
TOKENS = 256


def test_smollm2_generates_256_greedy_tokens_equal_to_the_source_models(record_property: Any) -> None:
    session = Session("smollm2-135m", choose(None, "cuda"))
    candidate = session.prepare({})
    assert candidate.program is not None, candidate.rejections
    _, machine = session.load(candidate)
    prompt = session.model.tokenizer()(PROMPT)["input_ids"]
    out = machine.decode(prompt, 0, steps=len(prompt) + TOKENS - 1)
    new = list(out.tokens[len(prompt) - 1 :])
    assert len(new) == TOKENS
    found = compare(session, candidate.program.program, prompt, new)
    record_property("text", session.model.tokenizer().decode(new)[:200])
    record_property("near_tie", found["near_tie"])
    record_property("us_per_token", out.elapsed_us / (len(prompt) + TOKENS - 1) if out.elapsed_us else None)
    assert found["matches_eager"], found
