"""Tokens as they are told: in launches that suit who listens, and as text that is whole at every moment."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from amk.eval.generation import TOKENS_A_LAUNCH, TOKENS_BETWEEN_TEXTS, Hearer, Spoken, launch_tokens, tie_gaps
from amk.eval.tolerance import TIE


def byte_tokenizer() -> Any:
    """One token a byte: every character beyond ASCII is made of several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"))


def test_near_ties_are_by_what_rounding_usually_moves_where_it_happened_to_move_little() -> None:
    """As the oracle has it: `generate --verify` must excuse what a correct program may do."""
    logits, expected = torch.randn(3, 50), [0.01, 0.02, 0.04]
    usual = math.sqrt(sum(e * e for e in expected) / 3)
    for row, gap, own in zip(logits, tie_gaps(logits, expected), expected, strict=True):
        assert gap == pytest.approx(TIE * max(own, usual) * float(row.std()), rel=1e-4)


@given(TEXT)
@example("né 漢字 👩‍🔬 end")
def test_pieces_are_whole_characters_and_together_the_text(text: str) -> None:
    spoken = Spoken(TOKENIZER)
    pieces = [spoken.hear(token) for token in TOKENIZER.encode(text).ids]
    assert "".join(pieces) == spoken.text == text
    assert all("\ufffd" not in piece for piece in pieces)


@given(TEXT, st.integers(0, 40))
def test_text_that_breaks_off_is_a_beginning(text: str, count: int) -> None:
    spoken = Spoken(TOKENIZER)
    for token in TOKENIZER.encode(text).ids[:count]:
        spoken.hear(token)
    assert text.startswith(spoken.text)


def test_without_a_tokenizer_nothing_is_said() -> None:
    assert Spoken(None).hear(7) == ""


@pytest.mark.parametrize(
    ("quick", "texts", "expected"),
    [(False, False, 1), (False, True, 1), (True, False, TOKENS_A_LAUNCH), (True, True, TOKENS_BETWEEN_TEXTS)],
)
def test_launches_are_long_on_the_card_and_shorter_where_texts_end_them(quick: bool, texts: bool, expected: int) -> None:
    assert launch_tokens(quick, texts) == expected


@pytest.mark.parametrize(
    ("stop_tokens", "stop", "reason", "length"), [((101,), (), "stop_token", 4), ((), ("lo",), "stop_text", 5), ((), (), "max_tokens", 6)]
)
def test_a_hearer_takes_nothing_after_the_end(stop_tokens: tuple[int, ...], stop: tuple[str, ...], reason: str, length: int) -> None:
    told: list[tuple[int, int, str]] = []
    tokens = TOKENIZER.encode("hello, world").ids
    ends = tuple(tokens[4] for _ in stop_tokens)
    hearer = Hearer(ends, stop, 6, TOKENIZER, lambda *token: told.append(token))
    hearer.hear(7, overruled=True)
    for token in tokens:
        hearer.hear(token)
    assert (hearer.reason, hearer.tokens) == (reason, tokens[:length])
    assert [token for _, token, _ in told] == hearer.tokens
