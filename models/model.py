"""A resolved model: its description, its weights, its tokenizer and its source model in transformers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from amk.isa.weight_format import WeightFormat
from amk.models.checkpoint import Checkpoint, CheckpointWeights, read_json
from amk.models.config import spec_from_config
from amk.models.converted_weights import ConvertedWeights, with_dtype
from amk.models.eager import build_eager, config_problem, load_eager
from amk.models.errors import DamagedCheckpoint, Unsupported
from amk.models.quantised_weights import ModelWeights, QuantisedWeights, with_weights
from amk.models.random_weights import RandomWeights
from amk.schedule.model import DType, ModelSpec

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENIZER_JSON = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


@dataclass(frozen=True, eq=False)
class Model:
    """`config` is the HuggingFace config; `checkpoint` is None for a model with random weights."""

    spec: ModelSpec
    weights: ModelWeights
    config: Mapping[str, Any]
    checkpoint: Checkpoint | None

    @functools.cached_property
    def digest(self) -> str:
        """A content id: equal digests mean equal configs and weights. Reads the weight files."""
        return self.weights.digest

    def tokenizer(self) -> Any:
        """The transformers tokenizer, or None when the model has none; `DamagedCheckpoint` names the file that cannot be read."""
        if self.checkpoint is None or not any((self.checkpoint.folder / file).exists() for file in _TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(str(self.checkpoint.folder), local_files_only=True)
        except (ImportError, MemoryError):
            raise
        except Exception as error:  # of any class, among them Exception itself: a file is damaged, and none is looked at before
            raise _damaged_tokenizer(self.checkpoint.folder, error) from error

    def eager(self, dtype: DType = "fp32", device: str = "cpu") -> Any:
        """The source model: the transformers class with eager attention and the same weights, in eval mode, no gradients.

        A checkpoint is loaded by transformers itself, independently of `weights`; one with quantised weights is given them dequantised,
        one with converted weights as they were rounded.
        """
        if self.checkpoint is None or self.spec.quantised or self.spec.dtype != self.checkpoint.spec.dtype:
            return build_eager(self.config, self.spec, self.weights, dtype, device)
        try:
            return load_eager(self.checkpoint.folder, dtype, device)
        except (OSError, ValueError, KeyError) as error:
            raise DamagedCheckpoint(f"transformers cannot load {self.checkpoint.folder}: {error}") from error


def _damaged_tokenizer(folder: Path, error: Exception) -> DamagedCheckpoint:
    """What is wrong with a tokenizer that transformers did not load."""
    try:
        for file in _TOKENIZER_JSON:
            if (folder / file).is_file():
                read_json(folder / file)
    except DamagedCheckpoint as damage:
        return damage
    files = ", ".join(file for file in _TOKENIZER_FILES if (folder / file).exists())
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return DamagedCheckpoint(f"transformers cannot load the tokenizer of {folder} ({files}): {reason}; fetch the checkpoint again")


def random_model(name: str, config: Mapping[str, Any], seed: int = 0) -> Model:
    """A model of `config` with seeded random weights; `Unsupported` as for any config."""
    spec = spec_from_config(config, name)
    return Model(spec, RandomWeights(spec, config, seed), config, None)


def checkpoint_model(checkpoint: Checkpoint) -> Model:
    """A model whose weights are those of a checkpoint folder; `Unsupported` where transformers itself refuses its config."""
    if problem := config_problem(checkpoint.config):
        raise Unsupported(checkpoint.spec.name, [problem])
    return Model(checkpoint.spec, CheckpointWeights(checkpoint), checkpoint.config, checkpoint)


def model_in(model: Model, form: WeightFormat | DType) -> Model:
    """The model with its weights in a format or dtype; `Unsupported` where they cannot be."""
    return quantised_model(model, form) if isinstance(form, WeightFormat) else converted_model(model, form)


def spec_in(spec: ModelSpec, form: WeightFormat | DType) -> ModelSpec:
    """The description of `model_in`."""
    return with_weights(spec, form) if isinstance(form, WeightFormat) else with_dtype(spec, form)


def converted_model(model: Model, dtype: DType) -> Model:
    """The model with its weights rounded to another dtype; `Unsupported` where they cannot be."""
    spec = with_dtype(model.spec, dtype)
    return replace(model, spec=spec, weights=ConvertedWeights(model.weights, spec))


def quantised_model(model: Model, form: WeightFormat) -> Model:
    """The model with its matrices and its head quantised by AMK; `Unsupported` where they cannot be."""
    spec = with_weights(model.spec, form)
    return replace(model, spec=spec, weights=QuantisedWeights(model.weights, spec))
