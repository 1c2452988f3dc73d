"""A HuggingFace config becomes a ModelSpec, or a rejection that names every field that is not understood."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from amk.isa.weight_format import ScaleDType
from amk.models.errors import Unsupported
from amk.models.fields import FAMILIES, Family, unaccounted
from amk.models.quantization_config import scheme_of, without_quantization
from amk.models.rope import rope_problems
from amk.models.stored_matrix import Scheme
from amk.schedule.model import DType, ModelSpec
from amk.schedule.settings import MAX_HEAD_DIM, MOST_LAYERS

DTYPES: dict[str, DType] = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_ACTIVATIONS = ("silu", "swish")


def spec_from_config(
    config: Mapping[str, Any], name: str, *, dtype: DType | None = None, generation: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The model that `config` (a parsed config.json) describes.

    `dtype` is what the weights are really stored in, when known; else the config's word counts, else fp32.
    `generation` is a parsed generation_config.json, whose stop tokens win, as in transformers. Raises `Unsupported`
    with every problem found. The scales of quantised weights are taken to be of the same dtype.
    """
    scheme = scheme_of(config)
    config = without_quantization(config)
    quantised = scheme if isinstance(scheme, list) else []
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        known = ", ".join(FAMILIES)
        problem = f"config field model_type: must be one of {known}, but got {config.get('model_type')!r}"
        raise Unsupported(name, [problem, *quantised, *unaccounted(FAMILIES["llama"], config)])
    reader = _Reader(family, config)
    spec = _read(reader, name, dtype, generation or {})
    problems = unaccounted(family, config) + quantised + rope_problems(config) + reader.problems
    if problems or spec is None:
        raise Unsupported(name, problems)
    return replace(spec, layer_weights=replace(scheme.weights, scale=_scale_dtype(spec))) if isinstance(scheme, Scheme) else spec


def _scale_dtype(spec: ModelSpec) -> ScaleDType:
    if spec.dtype == "fp32":
        raise Unsupported(spec.name, ["weights must be bf16 or fp16 beside quantised ones, but are fp32"])
    return spec.dtype


def _read(reader: _Reader, name: str, dtype: DType | None, generation: Mapping[str, Any]) -> ModelSpec | None:
    family = reader.family
    reader.choice("architectures", (None, [], [family.architecture]))
    reader.choice("hidden_act", _ACTIVATIONS)
    hidden, layers = reader.size("hidden_size"), reader.size("num_hidden_layers", MOST_LAYERS)
    heads, vocab = reader.size("num_attention_heads"), reader.size("vocab_size")
    intermediate, max_context = reader.size("intermediate_size"), reader.size("max_position_embeddings")
    kv_heads = heads if reader.value("num_key_value_heads") is None else reader.size("num_key_value_heads")
    attention_bias = family.model_type == "qwen2" or reader.flag("attention_bias")
    mlp_bias, tied, eps = reader.flag("mlp_bias"), reader.flag("tie_word_embeddings"), reader.eps()
    stored, bos, stops = dtype or reader.dtype(), reader.token("bos_token_id", vocab), reader.stop_tokens(generation, vocab)
    if reader.problems:
        return None
    head_dim, windows = reader.head_dim(hidden, heads, kv_heads), reader.windows(layers)
    if reader.problems:
        return None
    return ModelSpec(
        name=name, family=family.model_type, dtype=stored, hidden=hidden, layers=layers, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, intermediate=intermediate, vocab=vocab, rms_eps=eps, max_context=max_context, tied_head=tied,
        qkv_bias=attention_bias, o_bias=attention_bias and family.model_type != "qwen2", mlp_bias=mlp_bias,
        qk_norm=family.model_type == "qwen3", windows=windows, bos_token=bos, stop_tokens=stops,
    )  # fmt: skip


class _Reader:
    """Reads typed fields of one config, with the family's defaults; what is wrong is appended to `problems`."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self.family = family
        self.config = config
        self.problems: list[str] = []

    def value(self, name: str) -> Any:
        return self.config.get(name, self.family.defaults.get(name))

    def reject(self, name: str, must: str) -> None:
        self.problems.append(f"config field {name}: must be {must}, but got {self.value(name)!r}")

    def choice(self, name: str, allowed: tuple[Any, ...]) -> None:
        if self.value(name) not in allowed:
            self.reject(name, " or ".join(repr(value) for value in allowed))

    def size(self, name: str, most: int | None = None) -> int:
        value = self.value(name)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= (most or value):
            return value
        self.reject(name, "a positive integer" if most is None else f"an integer from 1 to {most}")
        return 1

    def flag(self, name: str) -> bool:
        value = self.value(name)
        if name not in self.family.used:
            return False
        if not isinstance(value, bool):
            self.reject(name, "true or false")
        return bool(value)

    def eps(self) -> float:
        value = self.value("rms_norm_eps")
        if type(value) is float and 0 <= value < 1:  # transformers takes no integer 0 for it
            return value
        self.reject("rms_norm_eps", "a float in [0, 1)")
        return 0.0

    def token(self, name: str, vocab: int) -> int | None:
        """None for a token outside the vocabulary, too: checkpoints without such a token say -1, or what a larger vocabulary had."""
        value = self.value(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value if value in range(vocab) else None
        self.reject(name, "a token id or null")
        return None

    def dtype(self) -> DType:
        name = "dtype" if self.value("dtype") is not None else "torch_dtype"
        value = self.value(name)
        if value is None:
            return "fp32"
        if value not in DTYPES:
            self.reject(name, "one of " + ", ".join(DTYPES))
        return DTYPES.get(value, "fp32")

    def stop_tokens(self, generation: Mapping[str, Any], vocab: int) -> tuple[int, ...]:
        """Those in the vocabulary: no other can be made."""
        file, value = "config", self.value("eos_token_id")
        if "eos_token_id" in generation:
            file, value = "generation_config.json", generation["eos_token_id"]
        tokens = [] if value is None else value if isinstance(value, list) else [value]
        if any(not isinstance(token, int) or isinstance(token, bool) for token in tokens):
            self.problems.append(f"{file} field eos_token_id: must be a token id, a list of them or null, but got {value!r}")
            return ()
        return tuple(token for token in tokens if token in range(vocab))

    def head_dim(self, hidden: int, heads: int, kv_heads: int) -> int:
        if heads % kv_heads:
            self.reject("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
        stated = self.family.defaults.get("head_dim") if "head_dim" not in self.config else self.size_or_null("head_dim")
        if hidden % heads and (stated is None or self.family.model_type == "llama"):
            self.reject("hidden_size", f"a multiple of num_attention_heads = {heads}")
        head_dim = stated or hidden // heads
        if head_dim % 8 or head_dim > MAX_HEAD_DIM:
            self.problems.append(f"config field head_dim: must be a multiple of 8 up to {MAX_HEAD_DIM}, but got {head_dim}")
        return head_dim

    def size_or_null(self, name: str) -> int | None:
        """A stated size; null stands for the derived one only where the family's class says so."""
        if self.value(name) is None and self.family.defaults.get(name, 0) is None:
            return None
        return self.size(name)

    def windows(self, layers: int) -> tuple[int | None, ...]:
        """The sliding window of each layer, by the rule of the family's class in transformers."""
        if "sliding_window" not in self.family.used:
            return (None,) * layers
        if self.family.model_type == "mistral":
            return (self._window(),) * layers
        window = self._window() if self.flag("use_sliding_window") else None
        types = self._layer_types(layers, window)
        return tuple(window if kind == "sliding_attention" else None for kind in types)

    def _window(self) -> int | None:
        return None if self.value("sliding_window") is None else self.size("sliding_window")

    def _layer_types(self, layers: int, window: int | None) -> list[str]:
        types = self.value("layer_types")
        if types is None:
            first = self.value("max_window_layers")
            if not isinstance(first, int):
                self.reject("max_window_layers", "an integer")
                first = 0
            return ["sliding_attention" if window is not None and layer >= first else "full_attention" for layer in range(layers)]
        known = {"full_attention"} if window is None else {"full_attention", "sliding_attention"}
        if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in map(str, types)):
            self.reject("layer_types", f"{layers} of {', '.join(sorted(known))}")
            return []
        return types
