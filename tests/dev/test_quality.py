"""The figures of quality: what they say where the answer is known, and that the text is long enough."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from amk.dev.quality import TEXT, divergence, known_as, log_probabilities, perplexity
from amk.models.registry import describe
from amk.vm.interface import Decoded


def random_log_probabilities(seed: int, rows: int = 300, vocab: int = 11) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def test_a_uniform_guess_has_the_perplexity_of_the_vocabulary() -> None:
    found = torch.full((50, 7), -math.log(7))
    assert perplexity(found, [i % 7 for i in range(51)]) == pytest.approx(7, rel=1e-6)


def test_a_certain_and_right_guess_has_perplexity_one() -> None:
    tokens = [3, 1, 4, 1, 5]
    found = torch.nn.functional.one_hot(torch.tensor(tokens[1:]), 7).float().mul(1e4).log_softmax(-1)
    assert perplexity(found, tokens) == pytest.approx(1)


def test_divergence_is_zero_only_of_equal_distributions() -> None:
    a, b = random_log_probabilities(0), random_log_probabilities(1)
    assert divergence(a, a) == {"kl_mean": 0, "kl_p99": 0, "kl_max": 0, "same_top1": 1}
    found = divergence(a, b)
    assert 0 < found["kl_mean"] < found["kl_p99"] <= found["kl_max"] and found["same_top1"] < 0.3


def test_divergence_of_two_coins_is_what_the_formula_says() -> None:
    fair, loaded = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    assert divergence(fair, loaded)["kl_mean"] == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), rel=1e-6)


def test_a_checkpoint_of_a_known_description_is_known_whatever_it_is_called() -> None:
    assert known_as(replace(describe("smollm2-135m@int8"), name="q@int8")) == "smollm2-135m@int8"
    assert known_as(replace(describe("smollm2-135m"), name="q")) == "smollm2-135m"
    assert known_as(replace(describe("smollm2-135m"), name="q", hidden=640)) is None


class Echo:
    """A machine whose logits name the position and the token that they follow."""

    context = 4096

    def decode(self, tokens: list[int], position: int, *, steps: int | None = None, logits: bool = False) -> Decoded:
        rows = torch.zeros(len(tokens), 5)
        for i, token in enumerate(tokens):
            rows[i, token] = 1 + position + i
        return Decoded(tuple(tokens), rows, None)


def test_the_text_is_read_once_from_left_to_right() -> None:
    tokens = [i * 7 % 5 for i in range(600)]
    found = log_probabilities(Echo(), tokens)  # type: ignore[arg-type]
    assert found.shape == (599, 5) and found.argmax(-1).tolist() == tokens[:-1]
    spread = found.max(-1).values - found.min(-1).values
    assert torch.allclose(spread, torch.arange(1.0, 600.0), atol=1e-3)


def test_the_text_has_at_least_four_thousand_tokens() -> None:
    words = TEXT.read_text(encoding="utf-8").split()
    assert len(words) > 3000 and len(" ".join(words)) > 16_000  # a token of English is about four characters
    assert len(set(words)) > 1000
