"""Tokens as they are told: in launches that suit who listens, and as text that is whole at every moment."""

from __future__ import annotations

from itertools import islice
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from amk.eval.generation import STREAMED_TOKENS, TOKENS_A_LAUNCH, Spoken, launch_tokens


def byte_tokenizer() -> Any:
    """One token a byte: every character beyond ASCII is made of several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: number for number, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


TOKENIZER = byte_tokenizer()
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"))


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
    ("quick", "streamed", "expected"),
    [
        (False, False, [1, 1, 1]),
        (False, True, [1, 1, 1]),
        (True, False, [TOKENS_A_LAUNCH] * 3),
        (True, True, [1, STREAMED_TOKENS, STREAMED_TOKENS]),
    ],
)
def test_launches_are_long_on_the_card_and_short_for_a_listener(quick: bool, streamed: bool, expected: list[int]) -> None:
    assert list(islice(launch_tokens(quick, streamed), 3)) == expected
