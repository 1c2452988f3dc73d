"""The two names of a weight: ours (`L3.q`) and the checkpoint's (`model.layers.3.self_attn.q_proj.weight`)."""

from __future__ import annotations

import re

from amk.schedule.model import ModelSpec, weight_shapes

_OUTSIDE = {"embed": "model.embed_tokens.weight", "final_norm": "model.norm.weight", "head": "lm_head.weight"}
_IN_LAYER = {
    "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
    "v": "self_attn.v_proj", "o": "self_attn.o_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip

# Buffers that old checkpoints stored; transformers computes them from the config and ignores the stored ones.
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def checkpoint_name(name: str) -> str:
    """The name in a checkpoint of the Llama family of our weight `name`; KeyError if there is no such weight."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    layer, _, weight = name.partition(".")
    weight, _, bias = weight.partition(".")
    return f"model.layers.{int(layer[1:])}.{_IN_LAYER[weight]}.{bias or 'weight'}"


def stored_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Checkpoint name and shape of every tensor that a checkpoint of this model must hold (a tied head is not stored)."""
    return {checkpoint_name(name): shape for name, shape in weight_shapes(spec).items() if not (spec.tied_head and name == "head")}


def module_name(name: str) -> str:
    """The checkpoint's name of the module that holds the matrix `name`: what the names of a quantised matrix's tensors begin with."""
    return checkpoint_name(name).removesuffix(".weight")


def is_computed(stored_name: str) -> bool:
    """Whether a stored tensor is a buffer that the model computes anew, whatever the file says."""
    return _COMPUTED.fullmatch(stored_name) is not None
