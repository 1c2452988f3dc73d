"""Tiny checkpoints of every family, written by the transformers classes themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 131, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
}  # fmt: skip
_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama3": {"model_type": "llama", "rope_theta": 500_000.0, "num_key_value_heads": 1},
    "llama3.1": {"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": _LLAMA3},
    "llama3.2": {"model_type": "llama", "rope_theta": 500_000.0, "rope_scaling": _LLAMA3, "tie_word_embeddings": True, "head_dim": 24},
    "llama linear": {"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama yarn": {"model_type": "llama", "rope_parameters": _YARN | {"rope_theta": 10_000.0}},
    "llama biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "smollm2": {
        "model_type": "llama", "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        "rope_theta": 100_000.0,
    },
    "mistral": {"model_type": "mistral", "sliding_window": 8},
    "mistral full": {"model_type": "mistral", "sliding_window": None, "head_dim": 40},
    "qwen2": {"model_type": "qwen2", "rope_theta": 1_000_000.0, "tie_word_embeddings": True},
    "qwen2 windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3 windows and biases": {
        "model_type": "qwen3", "head_dim": 24, "attention_bias": True, "use_sliding_window": True, "sliding_window": 8,
        "max_window_layers": 1,
    },
}  # fmt: skip


def family_config(family: str) -> dict[str, Any]:
    return _SIZES | FAMILY_CONFIGS[family]


def save_tiny(family: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint whose every weight, biases and gains included, is random and large enough to matter."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[FAMILY_CONFIGS[family]["model_type"]](**family_config(family))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(params=FAMILY_CONFIGS)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The saved checkpoint of a family, written once per session; not to be changed."""
    folders: dict[str, Path] = {}

    def folder_of(name: str) -> Path:
        if name not in folders:
            folders[name] = save_tiny(name, tmp_path_factory.mktemp("family") / name.replace(" ", "-"))
        return folders[name]

    return folder_of


@pytest.fixture
def tiny_copy(tmp_path: Path) -> Callable[[str], Path]:
    """A checkpoint of a family that the test may damage."""
    return lambda name: save_tiny(name, tmp_path / "checkpoint")
