"""How tokens are chosen: the sets that transformers keeps, the distribution, and tokens that depend on seed and position alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amk.isa.filter_head import rows_of, tile_packets
from amk.isa.sampling import (
    GREEDY,
    LEAST_EXPONENT,
    Sampling,
    best_token,
    exponential,
    gumbel,
    gumbel_of,
    kept_tokens,
    mass,
    perturbed,
    philox,
    scores_of,
)
from amk.schedule.validate import ValidProgram
from amk.vm.interface import LaunchFailed
from amk.vm.order import legal_order
from amk.vm.reference import ReferenceVM, UnprovenVM
from amk.vm.scheduler import ORDERS, Order, adversarial

CASES, PARTS = 1000, 10
DRAWS = 20_000
FP32_EDGE = 2.0**-23
FILTERS = Sampling(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=5)
CHOICES = {"draw": Sampling(temperature=1.5, seed=3), "filter": FILTERS}


# ---- noise


@pytest.mark.parametrize(
    ("key", "counter", "words"),  # Random123's kat_vectors for philox4x32-10
    [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(key: Any, counter: Any, words: Any) -> None:
    assert tuple(int(word) for word in philox(key, counter)) == words


def test_noise_is_gumbels_to_fp32_where_it_is_large() -> None:
    words = np.concatenate([np.arange(1 << 14), np.random.default_rng(0).integers(0, 1 << 32, 1 << 18)]).astype(np.uint32)
    v = (words.astype(np.float64) + 0.5) / 2**32
    likely = v < 0.9
    exact = -np.log(-np.log1p(-v))
    assert np.abs(gumbel_of(words) - exact)[likely].max() < 3e-6
    assert np.isfinite(gumbel_of(np.array([0, 2**32 - 1], dtype=np.uint32))).all()


def test_noise_belongs_to_seed_position_sequence_and_token() -> None:
    rows = np.arange(300)
    base = gumbel(1, 2, 0, rows)
    for other in (gumbel(2, 2, 0, rows), gumbel(1, 3, 0, rows), gumbel(1, 2, 1, rows), gumbel(1 + (1 << 32), 2, 0, rows)):
        assert (base != other).mean() > 0.99
    np.testing.assert_array_equal(base[37:99], gumbel(1, 2, 0, rows[37:99]))
    assert len(np.unique(base)) == len(base)


def test_exponentials_are_fp32_and_masses_are_theirs() -> None:
    d = np.linspace(float(LEAST_EXPONENT), 0, 100_001).astype(np.float32)
    exact = np.exp(d.astype(np.float64))
    assert np.abs(exponential(d) / exact - 1).max() < 2**-23
    assert np.abs(mass(d) / 2.0**41 - exact).max() < 2**-23
    assert mass(np.array([0, -61, -np.inf], dtype=np.float32)).tolist() == [1 << 41, 0, 0]


# ---- the filters


def random_case(number: int) -> tuple[Any, Sampling]:
    """Logits and filters: with ties, one token, more tokens than there are, probabilities next to 0 and 1."""
    rng = np.random.default_rng(number)
    vocab = int(rng.choice([32, 100, 1003, 5000, 50_000]))
    logits = (rng.standard_normal(vocab) * rng.choice([0.5, 1, 3, 6])).astype(np.float32)
    if number % 4 == 0:
        logits = np.round(logits * 2) / 2
    elif number % 4 == 1:
        logits = torch.from_numpy(logits).bfloat16().float().numpy()
    sampling = Sampling(
        temperature=float(rng.choice([0.1, 0.5, 0.7, 1.0, 1.3, 5])),
        top_k=int(rng.choice([0, 0, 1, 2, 20, 50, 1000, vocab - 1, vocab, vocab + 5])),
        top_p=float(rng.choice([1.0, 1.0, 1e-8, 0.01, 0.1, 0.5, 0.9, 0.95, 0.99, 0.9999])),
        min_p=float(rng.choice([0, 0, 0.01, 0.05, 0.1, 0.5, 1.0])),
    )
    return logits.astype(np.float32), sampling


def kept_by_transformers(logits: Any, sampling: Sampling) -> Any:
    """The processors that generate() makes of these values, in its order."""
    from transformers import LogitsProcessorList
    from transformers.generation import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    processors = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)] if sampling.temperature != 1 else [])
    processors += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    processors += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    processors.append(MinPLogitsWarper(sampling.min_p))
    scores = processors(torch.zeros(1, 1, dtype=torch.long), torch.from_numpy(logits.copy())[None])
    return (scores[0] > -torch.inf).numpy()


@pytest.fixture
def stable_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.sort promises no order of equal values, and on some CPUs keeps none: here it keeps theirs, as it does on cards."""
    own = torch.sort
    monkeypatch.setattr(torch, "sort", lambda x, dim=-1, descending=False: own(x, dim=dim, descending=descending, stable=True))


def running_probability(scores: Any, sampling: Sampling) -> Any:
    """In float64, of each token those of it and of all that are less likely, after top-k."""
    kept = kept_tokens(scores, replace(sampling, top_p=1.0, min_p=0.0))
    weights = np.where(kept, np.exp(scores.astype(np.float64) - scores.max()), 0)
    order = np.argsort(scores, kind="stable")
    result = np.empty(len(scores))
    result[order] = np.cumsum(weights[order]) / weights.sum()
    return result


@pytest.mark.parametrize("part", range(PARTS))
def test_the_kept_set_is_transformers(part: int, stable_sort: None) -> None:
    """Where masses decide both round to fp32: a token whose running probability is that close to 1 - top_p may differ, in 1 case of 100."""
    at_the_edge = 0
    for number in range(part * CASES // PARTS, (part + 1) * CASES // PARTS):
        logits, sampling = random_case(number)
        scores = scores_of(logits, sampling.temperature)
        other = kept_tokens(scores, sampling) != kept_by_transformers(logits, sampling)
        edge = np.abs(running_probability(scores, sampling)[other] - (1 - sampling.top_p)) < FP32_EDGE if other.any() else other[:0]
        assert edge.all(), f"case {number}: {sampling} differs at {np.flatnonzero(other)}"
        at_the_edge += len(edge) > 0
    assert at_the_edge <= 1


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_the_best_token_is_always_kept(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal(int(rng.integers(1, 200))).astype(np.float32)
    sampling = Sampling(1.0, int(rng.integers(1, 9)), float(rng.uniform(1e-9, 1)), float(rng.uniform()))
    assert kept_tokens(scores, sampling)[len(scores) - 1 - np.argmax(scores[::-1])]


def test_tile_packets_hold_every_row() -> None:
    scores, noisy = np.random.default_rng(0).standard_normal((2, 101)).astype(np.float32)
    for found, given_ in zip(rows_of(tile_packets(scores, noisy, 0), 101), (scores, noisy), strict=True):
        np.testing.assert_array_equal(found, given_)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.7, seed=11), Sampling(1.3, top_k=12, top_p=0.9, min_p=0.02, seed=12)])
def test_draws_have_the_probabilities_of_the_kept_tokens(sampling: Sampling) -> None:
    """Chi-square over 20,000 draws; a right sampler fails with a chance of 1 in 10,000, and the seeds are fixed."""
    from scipy.stats import chisquare

    scores = scores_of(np.random.default_rng(1).standard_normal(40).astype(np.float32) * np.float32(1.5), sampling.temperature)
    kept = kept_tokens(scores, sampling)
    rows = np.arange(len(scores))
    draws = np.array([best_token(scores + gumbel(sampling.seed, position, 0, rows), kept) for position in range(DRAWS)])
    weights = np.where(kept, np.exp(scores.astype(np.float64) - scores.max()), 0)
    counts, expected = np.bincount(draws, minlength=len(scores)), DRAWS * weights / weights.sum()
    assert (counts[~kept] == 0).all()
    rare = expected < 10
    pooled = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected)]
    pooled = [x[:-1] if pooled[1][-1] == 0 else x for x in pooled]
    assert chisquare(*pooled).pvalue > 1e-4


def test_greedy_has_no_noise() -> None:
    scores = np.zeros(5, dtype=np.float32)
    assert perturbed(scores, GREEDY, 3, 0, 0) is scores


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature: must be 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"top_k": -1}, "top_k: must be from 0"),
        ({"top_p": 0.0}, "top_p: must be above 0 and at most 1"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.5}, "min_p: must be from 0"),
        ({"min_p": 2}, "min_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 64}, "seed"),
        ({"stop_tokens": tuple(range(17))}, "stop_tokens: must be at most 16, but got 17"),
    ],
)
def test_values_that_mean_nothing_are_named(values: dict[str, Any], named: str) -> None:
    (problem,) = Sampling(**values).problems()
    assert problem.startswith(named)


# ---- programs that draw


@pytest.fixture(scope="module")
def spec(make_spec: Any) -> Any:
    return make_spec("bf16", vocab=301)


@pytest.fixture(scope="module", params=["draw", "filter"])
def chooser(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def proven(spec: Any, chooser: Any, make_proven: Any) -> ValidProgram:
    result: ValidProgram = make_proven(spec, 3, chooser, kv_block=16, kv_splits=2, threads_per_block=128)
    return result


@pytest.fixture(scope="module")
def machine(spec: Any, proven: ValidProgram, make_source: Any) -> Any:
    """machine(order): the proven program on the reference machine."""
    source = make_source(spec)
    return lambda order=None: ReferenceVM(proven, source, order=order)


def test_temperature_zero_is_the_greedy_program(spec: Any, machine: Any, make_source: Any, make_proven: Any) -> None:
    greedy = ReferenceVM(make_proven(spec), make_source(spec)).decode([1, 2], 0, steps=30)
    assert machine().decode([1, 2], 0, steps=30, sampling=replace(FILTERS, temperature=0)).tokens == greedy.tokens


def test_tokens_are_the_best_of_those_kept_by_their_own_logits(chooser: str, machine: Any) -> None:
    sampling = CHOICES[chooser]
    decoded = machine().decode([1, 2], 0, steps=40, logits=True, sampling=sampling)
    for position, (logits, token) in enumerate(zip(decoded.logits.numpy(), decoded.tokens, strict=True)):
        scores = scores_of(logits, sampling.temperature)
        assert token == best_token(perturbed(scores, sampling, position, 0, 0), kept_tokens(scores, sampling))
    assert len(set(decoded.tokens)) > 10


def test_tokens_do_not_depend_on_tokens_a_launch(chooser: str, machine: Any) -> None:
    whole = machine().decode([1, 2], 0, steps=64, sampling=CHOICES[chooser]).tokens
    vm, tokens = machine(), [1]
    for position in range(64):
        (token,) = vm.decode(tokens[-1:], position, sampling=CHOICES[chooser]).tokens
        tokens.append(2 if position == 0 else token)
    assert tuple(tokens[2:]) == whole[1:]


@pytest.mark.parametrize("seed", range(len(ORDERS)))
def test_every_order_draws_and_stops_alike(seed: int, chooser: str, machine: Any) -> None:
    sampling = CHOICES[chooser]
    whole = machine(Order("sequential")).decode([5, 6], 0, steps=12, sampling=sampling)
    stop = replace(sampling, stop_tokens=(whole.tokens[7],))
    length = whole.tokens.index(whole.tokens[7], 1) + 1
    vm = machine(adversarial(seed))
    assert vm.decode([5, 6], 0, steps=12, sampling=stop).tokens == whole.tokens[:length]
    after = vm.decode([whole.tokens[length - 1]], length, steps=12 - length, sampling=sampling)  # the KV rows are all there
    assert after.tokens == whole.tokens[length:]


def test_a_stop_token_in_the_prompt_or_overruled_by_it_stops_nothing(chooser: str, machine: Any) -> None:
    sampling = CHOICES[chooser]
    free = machine().decode([1, 2, 3, 4], 0, steps=8, sampling=sampling).tokens
    overruled = next(token for token in free[:3] if token not in free[3:])
    of_the_prompt = next(token for token in (1, 2, 3, 4) if token not in free[3:])
    stop = replace(sampling, stop_tokens=(of_the_prompt, overruled))
    assert machine().decode([1, 2, 3, 4], 0, steps=8, sampling=stop).tokens == free


def test_an_end_with_the_last_token_is_whole(chooser: str, machine: Any) -> None:
    sampling, told = CHOICES[chooser], []
    tokens = machine().decode([1], 0, steps=5, sampling=sampling).tokens
    stop = replace(sampling, stop_tokens=tokens[-1:])
    decoded = machine().decode([1], 0, steps=5, logits=True, sampling=stop, on_token=lambda *token: told.append(token))
    assert decoded.tokens == tokens[: len(decoded.tokens)] and decoded.tokens[-1] == tokens[-1]
    assert len(decoded.logits) == len(decoded.tokens)
    assert told == list(enumerate(decoded.tokens))


def test_a_deadlock_is_still_one_in_a_launch_with_stop_tokens(spec: Any, proven: ValidProgram, make_source: Any) -> None:
    program = proven.program
    (sm, index), task = next(
        ((sm, i), task) for sm, queue in enumerate(program.queues) for i, task in enumerate(queue) if "in_tag" in vars(task)
    )
    queue = (*program.queues[sm][:index], replace(task, in_tag=task.in_tag + 1), *program.queues[sm][index + 1 :])
    wrong = replace(program, queues=(*program.queues[:sm], queue, *program.queues[sm + 1 :]))
    vm = UnprovenVM(wrong, make_source(spec), order=Order("sequential"))
    with pytest.raises(LaunchFailed, match="waits for"):
        vm.decode([1], 0, steps=3, sampling=Sampling(stop_tokens=(1,)))


def test_a_program_refuses_what_it_was_not_compiled_for(spec: Any, make_source: Any, make_proven: Any) -> None:
    greedy = ReferenceVM(make_proven(spec), make_source(spec))
    for sampling in (Sampling(temperature=1.0), Sampling(stop_tokens=(3,))):
        with pytest.raises(ValueError, match="must be greedy and without stop tokens"):
            greedy.decode([1], 0, sampling=sampling)
    draws = ReferenceVM(make_proven(spec, chooser="draw"), make_source(spec))
    with pytest.raises(ValueError, match="no filters"):
        draws.decode([1], 0, sampling=FILTERS)
    with pytest.raises(ValueError, match="top_p"):
        draws.decode([1], 0, sampling=Sampling(1.0, top_p=0))


def test_merged_slices_of_a_filter_head_publish_what_the_slices_do(spec: Any, make_program: Any) -> None:
    program = make_program(spec, chooser="filter")
    heads = [task for task in legal_order(program) if task.stem == "filter_head"]
    slices = [task for queue in program.queues for task in queue if task.stem == "filter_head"]
    assert len(heads) == 1 < len(slices)
    published = sorted((a.start, a.stop) for task in slices for a in task.writes(program.machine, 0))
    assert published == [(a.start, a.stop) for a in heads[0].writes(program.machine, 0)]
