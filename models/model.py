"""A resolved model: its description, its weights, its tokenizer and its source model in transformers."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from amk.models.checkpoint import Checkpoint, CheckpointWeights, folder_digest
from amk.models.config import spec_from_config
from amk.models.eager import build_eager, load_eager
from amk.models.errors import DamagedCheckpoint
from amk.models.random_weights import RandomWeights
from amk.schedule.model import DType, ModelSpec

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True, eq=False)
class Model:
    """`config` is the HuggingFace config; `checkpoint` is None for a model with random weights."""

    spec: ModelSpec
    weights: CheckpointWeights | RandomWeights
    config: Mapping[str, Any]
    checkpoint: Checkpoint | None

    @functools.cached_property
    def digest(self) -> str:
        """A content id: equal digests mean equal configs and weights. Reads the weight files."""
        if isinstance(self.weights, RandomWeights):
            return self.weights.digest
        assert self.checkpoint is not None
        return folder_digest(self.checkpoint)

    def tokenizer(self) -> Any:
        """The transformers tokenizer, or None when the model has none."""
        if self.checkpoint is None or not any((self.checkpoint.folder / file).exists() for file in _TOKENIZER_FILES):
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(str(self.checkpoint.folder), local_files_only=True)

    def eager(self, dtype: DType = "fp32", device: str = "cpu") -> Any:
        """The source model: the transformers class with eager attention and the same weights, in eval mode, no gradients.

        A checkpoint is loaded by transformers itself, independently of `weights`.
        """
        if self.checkpoint is None:
            return build_eager(self.config, self.spec, self.weights, dtype, device)
        try:
            return load_eager(self.checkpoint.folder, dtype, device)
        except (OSError, ValueError, KeyError) as error:
            raise DamagedCheckpoint(f"transformers cannot load {self.checkpoint.folder}: {error}") from error


def random_model(name: str, config: Mapping[str, Any], seed: int = 0) -> Model:
    """A model of `config` with seeded random weights; `Unsupported` as for any config."""
    spec = spec_from_config(config, name)
    return Model(spec, RandomWeights(spec, config, seed), config, None)


def checkpoint_model(checkpoint: Checkpoint) -> Model:
    """A model whose weights are those of a checkpoint folder."""
    return Model(checkpoint.spec, CheckpointWeights(checkpoint), checkpoint.config, checkpoint)
