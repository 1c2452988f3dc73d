"""RoPE: which scaling rules are accepted, and the (cos, sin) table they give."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Keys of the rope dictionary by rope type: (required, optional). Types whose frequencies depend on the length of the
# sequence at run time (dynamic, longrope) have no fixed table and are not here.
_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "default": (set(), set()),
    "linear": ({"factor"}, set()),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor"}, {"original_max_position_embeddings"}),
    "yarn": (
        {"factor"},
        {
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
        },
    ),
}  # fmt: skip
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_NOT_NUMBERS = {"rope_type", "type", "truncate"}
_MAY_BE_NULL = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}


def rope_problems(config: Mapping[str, Any]) -> list[str]:
    """One sentence for each thing in the config's RoPE fields that is unknown, missing or not understood."""
    field = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(field) or {}
    if not isinstance(rope, Mapping):
        return [f"config field {field}: must be an object or null, but got {rope!r}"]
    problems = _theta_problems(config) + _both_problems(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if not isinstance(rope_type, str) or rope_type not in _KEYS:
        return [*problems, f"config field {field}.rope_type: must be one of {', '.join(_KEYS)}, but got {rope_type!r}"]
    required, optional = _KEYS[rope_type]
    problems += [f"config field {field}.{key} is required by rope type {rope_type}" for key in sorted(required - set(rope))]
    for key, value in rope.items():
        if key not in required | optional | _ALWAYS:
            problems.append(f"config field {field}.{key} = {value!r} is not understood for rope type {rope_type}")
        elif key == "partial_rotary_factor" and value not in (1, None):
            problems.append(f"config field {field}.partial_rotary_factor: must be 1.0, but got {value!r}")
        elif key not in _NOT_NUMBERS and not (_positive(value) or (value is None and key in _MAY_BE_NULL)):
            problems.append(f"config field {field}.{key}: must be a positive number, but got {value!r}")
    return problems + _original_length_problems(config, rope, rope_type)


def _positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _theta_problems(config: Mapping[str, Any]) -> list[str]:
    theta = config.get("rope_theta", 10_000.0)
    return [] if _positive(theta) else [f"config field rope_theta: must be a positive number, but got {theta!r}"]


def _both_problems(config: Mapping[str, Any]) -> list[str]:
    """transformers lets `rope_scaling` win over `rope_parameters`; two different statements are refused instead."""
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    if scaling and parameters and scaling != parameters:
        return [f"config fields rope_scaling and rope_parameters must not contradict, but are {scaling!r} and {parameters!r}"]
    return []


def _original_length_problems(config: Mapping[str, Any], rope: Mapping[str, Any], rope_type: str) -> list[str]:
    outer = config.get("original_max_position_embeddings")
    if outer is None or outer == rope.get("original_max_position_embeddings"):
        return []
    return [f"config field original_max_position_embeddings = {outer!r} is not understood beside rope type {rope_type}"]


def rope_table(config: Mapping[str, Any], rows: int, device: str = "cpu") -> torch.Tensor:
    """fp32 [rows, head_dim / 2, 2] of (cos, sin), bit-equal to what transformers computes on the CPU in fp32.

    Always computed on the CPU and then moved, so every device gets the same bits. The formula is
    `<Family>RotaryEmbedding.forward` of transformers: fp32 position times fp32 inverse frequency, cos and sin in
    fp32, times the attention scaling of the rope type.
    """
    import torch

    frequencies, scaling = inverse_frequencies(config)
    angles = torch.arange(rows, dtype=torch.int64)[:, None].float() * frequencies[None, :]
    return torch.stack((angles.cos() * scaling, angles.sin() * scaling), dim=-1).to(device)


def inverse_frequencies(config: Mapping[str, Any]) -> tuple[torch.Tensor, float]:
    """(fp32 [head_dim / 2] inverse frequencies, attention scaling) from transformers' own rope functions."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    source: Any = CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(dict(config)))
    rope_type = source.rope_parameters["rope_type"]
    if rope_type != "default":
        frequencies, scaling = ROPE_INIT_FUNCTIONS[rope_type](source, torch.device("cpu"))
        return frequencies.float(), float(scaling)
    head_dim = getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
    return 1.0 / (source.rope_parameters["rope_theta"] ** exponents), 1.0
