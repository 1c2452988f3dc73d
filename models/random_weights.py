"""Seeded random weights, the same bits on every device, made where and when they are asked for.

Element i of a tensor is a hash of (seed, tensor name, i) in 32-bit integers; its two 16-bit halves are added (a
triangular distribution), and one fp32 product and one rounding to the dtype make the weight. Nothing but integer
operations and correctly rounded IEEE operations is used, so CPU and CUDA agree bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from amk.models.eager import torch_dtype
from amk.models.rope import rope_table
from amk.schedule.model import ModelSpec, QuantisedMatrix, weight_shapes

if TYPE_CHECKING:
    import torch

# Counts what a seed means; a change of any formula below must change it, because results are cached by it.
VERSION = 1

SCORE_STD = 2.3
LOGIT_STD = 2.0
_GAIN_STD = 0.2
_BIAS_STD = 0.3
_SUM_STD = math.sqrt((65536**2 - 1) / 6)  # of the sum of two uniform 16-bit integers
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}  # elements; bounds the temporaries, and fits a CPU's L2


class RandomWeights:
    """Weights of a model that has no checkpoint; every tensor is made anew at each call.

    An untied head is the embedding with its rows permuted, so the next token stands out in the logits as it does
    in a trained model, and a rounding error seldom changes the argmax. Raises `ValueError` for a tensor of 2^31
    elements or more.
    """

    def __init__(self, spec: ModelSpec, config: Mapping[str, Any], seed: int = 0, chunk: int | None = None) -> None:
        self._spec = spec
        self._config = config
        self._seed = seed
        self._chunk = chunk
        self._shapes = weight_shapes(spec)

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        """The named weight in the model's dtype on `device`; KeyError if the model has no such weight."""
        shape = self._shapes[name]
        if name == "head":
            embed = self.tensor("embed", device)
            return embed if self._spec.tied_head else embed[_head_rows(self._spec.vocab, device)]
        return self._generate(name, shape, device)

    def quantised(self, name: str, device: str = "cpu") -> QuantisedMatrix:
        """KeyError: none of these weights is quantised."""
        raise KeyError(name)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        """fp32 [rows, head_dim / 2, 2] of (cos, sin)."""
        return rope_table(self._config, rows, device)

    @property
    def digest(self) -> str:
        text = json.dumps([VERSION, self._seed, self._spec.dtype, dict(self._config)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _generate(self, name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
        import torch

        count = math.prod(shape)
        if count >= 1 << 31:
            raise ValueError(f"a random tensor must have fewer than 2^31 elements, but {name} has {count}")
        dtype = torch_dtype(self._spec.dtype)
        scale, offset = _scale_and_offset(*distribution(self._spec, name))
        out = torch.empty(count, dtype=dtype, device=device)
        step = self._chunk or _CHUNK[torch.device(device).type]
        for start in range(0, count, step):
            piece = out[start : start + step]
            piece.copy_(_centred_sums(self._seed, name, start, piece.numel(), device).add_(offset).to(torch.float32).mul_(scale))
        return out.view(shape)


def distribution(spec: ModelSpec, name: str) -> tuple[float, float]:
    """(mean, standard deviation) of the elements of a weight.

    Attention scores get a standard deviation of SCORE_STD, through q and k or through the gains of their norms. Each
    layer adds about as much to the residual stream as any other, and the embedding keeps a share of it that makes
    its own token's logit about 1.65 times the largest of the others.
    """
    kind = name.partition(".")[2] or name
    if kind.endswith(".bias"):
        return 0.0, _bias_std(spec, kind)
    if kind in ("q_norm", "k_norm"):
        return math.sqrt(SCORE_STD), math.sqrt(SCORE_STD) * _GAIN_STD
    if kind.endswith("norm"):
        return 1.0, _GAIN_STD
    return 0.0, _matrix_std(spec, kind)


def _bias_std(spec: ModelSpec, kind: str) -> float:
    return _BIAS_STD * (_residual_std(spec) if kind in ("o.bias", "down.bias") else 1.0)


def _matrix_std(spec: ModelSpec, kind: str) -> float:
    """Output deviation wanted, over the square root of the inputs times their own deviation."""
    if kind in ("embed", "head"):
        return LOGIT_STD / math.sqrt(spec.hidden)
    if kind in ("q", "k"):
        return (1.0 if spec.qk_norm else math.sqrt(SCORE_STD)) / math.sqrt(spec.hidden)
    if kind == "o":
        return _residual_std(spec) / (0.7 * math.sqrt(spec.q_rows))  # attention averages v down to about 0.7
    if kind == "down":
        return _residual_std(spec) / (0.6 * math.sqrt(spec.intermediate))  # silu(x) y of unit normals has deviation 0.6
    return 1.0 / math.sqrt(spec.hidden)


def _residual_std(spec: ModelSpec) -> float:
    """What one attention or MLP block adds to the residual stream, per element."""
    share = min(0.5, 1.65 * math.sqrt(2 * math.log(spec.vocab) / spec.hidden))
    return _matrix_std(spec, "embed") * math.sqrt((1 / share**2 - 1) / (2 * spec.layers))


def _scale_and_offset(mean: float, std: float) -> tuple[float, int]:
    """A scale that is exact in fp32, and the integer that gives the mean: weight = (sum + offset) * scale."""
    scale = struct.unpack("f", struct.pack("f", std / _SUM_STD))[0]
    return scale, round(mean / scale)


def _centred_sums(seed: int, name: str, start: int, count: int, device: str) -> torch.Tensor:
    """int32 [count]: the sum of both 16-bit halves of each hash, less 65535, for elements start..start+count-1."""
    bits = random_bits(seed, name, start, count, device)
    high = (bits >> 16) & 0xFFFF
    return bits.bitwise_and_(0xFFFF).add_(high).sub_(65535)


def random_bits(seed: int, name: str, start: int, count: int, device: str = "cpu") -> torch.Tensor:
    """int32 [count] of 32 random bits each: the `lowbias32` hash (Wellons) of element * odd + key, both keyed by (seed, name)."""
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    odd, key = int.from_bytes(digest[:4], "little") | 1, int.from_bytes(digest[4:8], "little")
    bits = torch.arange(start, start + count, dtype=torch.int32, device=device).mul_(_signed(odd)).add_(_signed(key))
    bits.bitwise_xor_((bits >> 16) & 0xFFFF).mul_(_signed(0x7FEB352D))
    bits.bitwise_xor_((bits >> 15) & 0x1FFFF).mul_(_signed(0x846CA68B))
    return bits.bitwise_xor_((bits >> 16) & 0xFFFF)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


def _head_rows(vocab: int, device: str) -> torch.Tensor:
    """int64 [vocab]: a fixed permutation of the tokens, an affine map with a factor near the golden ratio."""
    import torch

    factor = next(f for f in range(max(1, round(0.618 * vocab)), 2 * vocab + 2) if math.gcd(f, vocab) == 1)
    return (torch.arange(vocab, dtype=torch.int64, device=device) * factor + vocab // 3) % vocab
