"""Long prompts are prefilled, and go on as if they had been decoded; where there is no prefill, the result says why."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from amk.eval.card import Place
from amk.eval.generation import compare, generate
from amk.eval.prefill import LEAST_PROMPT, WIDEST_FIRST, stretch_program
from amk.eval.session import Session
from amk.isa.sampling import GREEDY, Sampling
from amk.schedule.settings import Chooser
from amk.schedule.targets import small_target

TOKENS = 12
DRAWN = Sampling(temperature=2.0, top_k=100, seed=5)


def place(shared_bytes: int = 232448) -> Place:
    return Place(small_target(4, shared_bytes), "cpu", None)


def prompt_of(session: Session, count: int) -> list[int]:
    return random.Random(count).choices(range(session.model.spec.vocab), k=count)


@pytest.fixture(scope="module")
def session() -> Session:
    return Session("toy-2L", place())


@pytest.mark.parametrize(("chooser", "sampling"), [("draw", GREEDY), ("filter", DRAWN)], ids=["greedy", "drawn"])
def test_tokens_after_a_prefilled_prompt_are_those_after_a_decoded_one(chooser: Chooser, sampling: Sampling, session: Session) -> None:
    candidate, told = session.prepare({}, chooser=chooser), []
    prompt = prompt_of(session, LEAST_PROMPT + WIDEST_FIRST[0])  # all before the last: whole stretches and a part of one
    options: dict[str, Any] = {"stream": True, "on_token": lambda index, token, text: told.append(token)}
    result = generate(session, candidate, prompt_ids=prompt, max_tokens=TOKENS, sampling=sampling, verify=True, **options)
    launches = LEAST_PROMPT // WIDEST_FIRST[0] + 1
    prefill = {"stretch": WIDEST_FIRST[0], "launches": launches, "tokens": len(prompt) - 1, "elapsed_us": None, "reason": None}
    assert (result["prefill"], result["matches_eager"], result["tokens"]) == (prefill, True, [*prompt, *told])

    _, machine = session.load(candidate)
    plain = list(machine.decode(prompt, 0, steps=len(prompt) + TOKENS - 1, sampling=sampling).tokens[len(prompt) - 1 :])
    assert candidate.program is not None
    found = compare(session, candidate.program.program, prompt, plain, sampling)
    assert found["matches_eager"] and (plain == result["generated"] or found["near_tie"] or result["near_tie"])


def test_without_its_rows_a_prompt_would_have_another_end(session: Session) -> None:
    candidate, prompt = session.prepare({}, chooser="filter"), prompt_of(session, LEAST_PROMPT)
    _, machine = session.load(candidate)
    lost = machine.decode(prompt[-1:], len(prompt) - 1, steps=TOKENS, sampling=DRAWN)
    result = generate(session, candidate, prompt_ids=prompt, max_tokens=TOKENS, sampling=DRAWN)
    assert (result["prefill"]["reason"], len(result["generated"])) == (None, TOKENS)
    assert result["generated"] != list(lost.tokens)


def test_a_prompt_below_the_least_is_decoded(session: Session) -> None:
    prompt = prompt_of(session, LEAST_PROMPT - 1)
    result = generate(session, session.prepare({}, chooser="draw"), prompt_ids=prompt, max_tokens=1)
    reason = f"the prompt must have at least {LEAST_PROMPT} tokens to be worth a second program, but has {len(prompt)}"
    assert result["prefill"] == {"stretch": None, "launches": 0, "tokens": 0, "elapsed_us": None, "reason": reason}


def test_a_session_proves_a_stretch_of_a_config_once(session: Session) -> None:
    first, again, other = (session.prepare(config, chooser="draw") for config in ({}, {}, {"threads_per_block": 128}))
    assert stretch_program(session, first) is stretch_program(session, again)
    assert stretch_program(session, first) is not stretch_program(session, other)


@pytest.mark.parametrize(("shared_kib", "stretch"), [(38, 32), (44, 64), (60, 128)])
def test_stretches_are_as_wide_as_the_card_has_room_for(shared_kib: int, stretch: int) -> None:
    small = Session("small", place(shared_kib << 10))
    found = stretch_program(small, small.prepare({}, chooser="draw"))
    assert not isinstance(found, str) and found.facts.batch == stretch


UNFUSED = {"fusion_grouping": ["qkv"]}


@pytest.mark.parametrize(
    ("model", "config", "shared_kib", "reason"),
    [
        ("toy", {}, 227, "there is no program for prefill: model dtype: must be bf16 or fp16 for a batch, but got 'fp32'"),
        ("toy-2L@int8", {}, 227, "there is no program for prefill: batch: must be 1 for quantised weights, but got 32"),
        ("toy-2L", UNFUSED, 227, "there is no program for prefill: fusion_grouping: must be qkv and gate_up among them for prefill"),
        ("small", {}, 30, "there is no program for prefill: smem_bytes_per_block: must be such that one stage of 10240 bytes fits"),
        # The filters' scratch leaves a ring of smaller stages than those that the program for prefill is made with.
        ("toy-2L", {}, 70, "it must stream the weights as the program that decodes, but its stages have 16384 bytes, and those 8192"),
    ],
)
def test_where_there_is_no_prefill_the_reason_is_given(model: str, config: dict[str, Any], shared_kib: int, reason: str) -> None:
    session = Session(model, place(shared_kib << 10))
    candidate = session.prepare(config, chooser="filter")
    assert candidate.program is not None, candidate.rejections
    found = stretch_program(session, candidate)
    assert isinstance(found, str) and reason in found


def test_a_prompt_that_cannot_be_prefilled_is_decoded_all_the_same() -> None:
    session = Session("toy", place())
    prompt = prompt_of(session, LEAST_PROMPT)
    result = generate(session, session.prepare({}, chooser="draw"), prompt_ids=prompt, max_tokens=4, verify=True)
    assert result["prefill"]["launches"] == 0 and "fp32" in result["prefill"]["reason"]
    assert result["matches_eager"] and len(result["generated"]) == 4


def test_stop_tokens_end_what_follows_a_prefilled_prompt(session: Session) -> None:
    candidate, prompt = session.prepare({}, chooser="filter"), prompt_of(session, LEAST_PROMPT)
    whole = generate(session, candidate, prompt_ids=prompt, max_tokens=TOKENS, sampling=DRAWN)["generated"]
    stopping = Session("toy-2L", place())
    end = next(token for token in whole[2:] if whole.index(token) > 1)
    stopping.model = replace(stopping.model, spec=replace(stopping.model.spec, stop_tokens=(end,)))
    result = generate(stopping, stopping.prepare({}, chooser="filter"), prompt_ids=prompt, max_tokens=TOKENS, sampling=DRAWN)
    assert (result["stop_reason"], result["generated"]) == ("stop_token", whole[: whole.index(end)])
