"""Tokens on the card, equal to transformers': of a real checkpoint through one launch, and after long prompts with and without prefill."""

from __future__ import annotations

import random
from typing import Any

import pytest

from amk.eval.card import choose
from amk.eval.generation import chooser_for, compare, generate
from amk.eval.session import Session
from amk.isa.sampling import GREEDY, Sampling

pytestmark = pytest.mark.cuda
PROMPT = "Once upon a time, in a small village by the sea,"
TOKENS = 256
DRAWN = Sampling(temperature=0.8, top_k=40, top_p=0.9, seed=1)


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


def long_prompt(session: Session, count: int) -> list[int]:
    """Text over and over of a model that has a tokenizer, else random tokens."""
    tokenizer = session.model.tokenizer()
    if tokenizer is None:
        return random.Random(count).choices(range(session.model.spec.vocab), k=count)
    text: list[int] = tokenizer(PROMPT)["input_ids"]
    return (text * (count // len(text) + 1))[:count]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("count", [300, 4000])
@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.2-1b-shape"])
def test_a_long_prompt_goes_on_alike_prefilled_and_decoded(name: str, count: int, sampling: Sampling, record_property: Any) -> None:
    session = Session(name, choose(None, "cuda"))
    candidate = session.prepare({}, chooser=chooser_for(sampling))
    assert candidate.program is not None, candidate.rejections
    prompt = long_prompt(session, count)
    result = generate(session, candidate, prompt_ids=prompt, max_tokens=64, sampling=sampling, verify=True)
    prefill = result["prefill"]
    record_property("prefill_us", prefill["elapsed_us"])
    record_property("stretch", prefill["stretch"])
    assert (prefill["reason"], prefill["tokens"]) == (None, count - 1)
    assert prefill["launches"] == -(-(count - 1) // prefill["stretch"]) > 1
    assert result["matches_eager"], result

    _, machine = session.load(candidate, max_steps=count + 64)
    out = machine.decode(prompt, 0, steps=count + 63, sampling=sampling)
    machine.close()
    record_property("decoded_us", out.elapsed_us)
    plain = list(out.tokens[count - 1 :][: len(result["generated"])])
    record_property("tokens_alike", plain == result["generated"])
    found = compare(session, candidate.program.program, prompt, plain, sampling)
    assert found["matches_eager"], found
    assert plain == result["generated"] or found["near_tie"] or result["near_tie"]
