"""A config.json is either understood to its last field or rejected by the names of what is not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from amk.models.config import spec_from_config
from amk.models.errors import Unsupported
from amk.models.fields import DEFAULT_ONLY, FAMILIES, HARMLESS, TYPES

LLAMA_2 = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.31.0", "use_cache": True,
    "vocab_size": 32000, "_name_or_path": "meta-llama/Llama-2-7b-hf",
}  # fmt: skip
LLAMA_3 = LLAMA_2 | {
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 128000, "eos_token_id": 128001, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "num_key_value_heads": 8, "rope_theta": 500000.0, "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
_LLAMA_3_SCALING = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA_31 = LLAMA_3 | {
    "mlp_bias": False, "eos_token_id": [128001, 128008, 128009], "max_position_embeddings": 131072,
    "rope_scaling": _LLAMA_3_SCALING | {"factor": 8.0},
}  # fmt: skip
LLAMA_32 = LLAMA_31 | {
    "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True,
    "rope_scaling": _LLAMA_3_SCALING | {"factor": 32.0},
}  # fmt: skip
SMOLLM2 = LLAMA_2 | {
    "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
    "is_llama_config": True, "rope_interleaved": False, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
    "max_position_embeddings": 8192, "torch_dtype": "bfloat16", "pad_token_id": 2,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
    "sliding_window": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN_25 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu",
    "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
    "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
REAL: dict[str, dict[str, Any]] = {
    "Llama 2": LLAMA_2, "Llama 3": LLAMA_3, "Llama 3.1": LLAMA_31, "Llama 3.2": LLAMA_32, "SmolLM2": SMOLLM2, "Mistral": MISTRAL,
    "Qwen2.5": QWEN_25, "Qwen3": QWEN_3,
}  # fmt: skip


def rejection(config: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(Unsupported) as caught:
        spec_from_config(config, "model")
    assert caught.value.exit_code == 1
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("Llama 2", {"dtype": "fp16", "head_dim": 128, "kv_heads": 32, "tied_head": False, "stop_tokens": (2,)}),
        ("Llama 3", {"dtype": "bf16", "kv_heads": 8, "max_context": 8192, "vocab": 128256}),
        ("Llama 3.1", {"max_context": 131072, "stop_tokens": (128001, 128008, 128009), "qkv_bias": False}),
        ("Llama 3.2", {"head_dim": 64, "tied_head": True, "layers": 16, "bos_token": 128000}),
        ("SmolLM2", {"head_dim": 64, "heads": 9, "kv_heads": 3, "tied_head": True}),
        ("Mistral", {"windows": (4096,) * 32, "qkv_bias": False, "family": "mistral"}),
        ("Qwen2.5", {"windows": (None,) * 24, "qkv_bias": True, "o_bias": False, "qk_norm": False, "head_dim": 64}),
        ("Qwen3", {"windows": (None,) * 28, "qkv_bias": False, "qk_norm": True, "head_dim": 128, "hidden": 1024}),
    ],
)
def test_published_config_gives_its_model(name: str, facts: dict[str, Any]) -> None:
    spec = spec_from_config(REAL[name], name)
    assert {field: getattr(spec, field) for field in facts} == facts


@pytest.mark.parametrize("name", REAL)
@given(field=st.from_regex(r"[a-z][a-z_]{2,20}", fullmatch=True), value=st.sampled_from([None, False, 0, 1.0, "x", [1]]))
def test_a_field_nobody_knows_is_rejected_by_name(name: str, field: str, value: object) -> None:
    family = FAMILIES[REAL[name]["model_type"]]
    if field in family.used | HARMLESS or family.allowed(field) is not None:
        return
    problems = rejection(REAL[name] | {field: value})
    assert len(problems) == 1 and f"config field {field} =" in problems[0]


@pytest.mark.parametrize("field", sorted(DEFAULT_ONLY))
def test_a_field_with_meaning_must_keep_its_default(field: str) -> None:
    family = FAMILIES["mistral"]
    if field in family.used:
        field = "use_mrope"
    for value in DEFAULT_ONLY[field]:
        assert spec_from_config(MISTRAL | {field: value}, "m") == spec_from_config(MISTRAL, "m")
    (problem,) = rejection(MISTRAL | {field: 30.5})
    assert field in problem and "30.5" in problem


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("granite", {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.015625, "logits_scaling": 8.0}),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "no_rope_layer_interval": 4}),
        ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
        ("qwen3_moe", {"num_experts": 128, "moe_intermediate_size": 768, "norm_topk_prob": True}),
        ("gemma2", {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256}),
        ("phi3", {"partial_rotary_factor": 0.75}),
    ],
)
def test_other_architectures_are_named_with_each_field_of_theirs(model_type: str, fields: dict[str, Any]) -> None:
    problems = "; ".join(rejection(LLAMA_2 | {"model_type": model_type} | fields))
    assert f"model_type: must be one of llama, mistral, qwen2, qwen3, but got '{model_type}'" in problems
    assert all(f"config field {field}" in problems for field in fields)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act: must be 'silu' or 'swish', but got 'gelu'"),
        ({"num_key_value_heads": 5}, "num_key_value_heads: must be a divisor of num_attention_heads = 32, but got 5"),
        ({"head_dim": 260}, "head_dim: must be a multiple of 8 up to 256, but got 260"),
        ({"head_dim": 100}, "head_dim: must be a multiple of 8 up to 256, but got 100"),
        ({"hidden_size": 4100}, "hidden_size: must be a multiple of num_attention_heads = 32, but got 4100"),
        ({"vocab_size": "many"}, "vocab_size: must be a positive integer, but got 'many'"),
        ({"num_hidden_layers": True}, "num_hidden_layers: must be an integer from 1 to 4094, but got True"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: must be an integer from 1 to 4094, but got 1000000000"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype: must be one of bfloat16, float16, float32, but got 'float8_e4m3fn'"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: must be true or false"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: must be a float in [0, 1), but got 0"),
        ({"initializer_range": 1}, "initializer_range: must be a float, but got 1"),
        ({"pretraining_tp": 1.0}, "pretraining_tp: must be an integer or null, but got 1.0"),
        ({"use_cache": "yes"}, "use_cache: must be true or false, but got 'yes'"),
        ({"attention_dropout": "x"}, "attention_dropout: must be a number or null, but got 'x'"),
        ({"pad_token_id": [2]}, "pad_token_id: must be an integer or null, but got [2]"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"rope_theta": 0}, "rope_theta: must be a positive number, but got 0"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type: must be one of default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "but got 'longrope'"),
        ({"rope_scaling": {"rope_type": "mrope", "mrope_section": [16, 24, 24]}}, "but got 'mrope'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is required by rope type linear"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "extra": 1}}, "rope_scaling.extra = 1 is not understood"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor: must be 1.0, but got 0.5"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 3.0}}, "must not contradict"),
        ({"original_max_position_embeddings": 4096}, "original_max_position_embeddings = 4096 is not understood"),
    ],
)
def test_a_llama_that_would_be_computed_wrongly_is_rejected(change: dict[str, Any], words: str) -> None:
    assert words in "; ".join(rejection(LLAMA_2 | change))


def test_a_harmless_field_that_the_class_does_not_have_may_be_anything() -> None:
    assert spec_from_config(QWEN_3 | {"pretraining_tp": 1.0}, "m") == spec_from_config(QWEN_3, "m")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_said_of_harmless_fields_is_what_the_class_in_transformers_takes(model_type: str) -> None:
    """Nothing is refused here that transformers would take."""
    source = {"llama": LLAMA_2, "mistral": MISTRAL, "qwen2": QWEN_25, "qwen3": QWEN_3}[model_type]
    for field in TYPES:
        for value in (True, 2, 0.5, "x", [1], {"a": 1}):
            try:
                spec_from_config(source | {field: value}, "m")
            except Unsupported:
                with pytest.raises(Exception, match=field):
                    CONFIG_MAPPING[model_type](**source | {field: value})


def test_all_problems_are_reported_at_once() -> None:
    problems = rejection(LLAMA_2 | {"hidden_act": "gelu", "mystery": 1, "rope_scaling": {"rope_type": "su"}})
    assert len(problems) == 3


def test_qwen_windows_begin_at_max_window_layers_or_follow_layer_types() -> None:
    sliding = QWEN_25 | {"use_sliding_window": True, "sliding_window": 128}
    assert spec_from_config(sliding, "m").windows == (None,) * 21 + (128,) * 3
    types = ["sliding_attention", "full_attention"] * 12
    assert spec_from_config(sliding | {"layer_types": types}, "m").windows == (128, None) * 12
    assert "layer_types" in rejection(sliding | {"layer_types": types[1:]})[0]
    assert "layer_types" in rejection(sliding | {"layer_types": ["chunked_attention"] * 24})[0]
    assert "layer_types" in rejection(QWEN_25 | {"layer_types": types})[0]


def test_head_dim_is_independent_of_the_hidden_size() -> None:
    for head_dim in (8, 80, 96, 256):
        assert spec_from_config(LLAMA_2 | {"head_dim": head_dim}, "m").head_dim == head_dim
    assert "head_dim" in rejection(QWEN_3 | {"head_dim": None})[0]


@pytest.mark.parametrize(
    ("config", "generation", "file"),
    [({"eos_token_id": 2}, {"eos_token_id": "</s>"}, "generation_config.json"), ({"eos_token_id": "</s>"}, {}, "config")],
)
def test_stop_tokens_that_are_none_are_named_with_their_file(config: dict[str, Any], generation: dict[str, Any], file: str) -> None:
    with pytest.raises(Unsupported) as caught:
        spec_from_config(LLAMA_3 | config, "m", generation=generation)
    assert caught.value.problems == (f"{file} field eos_token_id: must be a token id, a list of them or null, but got '</s>'",)


def test_generation_config_decides_the_stop_tokens() -> None:
    assert spec_from_config(LLAMA_3, "m", generation={"eos_token_id": [128001, 128009]}).stop_tokens == (128001, 128009)
    assert spec_from_config(LLAMA_3, "m", generation={}).stop_tokens == (128001,)


@pytest.mark.parametrize("token", [-1, 32000, 2**40])
def test_tokens_outside_the_vocabulary_are_none(token: int) -> None:
    assert spec_from_config(LLAMA_2 | {"bos_token_id": token}, "m").bos_token is None
    assert spec_from_config(LLAMA_2 | {"eos_token_id": token}, "m").stop_tokens == ()
    assert spec_from_config(LLAMA_2, "m", generation={"eos_token_id": [token, 0, 31999]}).stop_tokens == (0, 31999)
    assert spec_from_config(LLAMA_2 | {"bos_token_id": 31999}, "m").bos_token == 31999
