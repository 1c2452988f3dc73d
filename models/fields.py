"""Every field a config.json may have, per family: what is used, what changes nothing, what must keep its default.

A field in none of these tables is one the importer does not understand, and the model is rejected by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

_SIZES = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "vocab_size", "max_position_embeddings",
}  # fmt: skip
_COMMON = _SIZES | {
    "model_type", "architectures", "head_dim", "rms_norm_eps", "hidden_act", "tie_word_embeddings", "rope_theta",
    "rope_scaling", "rope_parameters", "original_max_position_embeddings", "bos_token_id", "eos_token_id", "dtype", "torch_dtype",
}  # fmt: skip
_WINDOWS = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}

# Training, bookkeeping and generation defaults: no value of these changes a logit of the model in eval mode.
HARMLESS = frozenset({
    "_name_or_path", "name_or_path", "_model_name_or_path", "_commit_hash", "transformers_version", "_attn_implementation_autoset",
    "attn_implementation", "initializer_range", "attention_dropout", "use_cache", "pad_token_id", "unk_token_id", "sep_token_id",
    "decoder_start_token_id", "pretraining_tp", "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "id2label", "label2id", "num_labels", "problem_type", "task_specific_params", "finetuning_task", "tokenizer_class", "prefix",
    "return_dict", "output_attentions", "output_hidden_states", "torchscript", "is_decoder", "use_bfloat16", "tf_legacy_loss",
    "do_sample", "max_length", "min_length", "max_new_tokens", "early_stopping", "num_beams", "num_beam_groups", "diversity_penalty",
    "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "output_scores", "return_dict_in_generate",
    "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens",
    "begin_suppress_tokens",
})  # fmt: skip

# What a class in transformers insists on in fields of no meaning here, which it checks by their exact types.
TYPES: Mapping[str, tuple[str, tuple[type, ...]]] = MappingProxyType({
    "initializer_range": ("a float", (float,)),
    "attention_dropout": ("a number or null", (int, float, type(None))),
    "use_cache": ("true or false", (bool,)),
    "pad_token_id": ("an integer or null", (int, type(None))),
    "pretraining_tp": ("an integer or null", (int, type(None))),
})  # fmt: skip
_LLAMA_ALONE = frozenset({"pretraining_tp"})

# Fields that would change the model's meaning, with the values at which they do not.
DEFAULT_ONLY: Mapping[str, tuple[Any, ...]] = MappingProxyType({
    "partial_rotary_factor": (1.0, None), "rope_interleaved": (False,), "auto_map": (None,),
    "attention_bias": (False,), "mlp_bias": (False,), "sliding_window": (None,), "use_sliding_window": (False,), "use_mrope": (False,),
    "is_encoder_decoder": (False,), "add_cross_attention": (False,), "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,), "chunk_size_feed_forward": (0,), "pruned_heads": ({}, None),
    "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,), "embedding_multiplier": (1.0,),
    "residual_multiplier": (1.0,), "logits_scaling": (1.0,), "tie_last_hidden_states": (None,),
})  # fmt: skip


@dataclass(frozen=True)
class Family:
    """One transformers model class: the fields it reads beyond the common ones, and their values when absent."""

    model_type: str
    architecture: str
    extra_used: frozenset[str]
    defaults: Mapping[str, Any]
    default_only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @property
    def used(self) -> frozenset[str]:
        return frozenset(_COMMON) | self.extra_used

    def allowed(self, name: str) -> tuple[Any, ...] | None:
        """The values at which an unused field keeps its default meaning; None if the field is not known at all."""
        return self.default_only.get(name, DEFAULT_ONLY.get(name))


def _family(model_type: str, architecture: str, used: set[str], defaults: dict[str, Any], **default_only: tuple[Any, ...]) -> Family:
    common = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
    return Family(model_type, architecture, frozenset(used), MappingProxyType(common | defaults), default_only)


# Defaults are those of the configuration classes of transformers 5; sizes of the network itself must be stated.
FAMILIES: Mapping[str, Family] = MappingProxyType({
    family.model_type: family
    for family in (
        _family("llama", "LlamaForCausalLM", {"attention_bias", "mlp_bias"}, {
            "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048, "attention_bias": False, "mlp_bias": False,
            "bos_token_id": 1, "eos_token_id": 2,
        }),
        _family("mistral", "MistralForCausalLM", {"sliding_window"}, {
            "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072, "sliding_window": 4096,
            "bos_token_id": 1, "eos_token_id": 2,
        }),
        _family("qwen2", "Qwen2ForCausalLM", _WINDOWS, {
            "num_key_value_heads": 32, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
            "max_window_layers": 28, "layer_types": None, "bos_token_id": None, "eos_token_id": None,
        }, attention_bias=(True,)),
        _family("qwen3", "Qwen3ForCausalLM", _WINDOWS | {"attention_bias"}, {
            "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768, "use_sliding_window": False,
            "sliding_window": 4096, "max_window_layers": 28, "layer_types": None, "attention_bias": False,
            "bos_token_id": None, "eos_token_id": None,
        }),
    )
})  # fmt: skip


def unaccounted(family: Family, config: Mapping[str, Any]) -> list[str]:
    """One sentence for each field that is not understood, or has a value that changes what the model means or is of a wrong type."""
    problems = []
    for name, value in config.items():
        if name in family.used or name in HARMLESS:
            must, types = TYPES.get(name, ("", (object,)))
            if must and type(value) not in types and (family.model_type == "llama" or name not in _LLAMA_ALONE):
                problems.append(f"config field {name}: must be {must}, but got {_short(value)}")
            continue
        allowed = family.allowed(name)
        if allowed is None:
            problems.append(f"config field {name} = {_short(value)} is not understood")
        elif value not in allowed:
            problems.append(f"config field {name}: must be {' or '.join(map(repr, allowed))}, but got {_short(value)}")
    return problems


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
