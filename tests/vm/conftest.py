"""Small models, their weights, and a plain decoder that shares no code with the machine."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec, weight_shapes
from amk.schedule.program import Program
from amk.schedule.settings import Chooser
from amk.schedule.targets import small_target
from amk.schedule.validate import ValidProgram, validate

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class RandomSource:
    """Gaussian weights; q and k are scaled so that attention scores have a standard deviation of 2 or more."""

    def __init__(self, spec: ModelSpec, seed: int = 0) -> None:
        self.head_dim = spec.head_dim
        generator = torch.Generator().manual_seed(seed)
        self.weights: dict[str, torch.Tensor] = {}
        for name, shape in weight_shapes(spec).items():
            values = torch.randn(shape, generator=generator)
            if "norm" in name:
                values = 1 + 0.2 * values
            elif len(shape) == 2:
                values *= (2.0 if name.endswith((".q", ".k")) else 1.0) / math.sqrt(shape[1])
            self.weights[name] = values.to(DTYPES[spec.dtype])

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        return self.weights[name].to(device)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        frequencies = 1 / 10_000 ** (torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim)
        angles = torch.arange(rows, dtype=torch.float64)[:, None] * frequencies
        return torch.stack([angles.cos(), angles.sin()], -1).float().to(device)


class PlainDecoder:
    """The model's definition in float64 over a whole sequence.

    `logits` [tokens, vocab]; `keys` and `values` of each layer [heads, tokens, head_dim], K after norm and RoPE.
    """

    def __init__(self, spec: ModelSpec, source: RandomSource, tokens: list[int]) -> None:
        self.spec = spec
        self.weight = lambda name: source.tensor(name).double()
        self.angles = source.rope_table(len(tokens)).double()
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        x = self.weight("embed")[tokens]
        for layer in range(spec.layers):
            x = x + self._attention(f"L{layer}.", self._norm(x, f"L{layer}.input_norm"), spec.windows[layer])
            x = x + self._mlp(f"L{layer}.", self._norm(x, f"L{layer}.post_norm"))
        self.logits = self._norm(x, "final_norm") @ self.weight("head").T

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + self.spec.rms_eps).sqrt() * self.weight(name)

    def _linear(self, x: torch.Tensor, name: str, bias: bool) -> torch.Tensor:
        y = x @ self.weight(name).T
        return y + self.weight(f"{name}.bias") if bias else y

    def _heads(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self._linear(x, name, self.spec.qkv_bias).unflatten(1, (-1, self.spec.head_dim)).transpose(0, 1)

    def _rotated(self, x: torch.Tensor) -> torch.Tensor:
        half = self.spec.head_dim // 2
        low, high, cos, sin = x[..., :half], x[..., half:], self.angles[..., 0], self.angles[..., 1]
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)

    def _attention(self, at: str, x: torch.Tensor, window: int | None) -> torch.Tensor:
        q, k, v = (self._heads(x, at + name) for name in "qkv")
        if self.spec.qk_norm:
            q, k = self._norm(q, at + "q_norm"), self._norm(k, at + "k_norm")
        q, k = self._rotated(q), self._rotated(k)
        self.keys.append(k)
        self.values.append(v)
        row = torch.arange(len(x))
        age = row[:, None] - row[None, :]
        visible = (age >= 0) & (age < (window or len(x)))
        k, v = (heads.repeat_interleave(self.spec.group, 0) for heads in (k, v))
        scores = (q @ k.transpose(1, 2) / math.sqrt(self.spec.head_dim)).masked_fill(~visible, -math.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        return self._linear(out, at + "o", self.spec.o_bias)

    def _mlp(self, at: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = (self._linear(x, at + name, self.spec.mlp_bias) for name in ("gate", "up"))
        return self._linear(torch.nn.functional.silu(gate) * up, at + "down", self.spec.mlp_bias)


def _spec(dtype: str = "fp32", **sizes: Any) -> ModelSpec:
    defaults: dict[str, Any] = {
        "layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "intermediate": 96, "vocab": 101,
        "rms_eps": 1e-5, "max_context": 256,
    }  # fmt: skip
    return ModelSpec(name="tiny", family="llama", dtype=dtype, **(defaults | sizes))  # type: ignore[arg-type]


def _program(spec: ModelSpec, sms: int = 4, chooser: Chooser = "greedy", **knobs: Any) -> Program:
    return lower(spec, Config(**knobs), small_target(sms), chooser=chooser)


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., ModelSpec]:
    """make_spec(dtype, **fields): a tiny model."""
    return _spec


@pytest.fixture(scope="session")
def make_program() -> Callable[..., Program]:
    """make_program(spec, sms, chooser, **knobs): its program on a card of a few SMs."""
    return _program


@pytest.fixture(scope="session")
def make_proven() -> Callable[..., ValidProgram]:
    """The same, proven."""

    def make(spec: ModelSpec, sms: int = 4, chooser: Chooser = "greedy", **knobs: Any) -> ValidProgram:
        valid = validate(_program(spec, sms, chooser, **knobs))
        assert isinstance(valid, ValidProgram), valid
        return valid

    return make


@pytest.fixture(scope="session")
def make_source() -> type[RandomSource]:
    return RandomSource


@pytest.fixture(scope="session")
def plain() -> type[PlainDecoder]:
    return PlainDecoder
