"""How a launch chooses its tokens: temperature, the filters of transformers, Gumbel noise from a counter, stop tokens.

Everything here is exact arithmetic that the device repeats bit for bit (isa/device/sampling.cuh): fp32 additions, products and quotients
rounded once each, and integers, whose sums do not depend on an order. So a token follows from logits, `Sampling`, position and row of the
batch alone, on whatever machine, in launches of whatever length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from amk.isa.machine import TILE_ROWS

F32 = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]
Masses = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

STOP_TOKENS = 16  # most of a launch
LEAST_TEMPERATURE, MOST_TEMPERATURE = 1e-4, 1e4
FINITE = np.float32(3.4028234663852886e38)
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.1219444005469057e-4)  # their sum is ln 2; products of the first are exact
LOG2_E = np.float32(1.4426950408889634)
FACULTIES: tuple[Any, ...] = tuple(np.float32(1 / math.factorial(n)) for n in range(7, 1, -1))
ARTANH: tuple[Any, ...] = tuple(np.float32(2 / n) for n in (9, 7, 5, 3))
LEAST_EXPONENT = np.float32(-60.0)  # e to this is less than half of the least mass
ROOT_HALF_BITS = 0x3F3504F3
NEAR_ONE = np.float32(0.29)  # below it log(1 - v) needs no exponent


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy: the largest logit, the lowest token on ties, whatever the filters.

    Filters act in transformers' order, each on what the ones before it kept: the `top_k` largest (0: all; ties with the last are kept),
    the least set of the most likely tokens that has `top_p` of the probability (1: all), tokens that are at least `min_p` times as
    likely as the likeliest (0: all). A launch ends after the first of its own tokens that is among `stop_tokens`.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    @property
    def filters(self) -> bool:
        """Some token may be left out."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def problems(self) -> Iterator[str]:
        """What is wrong with the values, one sentence each."""
        warm = LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE
        if not (self.temperature == 0 or warm):
            allowed = f"0 (greedy) or from {LEAST_TEMPERATURE} to {MOST_TEMPERATURE:.0f}"
            yield f"temperature: must be {allowed}, but got {self.temperature}"
        if not 0 <= self.top_k < 1 << 31:
            yield f"top_k: must be from 0 (all tokens) to {(1 << 31) - 1}, but got {self.top_k}"
        if not 0 < self.top_p <= 1:
            yield f"top_p: must be above 0 and at most 1 (all tokens), but got {self.top_p}"
        if not 0 <= self.min_p <= 1:
            yield f"min_p: must be from 0 (all tokens) to 1, but got {self.min_p}"
        if not 0 <= self.seed < 1 << 64:
            yield f"seed: must be from 0 to {(1 << 64) - 1}, but got {self.seed}"
        if len(self.stop_tokens) > STOP_TOKENS:
            yield f"stop_tokens: must be at most {STOP_TOKENS}, but got {len(self.stop_tokens)}"

    @property
    def removed_share(self) -> int:
        """The probability below which the least likely tokens go, 1 - top_p rounded to fp32, in units of 2^-64."""
        return min(int(float(np.float32(1 - self.top_p)) * 2.0**64), (1 << 64) - 1)

    @property
    def least_score(self) -> np.float32:
        """A score below that of every token that min_p keeps, relative to the best; it only says where to look."""
        return np.float32(math.log(self.min_p) - 0.01) if self.min_p > 0 else -FINITE


GREEDY = Sampling()


# ---- noise


def philox(key: tuple[int, int], counter: tuple[Any, Any, Any, Any]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 (Salmon et al. 2011): four random words for each counter; the counter's words may be arrays."""
    k = [np.uint64(word) for word in key]
    c = [np.asarray(word, dtype=np.uint64) for word in counter]
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> half) ^ c[1] ^ k[0], b & low, (a >> half) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    first, second, third, fourth = (word.astype(np.uint32) for word in np.broadcast_arrays(*c))
    return first, second, third, fourth


def gumbel(seed: int, position: int, sequence: int, rows: npt.NDArray[np.int64]) -> F32:
    """Noise of the tokens `rows` at a position of a sequence (row of the batch): one variate a token, from nothing else."""
    words = philox((seed & 0xFFFFFFFF, seed >> 32), (rows >> 2, position, sequence, 0))
    return gumbel_of(np.choose(rows & 3, words).astype(np.uint32))


def gumbel_of(word: Words) -> F32:
    """-log(-log(1 - v)) for v = (word + 1/2) / 2^32, in fp32: resolution is finest where the noise is largest."""
    v = np.minimum((word.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32), np.float32(1 - 2.0**-24))
    f, k = _reduced(np.float32(1) - v)
    small = v < NEAR_ONE
    exponential = -_logarithm(np.where(small, -v, f), np.where(small, np.float32(0), k))
    return -_logarithm(*_reduced(exponential))


def _reduced(x: F32) -> tuple[F32, F32]:
    """(f, k) with x = (1 + f) 2^k and 1 + f from the root of 1/2 to the root of 2."""
    bits = x.view(np.int32)
    k = (bits - np.int32(ROOT_HALF_BITS)) >> np.int32(23)
    return (bits - (k << np.int32(23))).view(np.float32) - np.float32(1), k.astype(np.float32)


def _logarithm(f: F32, k: F32) -> F32:
    """log((1 + f) 2^k) by the series of artanh at f / (2 + f)."""
    s = f / (np.float32(2) + f)
    z = s * s
    series = ARTANH[0]
    for term in ARTANH[1:]:
        series = series * z + term
    result: F32 = k * LN2_HIGH + (k * LN2_LOW + ((s + s) + s * (z * series)))
    return result


# ---- masses


def _exponential(d: F32) -> tuple[F32, npt.NDArray[np.int64]]:
    """(m, n) with e^d = m 2^-n for d from LEAST_EXPONENT to 0; m is between the roots of 1/2 and 2."""
    n = np.rint(d * LOG2_E)
    r = (d - n * LN2_HIGH) - n * LN2_LOW
    series = FACULTIES[0]
    for term in FACULTIES[1:]:
        series = series * r + term
    return ((r * r) * series + r) + np.float32(1), -n.astype(np.int64)


def exponential(d: F32) -> F32:
    """e^d in fp32 for d up to 0; 0 below LEAST_EXPONENT."""
    m, n = _exponential(np.maximum(d, LEAST_EXPONENT))
    return np.where(d < LEAST_EXPONENT, np.float32(0), np.ldexp(m, -n)).astype(np.float32)


def mass(d: F32, times: F32 | None = None) -> Masses:
    """e^d in units of 2^-41, rounded down, `times` (from 0 to 16) if given: an integer, so that sums are the same in every order."""
    m, n = _exponential(np.maximum(d, LEAST_EXPONENT))
    units = (m if times is None else m * times) * np.float32(2.0**24)
    return np.where(d < LEAST_EXPONENT, np.uint64(0), (units.astype(np.uint64) << np.uint64(17)) >> n.astype(np.uint64))


def tile_masses(scores: F32) -> tuple[F32, F32]:
    """Of each tile of 16 scores (the last one filled up with nothing) the largest, and the sum of e^(score - largest), added in pairs."""
    padded = np.full(-(-len(scores) // TILE_ROWS) * TILE_ROWS, -FINITE, dtype=np.float32)
    padded[: len(scores)] = scores
    tiles = padded.reshape(-1, TILE_ROWS)
    largest = tiles.max(axis=1)
    with np.errstate(over="ignore"):
        sums = exponential(tiles - largest[:, None])
    sums.reshape(-1)[len(scores) :] = 0
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return largest, sums[:, 0]


def total_mass(scores: F32) -> int:
    """The mass of all tokens, by tiles: each product of a tile's sum with its largest score is rounded to fp32."""
    largest, sums = tile_masses(scores)
    with np.errstate(over="ignore"):
        return int(mass(largest - scores.max(), sums).sum())


# ---- choosing


def scores_of(logits: F32, temperature: float) -> F32:
    """Logits over the temperature: finite, and without a negative zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        warm = logits / np.float32(temperature) if temperature > 0 else logits
    return np.fmin(np.fmax(warm, -FINITE), FINITE) + np.float32(0)


def perturbed(scores: F32, sampling: Sampling, position: int, sequence: int, first: int) -> F32:
    """Scores of the tokens from `first` on with their noise: the largest is the draw (Gumbel-max)."""
    if sampling.temperature == 0:
        return scores
    rows = np.arange(first, first + len(scores), dtype=np.int64)
    return scores + gumbel(sampling.seed, position, sequence, rows)


def kept_tokens(scores: F32, sampling: Sampling) -> Mask:
    """Which tokens the filters keep, given the scores of the whole vocabulary.

    The same set as transformers': top-k by value; top-p by order of (value, token), so of tokens that are equally likely the lowest go
    first. Where masses decide, transformers rounds each probability and their running sum to fp32; a token whose sum comes within such an
    error of 1 - top_p (2^-23) may fall on the other side.
    """
    kept = np.ones(len(scores), dtype=bool)
    if not sampling.filters:
        return kept
    with np.errstate(over="ignore"):
        below = scores - scores.max()
    some = 0 < sampling.top_k < len(scores)
    if some:
        kept = scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k]
    if sampling.top_p < 1:
        masses = np.where(kept, mass(below), np.uint64(0))
        total = int(masses.sum()) if some else total_mass(scores)
        kept &= _likeliest(scores, masses, total - (total * sampling.removed_share >> 64))
    if sampling.min_p > 0:
        kept &= exponential(below) >= np.float32(sampling.min_p)
    return kept


def _likeliest(scores: F32, masses: Masses, stays: int) -> Mask:
    """Tokens before which, from the likeliest on, lies less mass than stays."""
    order = np.argsort(scores, kind="stable")[::-1]
    before = np.cumsum(masses[order]) - masses[order]
    result = np.zeros(len(scores), dtype=bool)
    result[order] = before < np.uint64(stays)
    return result


def best_token(perturbed_scores: F32, kept: Mask) -> int:
    """The kept token with the largest perturbed score, the lowest on ties."""
    return int(np.flatnonzero(kept)[np.argmax(perturbed_scores[kept])])
