"""From the name a user types to a model: a built-in, a folder, a GGUF file or a HuggingFace id."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

from amk.models.builtin import NAMES, RANDOM, SMOLLM2, SMOLLM2_CONFIG
from amk.models.checkpoint import describe_folder, read_checkpoint
from amk.models.config import spec_from_config
from amk.models.errors import UnknownModel
from amk.models.fetch import converted_gguf, describe_hub, fetch_hub, fetch_smollm2
from amk.models.model import Model, checkpoint_model, model_in, random_model, spec_in
from amk.models.quantised_weights import split_name
from amk.schedule.model import ModelSpec

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def resolve(name: str, *, cache_dir: Path | None = None, progress: Callable[[str], None] | None = None, token: str | None = None) -> Model:
    """The model called `name` (or NAME@FORMAT), ready to hand out weights; fetched and converted the first time where it must be.

    `token` is a HuggingFace access token, for what is gated or private there; without one HuggingFace's own rules find it (HF_TOKEN,
    or the file of `hf auth login`). Raises `UnknownModel`, `BadToken`, `Unsupported`, `DamagedCheckpoint` or `Unavailable`, each one
    sentence with its exit code.
    """
    if not os.path.exists(os.path.expanduser(name)):
        base, form = split_name(name)
        if form:
            return model_in(resolve(base, cache_dir=cache_dir, progress=progress, token=token), form)
    if name in RANDOM:
        return random_model(name, RANDOM[name])
    if name == SMOLLM2:
        return checkpoint_model(read_checkpoint(fetch_smollm2(cache_dir, progress), name))
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return checkpoint_model(read_checkpoint(path, path.resolve().name))
    if _is_gguf(path):
        return checkpoint_model(read_checkpoint(converted_gguf(path, cache_dir, progress), path.stem))
    _require_hub_id(name, path)
    return checkpoint_model(read_checkpoint(fetch_hub(name, progress, token), name))


def describe(
    name: str, *, cache_dir: Path | None = None, progress: Callable[[str], None] | None = None, token: str | None = None
) -> ModelSpec:
    """The description of the model called `name`, without torch for built-ins and folders, and without its weights.

    A GGUF file is converted, a HuggingFace id has its config fetched. Raises as `resolve` does.
    """
    if not os.path.exists(os.path.expanduser(name)):
        base, form = split_name(name)
        if form:
            return spec_in(describe(base, cache_dir=cache_dir, progress=progress, token=token), form)
    if name in RANDOM:
        return spec_from_config(RANDOM[name], name)
    if name == SMOLLM2:
        return spec_from_config(SMOLLM2_CONFIG, name)
    path = Path(os.path.expanduser(name))
    if name and os.path.isdir(path):
        return describe_folder(path, path.resolve().name)
    if _is_gguf(path):
        return describe_folder(converted_gguf(path, cache_dir, progress), path.stem)
    _require_hub_id(name, path)
    return describe_hub(name, token)


def _is_gguf(path: Path) -> bool:
    return os.path.isfile(path) and path.suffix == ".gguf"


def _require_hub_id(name: str, path: Path) -> None:
    if os.path.isfile(path):
        raise UnknownModel(f"{name} is a file, but a model is a folder with config.json and safetensors, or a .gguf file")
    looks_local = name.startswith((".", "/", "~")) or name.endswith(".gguf")
    if looks_local or not _HUB_ID.fullmatch(name):
        close = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise UnknownModel(
            f"unknown model {name!r}: must be one of {', '.join(NAMES)}, a checkpoint folder, a .gguf file or a HuggingFace id{hint}"
        )
