"""Machines on the live card for the card's tests."""

from __future__ import annotations

from typing import Any

from amk.models.model import Model, random_model
from amk.models.registry import resolve
from amk.schedule.compile import lower
from amk.schedule.config import parse_config
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.targets import Target, live_target
from amk.schedule.validate import ValidProgram, validate
from amk.vm.cuda import CudaVM


def card() -> Target:
    """The live card's facts."""
    import torch

    p = torch.cuda.get_device_properties("cuda")
    return live_target(
        p.name,
        arch=f"sm_{p.major}{p.minor}" + ("a" if p.major >= 9 else ""),
        sms=p.multi_processor_count,
        shared_bytes=p.shared_memory_per_block_optin,
        memory_bytes=p.total_memory,
        clock_mhz=1980,
    )


def config_of(obj: dict[str, Any]) -> Config:
    config = parse_config(obj)
    assert isinstance(config, Config), config
    return config


def program(model: Model, config: dict[str, Any] | None = None, context: int = 1024, target: Target | None = None) -> Program:
    return lower(model.spec, config_of(config or {}), target or card(), context=context)


def proven(program: Program) -> ValidProgram:
    result = validate(program)
    assert isinstance(result, ValidProgram), result
    return result


def machine(model: Model, config: dict[str, Any] | None = None, context: int = 1024, **options: Any) -> CudaVM:
    """A CUDA machine with the model's program and weights; `options` are CudaVM's."""
    return CudaVM(proven(program(model, config, context)), model.weights, arch=card().arch, **options)


def named(name: str) -> Model:
    return resolve(name)


def llama(name: str, dtype: str = "bfloat16", seed: int = 0, architecture: str = "LlamaForCausalLM", **changes: Any) -> Model:
    """A random model of two layers; `changes` are fields of its HuggingFace config."""
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": architecture.removesuffix("ForCausalLM").lower(),
        "hidden_size": 320,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 80,
        "intermediate_size": 736,
        "vocab_size": 1003,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "dtype": dtype,
    }
    return random_model(name, fields | changes, seed)
