"""The source model: the transformers class itself, eager, with the same weights as the compiled one."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amk.models.names import checkpoint_name
from amk.models.quantization_config import without_quantization
from amk.schedule.model import DType, ModelSpec, WeightSource, weight_shapes

if TYPE_CHECKING:
    import torch


def source_config(config: Mapping[str, Any]) -> Any:
    """The transformers config of the model with ordinary weights. It may raise anything: `config_problem` says what is wrong."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[config["model_type"]](**copy.deepcopy(without_quantization(config)))


def config_problem(config: Mapping[str, Any]) -> str | None:
    """Why transformers refuses the config, None where it takes it: the one field without which it would, else its own words."""
    reason = _refusal(config)
    if reason is None:
        return None
    for field, value in config.items():
        if field != "model_type" and _refusal({name: other for name, other in config.items() if name != field}) is None:
            return f"config field {field}: must be what transformers takes, but got {value!r:.60} ({reason})"
    return f"config must be what transformers takes, but: {reason}"


def _refusal(config: Mapping[str, Any]) -> str | None:
    try:
        source_config(config)
    except ImportError:
        raise
    except Exception as error:  # of any class: what of its values transformers looks at, and how, changes with its version
        return " ".join(str(error.__cause__ or error).split())[:200]
    return None


def load_eager(folder: Path, dtype: DType, device: str) -> Any:
    """The model that transformers itself loads from a checkpoint folder, in eval mode and without gradients."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch_dtype(dtype), attn_implementation="eager", local_files_only=True)
    return model.to(device).eval().requires_grad_(False)


def build_eager(config: Mapping[str, Any], spec: ModelSpec, weights: WeightSource, dtype: DType, device: str) -> Any:
    """The transformers model of `config` holding `weights` cast to `dtype`.

    It is laid out without memory first and given its tensors one by one, so the peak is the model plus one tensor. Quantised weights
    are dequantised; a head that is quantised is tied to the embedding no longer.
    """
    import torch
    from transformers import AutoModelForCausalLM

    auto_model: Any = AutoModelForCausalLM
    built_from = source_config(config)
    tied = spec.tied_head and spec.head_weights is None
    built_from.tie_word_embeddings = tied
    with torch.device("meta"):
        model = auto_model.from_config(built_from, dtype=torch_dtype(dtype), attn_implementation="eager")
    for name in weight_shapes(spec):
        if not (tied and name == "head"):
            _assign(model, checkpoint_name(name), weights.tensor(name, device).to(torch_dtype(dtype)))
    model.tie_weights()
    # Its frequencies are computed, not loaded, and on the CPU, so that every device gets the same bits.
    rotary = type(model.model.rotary_emb)
    model.model.rotary_emb = rotary(config=built_from).to(device)
    return model.eval().requires_grad_(False)


def _assign(model: Any, name: str, tensor: torch.Tensor) -> None:
    import torch

    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    expected = module.get_parameter(leaf).shape
    if expected != tensor.shape:
        raise ValueError(f"{name} must have shape {tuple(expected)} in the transformers model, but got {tuple(tensor.shape)}")
    setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))


def torch_dtype(dtype: DType) -> torch.dtype:
    """The torch dtype of ours."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
