"""The gate on the reference machine: the true models use at most half of the tolerance, and every mutant fails."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch

from amk.models.model import random_model
from amk.models.registry import resolve
from amk.schedule.model import weight_shapes
from amk.schedule.program import Program
from amk.tests.eval.mutants import (
    Case,
    Noisy,
    StaleRow,
    Turned,
    case_of,
    drop_residuals,
    mask_too_strict,
    rope_deleted,
    rope_late_by_one,
    rope_of_theta,
    rope_scaled,
    window_wider,
)

MODELS = ("toy", "toy-2L", "small", "window", "deep")
SIZES = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 256, "vocab_size": 509,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
}  # fmt: skip
MADE = {
    "window": SIZES | {"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": 60},
    "deep": SIZES | {"model_type": "llama", "num_hidden_layers": 8},
}

ROPES = {"deleted": rope_deleted, "theta": rope_of_theta(20_000.0), "scale": rope_scaled, "late by one": rope_late_by_one}


@cache
def case(name: str) -> Case:
    return case_of(random_model(name, MADE[name]) if name in MADE else resolve(name))


def noise_share(name: str) -> float:
    """The noise that must be caught: 2 % of a tensor's norm, 10 % in a deep model of 16 bits."""
    spec = case(name).spec
    return 0.02 if spec.layers <= 4 or spec.dtype == "fp32" else 0.10


@pytest.mark.parametrize("name", MODELS)
def test_the_true_model_uses_at_most_half_of_the_tolerance(name: str) -> None:
    finding = case(name).finding()
    assert finding.correct, finding.failures
    assert finding.tolerance_used <= 0.5


@pytest.mark.parametrize("fusion", [[], ["norm"], ["qkv", "gate_up"]], ids=str)
def test_the_true_model_stays_within_half_however_it_is_fused(fusion: list[str]) -> None:
    finding = case_of(resolve("toy-2L"), {"fusion_grouping": fusion}).finding()
    assert finding.correct, finding.failures
    assert finding.tolerance_used <= 0.5


@pytest.mark.parametrize("name", MODELS)
def test_noise_in_any_one_tensor_fails(name: str) -> None:
    """Every tensor of the first and the last layer, and those outside layers."""
    spec = case(name).spec
    layers = ("L0.", f"L{spec.layers - 1}.")
    tensors = [w for w in weight_shapes(spec) if not w.startswith("L") or w.startswith(layers)]
    passed = [w for w in tensors if case(name).finding(weights=Noisy(case(name).model, w, noise_share(name))).correct]
    assert passed == []


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", ROPES.values(), ids=ROPES)
def test_a_wrong_rope_fails(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    assert not case(name).finding(weights=Turned(case(name).model, change)).correct


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", [mask_too_strict, drop_residuals])
def test_a_dropped_term_fails(name: str, change: Callable[[Program], Program]) -> None:
    assert not case(name).finding(change(case(name).program)).correct


@pytest.mark.parametrize("rows", [-1, 1])
def test_a_window_off_by_one_fails(rows: int) -> None:
    assert not case("window").finding(window_wider(rows)(case("window").program)).correct


@pytest.mark.parametrize("name", ["toy", "toy-2L", "small"])
def test_one_stale_row_of_the_cache_fails(name: str) -> None:
    assert not case(name).finding(wrap=lambda vm: StaleRow(vm, 120)).correct
