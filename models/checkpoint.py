"""A checkpoint folder (config.json and safetensors files): its model, with every weight accounted for, and its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amk.models.config import spec_from_config
from amk.models.errors import DamagedCheckpoint, Unavailable, UnknownModel, Unsupported
from amk.models.names import checkpoint_name, is_computed, stored_shapes
from amk.models.rope import rope_table
from amk.models.safetensors_header import StoredTensor, read_header
from amk.schedule.model import DType, ModelSpec, weight_shapes

if TYPE_CHECKING:
    import torch

STORED_DTYPES: dict[str, DType] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HASHED_WHOLE_BYTES = 1 << 30
_SAMPLE_BYTES, _SAMPLE_STRIDE_BYTES = 1 << 16, 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was read and found sound: its config, where its tensors lie, and the model they make."""

    folder: Path
    config: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    spec: ModelSpec


def describe_folder(folder: Path, name: str) -> ModelSpec:
    """The model of a folder, from config.json and the headers of its weight files if it has any; no torch is imported."""
    config = read_json(folder / "config.json")
    if not _weight_files_exist(folder):
        return spec_from_config(config, name, generation=_generation(folder))
    return read_checkpoint(folder, name).spec


def read_checkpoint(folder: Path, name: str) -> Checkpoint:
    """Reads config and headers, and accounts for every field and every weight.

    Raises `UnknownModel` when the folder is no checkpoint, `DamagedCheckpoint` when weights are truncated, missing or
    of a wrong shape, `Unsupported` when a field, a weight or a dtype is not understood.
    """
    config = read_json(folder / "config.json")
    if (folder / "adapter_config.json").exists():
        raise Unsupported(name, ["file adapter_config.json: an adapter must be merged into its base model first"])
    spec_from_config(config, name)
    stored = _read_headers(folder, name)
    dtype = _one_dtype(name, stored)
    spec = spec_from_config(config, name, dtype=dtype, generation=_generation(folder))
    _account(spec, stored)
    return Checkpoint(folder, config, stored, spec)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UnknownModel` when there is no such file, `DamagedCheckpoint` when it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UnknownModel(f"{path.parent} is no checkpoint: it has no {path.name}") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is not valid JSON: {error}; fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{path} must hold a JSON object, but holds a {type(value).__name__}")
    return value


def _generation(folder: Path) -> dict[str, Any]:
    path = folder / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _weight_files_exist(folder: Path) -> bool:
    return (folder / _SINGLE).exists() or (folder / _INDEX).exists()


def _read_headers(folder: Path, name: str) -> dict[str, StoredTensor]:
    """Every stored tensor; one file wins over a sharded set, as in transformers."""
    if (folder / _SINGLE).exists():
        return read_header(folder / _SINGLE)
    if not (folder / _INDEX).exists():
        if any(folder.glob("pytorch_model*.bin")):
            raise Unsupported(name, ["weight files pytorch_model*.bin: save the checkpoint as safetensors first"])
        raise DamagedCheckpoint(f"{folder} has no {_SINGLE} and no {_INDEX}; fetch the checkpoint again")
    shards = read_json(folder / _INDEX).get("weight_map")
    if not isinstance(shards, dict):
        raise DamagedCheckpoint(f"{folder / _INDEX} must hold an object weight_map; fetch the checkpoint again")
    stored: dict[str, StoredTensor] = {}
    for file in sorted(set(map(str, shards.values()))):
        stored |= read_header(folder / file)
    lost = sorted(set(shards) - set(stored))
    if lost:
        raise DamagedCheckpoint(f"{folder} lacks weights that its index lists: {_some(lost)}; fetch the checkpoint again")
    return stored


def _one_dtype(name: str, stored: Mapping[str, StoredTensor]) -> DType:
    """The dtype shared by all weights; the compiler knows one per model."""
    by_dtype: dict[str, list[str]] = {}
    for weight, tensor in stored.items():
        if not is_computed(weight):
            by_dtype.setdefault(tensor.dtype, []).append(weight)
    problems = [f"weight {_some(by_dtype[dtype])} is stored as {dtype}" for dtype in sorted(set(by_dtype) - set(STORED_DTYPES))]
    if not problems and len(by_dtype) > 1:
        kinds = ", ".join(f"{dtype} ({_some(weights)})" for dtype, weights in sorted(by_dtype.items()))
        problems = [f"weights must share one dtype, but are {kinds}"]
    if problems:
        raise Unsupported(name, problems)
    return STORED_DTYPES[next(iter(by_dtype))] if by_dtype else "fp32"


def _account(spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> None:
    """Every weight stored is used, and every weight used is stored with its shape."""
    expected = stored_shapes(spec)
    copies = {"lm_head.weight"} if spec.tied_head else set()
    extra = sorted(weight for weight in set(stored) - set(expected) - copies if not is_computed(weight))
    if extra:
        raise Unsupported(spec.name, [f"weight {weight} {list(stored[weight].shape)} is not understood" for weight in extra])
    missing = sorted(set(expected) - set(stored))
    if missing:
        raise DamagedCheckpoint(f"model {spec.name} lacks {len(missing)} of its weights: {_some(missing)}; fetch the checkpoint again")
    for weight, shape in expected.items():
        if stored[weight].shape != shape:
            found = list(stored[weight].shape)
            raise DamagedCheckpoint(f"model {spec.name}: {weight} must have shape {list(shape)} by config.json, but has {found}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class CheckpointWeights:
    """Tensors of a checkpoint, memory-mapped: nothing is read until its elements are used.

    CPU tensors share the file's pages (copy on write) with every later call: clone one before changing it in place.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = frozenset(weight_shapes(checkpoint.spec))
        self._open_files: dict[Path, Any] = {}
        if checkpoint.spec.tied_head and "lm_head.weight" in checkpoint.stored:
            self._require_equal_heads()

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        """The named weight in the checkpoint's own dtype on `device`; KeyError if the model has no such weight."""
        if name not in self._names:
            raise KeyError(name)
        tied = self._checkpoint.spec.tied_head and name == "head"
        return self._stored("embed" if tied else name).to(device)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        """fp32 [rows, head_dim / 2, 2] of (cos, sin)."""
        return rope_table(self._checkpoint.config, rows, device)

    def _stored(self, name: str) -> torch.Tensor:
        stored_name = checkpoint_name(name)
        file = self._checkpoint.stored[stored_name].file
        if file not in self._open_files:
            self._open_files[file] = _open(file)
        tensor: torch.Tensor = self._open_files[file].get_tensor(stored_name)
        return tensor

    def _require_equal_heads(self) -> None:
        """A tied model that stores its head anyway must store the embedding there: transformers would use both."""
        spec = self._checkpoint.spec
        embed, head = self._stored("embed"), self._stored("head")
        if embed.shape != head.shape or not bool((embed == head).all()):
            raise Unsupported(spec.name, ["weight lm_head.weight differs from the embedding though tie_word_embeddings is true"])


def _open(path: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise Unavailable("reading a checkpoint needs the package safetensors; install it with pip") from error
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error}; fetch the checkpoint again") from error


def folder_digest(checkpoint: Checkpoint) -> str:
    """Content id of a checkpoint: its config and weight files, those over 1 GiB by size and evenly spread samples."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for file in sorted({tensor.file for tensor in checkpoint.stored.values()}):
        digest.update(file_digest(file).encode())
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, or for one over 1 GiB of its length and one 64 KiB block in each 16 MiB."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _HASHED_WHOLE_BYTES:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256(str(size).encode())
        for offset in range(0, size, _SAMPLE_STRIDE_BYTES):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
        return digest.hexdigest()
