"""Draws on the card: bit for bit those of the reference machine's arithmetic, whatever the launch; stop tokens; tokens while it runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from amk.isa.sampling import Sampling, best_token, kept_tokens, perturbed, scores_of
from amk.models.model import Model
from amk.schedule.compile import lower
from amk.schedule.settings import Chooser
from amk.tests.gpu.machines import card, config_of, llama, named, proven
from amk.vm.cuda import CudaVM

pytestmark = pytest.mark.cuda
MODEL = llama("sampled")
TOKENS = [3, 1, 4, 1, 5]
DRAWS, BINS = 20_000, 50
CHOICES = [
    Sampling(temperature=0.0, seed=1),
    Sampling(temperature=1.0, seed=1 << 40),
    Sampling(temperature=1.0, top_k=50, seed=3),
    Sampling(temperature=0.7, top_p=0.9, seed=4),
    Sampling(temperature=1.5, min_p=0.05, seed=5),
    Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=6),
    Sampling(temperature=3.0, top_k=1000, top_p=0.99, seed=7),
    Sampling(temperature=1.0, top_p=0.01, seed=8),
    Sampling(temperature=1.0, top_k=1, seed=9),
]


def machine(model: Model, chooser: Chooser, config: dict[str, Any] | None = None, context: int = 1024, **options: Any) -> CudaVM:
    program = lower(model.spec, config_of(config or {}), card(), context=context, chooser=chooser)
    return CudaVM(proven(program), model.weights, arch=card().arch, **options)


def chooser_of(sampling: Sampling) -> Chooser:
    return "filter" if sampling.filters else "draw"


def expected_tokens(logits: Any, sampling: Sampling, position: int) -> tuple[int, ...]:
    """The tokens that logits [steps, vocab] give from a position on."""
    found = []
    for step, row in enumerate(logits.numpy()):
        scores = scores_of(row, sampling.temperature)
        found.append(best_token(perturbed(scores, sampling, position + step, 0, 0), kept_tokens(scores, sampling)))
    return tuple(found)


@pytest.mark.parametrize("sampling", CHOICES, ids=str)
@pytest.mark.parametrize("threads", [128, 256])
def test_the_card_draws_what_its_logits_seed_and_positions_say(sampling: Sampling, threads: int) -> None:
    for chooser in dict.fromkeys((chooser_of(sampling), "filter")):
        vm = machine(MODEL, chooser, {"threads_per_block": threads})  # type: ignore[arg-type]
        decoded = vm.decode(TOKENS, 7, steps=200, logits=True, sampling=sampling)
        assert decoded.tokens == expected_tokens(decoded.logits, sampling, 7)
        vm.close()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_draw_alike(dtype: str) -> None:
    sampling = CHOICES[5]
    vm = machine(llama("sampled", dtype), "filter")
    decoded = vm.decode(TOKENS, 0, steps=64, logits=True, sampling=sampling)
    assert decoded.tokens == expected_tokens(decoded.logits, sampling, 0)


@pytest.mark.parametrize("sampling", CHOICES[:8], ids=str)
def test_a_large_vocabulary_is_sampled_alike(sampling: Sampling, record_property: Any) -> None:
    """Records what a token of 64 takes, beside the greedy program's in the same process."""
    times = {}
    for chooser in dict.fromkeys(("greedy", chooser_of(sampling), "filter")):
        vm = machine(_one_b(), chooser)  # type: ignore[arg-type]
        how = sampling if chooser != "greedy" else Sampling()
        decoded = vm.decode(TOKENS, 0, steps=24, logits=True, sampling=how)
        assert decoded.tokens == expected_tokens(decoded.logits, how, 0)
        elapsed = [vm.decode(TOKENS, 0, steps=64, sampling=how).elapsed_us for _ in range(8)]
        times[chooser] = min(us for us in elapsed if us is not None) / 64
        vm.close()
    for chooser, us in times.items():
        record_property(f"us_per_token_{chooser}", us)


def _one_b() -> Model:
    return named("llama-3.2-1b-shape")


@pytest.mark.parametrize("sampling", [CHOICES[1], CHOICES[5]], ids=str)
def test_launches_of_1_and_of_64_tokens_draw_the_same(sampling: Sampling) -> None:
    vm = machine(MODEL, chooser_of(sampling))
    together = vm.decode(TOKENS, 0, steps=64, sampling=sampling).tokens
    apart, token = [], TOKENS[0]
    for position in range(64):
        token = vm.decode([TOKENS[position] if position < len(TOKENS) else token], position, sampling=sampling).tokens[0]
        apart.append(token)
    assert tuple(apart) == together


@pytest.mark.parametrize("sampling", [CHOICES[1], CHOICES[2], CHOICES[3]], ids=str)
def test_draws_have_their_probabilities(sampling: Sampling) -> None:
    """Chi-square over 20,000 draws: where a token lies in its own distribution, at random within its probability, is uniform."""
    from scipy.stats import chisquare

    rng, vm, places = np.random.default_rng(0), machine(MODEL, chooser_of(sampling)), []
    while len(places) < DRAWS:
        chosen = replace(sampling, seed=int(rng.integers(1 << 62)))
        tokens = rng.integers(MODEL.spec.vocab, size=500).tolist()
        decoded = vm.decode(tokens, 0, logits=True, sampling=chosen)
        for row, token in zip(decoded.logits.numpy(), decoded.tokens, strict=True):
            scores = scores_of(row, chosen.temperature)
            weights = np.where(kept_tokens(scores, chosen), np.exp(scores.astype(np.float64) - scores.max()), 0)
            assert weights[token] > 0
            places.append((weights[:token].sum() + rng.random() * weights[token]) / weights.sum())
    counts, _ = np.histogram(places[:DRAWS], BINS, (0, 1))
    assert chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("macros", [{}, {"STRESS": 1}], ids=str)
@pytest.mark.parametrize("sampling", [CHOICES[0], CHOICES[1], CHOICES[5]], ids=str)
def test_a_stop_token_ends_the_launch_and_the_next_goes_on(sampling: Sampling, macros: dict[str, int], record_property: Any) -> None:
    vm = machine(MODEL, chooser_of(sampling), macros=macros)
    whole = vm.decode(TOKENS, 0, steps=300, sampling=sampling)
    for index in (4, 5, 17, 60, 150, 298, 299):
        stop = replace(sampling, stop_tokens=(MODEL.spec.vocab - 1, whole.tokens[index]))
        first = next(i for i, token in enumerate(whole.tokens) if i >= len(TOKENS) - 1 and token in stop.stop_tokens)
        ended = vm.decode(TOKENS, 0, steps=300, logits=True, sampling=stop)
        assert ended.tokens == whole.tokens[: first + 1]
        assert ended.logits.isfinite().all() and len(ended.logits) == first + 1
        record_property(f"us_{first + 1}_of_300", ended.elapsed_us)
        if first + 1 < 300:  # rows of every token that was made are in the cache
            rest = vm.decode([whole.tokens[first]], first + 1, steps=299 - first, sampling=sampling)
            assert rest.tokens == whole.tokens[first + 1 :]
    record_property("us_300_of_300", whole.elapsed_us)


def test_a_launch_that_stops_early_is_shorter() -> None:
    vm = machine(_one_b(), "draw", max_steps=512)
    whole = vm.decode(TOKENS, 0, steps=300)
    ended = vm.decode(TOKENS, 0, steps=300, sampling=Sampling(stop_tokens=(whole.tokens[len(TOKENS) - 1],)))
    assert ended.tokens == whole.tokens[: len(TOKENS)]
    assert ended.elapsed_us is not None and whole.elapsed_us is not None
    assert ended.elapsed_us < whole.elapsed_us / 3  # the device's own times, of launches that differ by a factor of ten and more
    vm.close()


@pytest.mark.parametrize("chooser", ["greedy", "draw", "filter"])
def test_tokens_are_heard_while_the_launch_runs(chooser: Chooser) -> None:
    vm, heard, busy = machine(_one_b(), chooser), [], []

    def hear(step: int, token: int) -> None:
        heard.append((step, token))
        busy.append(not torch.cuda.current_stream().query())

    tokens = vm.decode(TOKENS, 0, steps=256, on_token=hear).tokens
    assert heard == list(enumerate(tokens))
    assert sum(busy) > 128
    vm.close()
