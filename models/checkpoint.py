"""A checkpoint folder (config.json and safetensors files): its model, with every weight accounted for, and its tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amk.isa.weight_format import ScaleDType
from amk.models.config import spec_from_config
from amk.models.errors import DamagedCheckpoint, Unavailable, UnknownModel, Unsupported
from amk.models.names import checkpoint_name, is_computed, module_name, stored_shapes
from amk.models.quantise import dequantise
from amk.models.quantization_config import scheme_of
from amk.models.rope import rope_table
from amk.models.safetensors_header import StoredTensor, read_header
from amk.models.stored_matrix import SCALES, Part, Scheme
from amk.schedule.model import DType, ModelSpec, QuantisedMatrix, weight_format, weight_shapes
from amk.schedule.strict_json import unique_keys

if TYPE_CHECKING:
    import torch

STORED_DTYPES: dict[str, DType] = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_HASHED_WHOLE_BYTES = 1 << 30
_SAMPLE_BYTES, _SAMPLE_STRIDE_BYTES = 1 << 16, 1 << 24


@dataclass(frozen=True)
class Checkpoint:
    """A folder that was read and found sound: its config, where its tensors lie, and the model they make.

    `scheme` says how quantised matrices are stored, None where there are none.
    """

    folder: Path
    config: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    spec: ModelSpec
    scheme: Scheme | None = None


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
    stated, scheme = spec_from_config(config, name), scheme_of(config)
    assert not isinstance(scheme, list)
    stored = _read_headers(folder, name)
    quantised = scheme is not None and f"{module_name('head')}.{scheme.scales}" in stored and not stated.tied_head
    stated = replace(stated, head_weights=stated.layer_weights if quantised else None)
    parts = stored_parts(stated, scheme)
    dtype = _one_dtype(name, {weight: tensor for weight, tensor in stored.items() if weight not in parts})
    spec = spec_from_config(config, name, dtype=dtype, generation=_generation(folder))
    if scheme is not None and spec.layer_weights is not None:
        weights = replace(spec.layer_weights, scale=_one_scale_dtype(name, scheme, stored, parts))
        spec = replace(spec, layer_weights=weights, head_weights=weights if quantised else None)
    _account(spec, stored, parts)
    return Checkpoint(folder, config, stored, spec, scheme)


def stored_parts(spec: ModelSpec, scheme: Scheme | None) -> dict[str, Part]:
    """The tensors that the quantised matrices of a model may be stored as, by their names."""
    if scheme is None:
        return {}
    plain = {checkpoint_name(name) for name in weight_shapes(spec) if not weight_format(spec, name)}
    parts = (
        (f"{module_name(name)}.{part.name}", part)
        for name, shape in weight_shapes(spec).items()
        if weight_format(spec, name)
        for part in scheme.parts(*shape)
    )
    return {name: part for name, part in parts if name not in plain}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; `UnknownModel` when there is no such file, `DamagedCheckpoint` when it is not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise UnknownModel(f"{path.parent} is no checkpoint: it has no {path.name}") from error
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} is not valid JSON: {error}; fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{path} must hold a JSON object, but holds a {type(value).__name__}; fetch the checkpoint again")
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


def _one_scale_dtype(name: str, scheme: Scheme, stored: Mapping[str, StoredTensor], parts: Mapping[str, Part]) -> ScaleDType:
    """The dtype shared by all scales."""
    found = sorted({stored[weight].dtype for weight, part in parts.items() if part.name == scheme.scales and weight in stored})
    if len(found) > 1 or not set(found) <= set(SCALES):
        raise Unsupported(name, [f"scales of quantised weights must all be F16 or all be BF16, but are {' and '.join(found)}"])
    return "fp16" if found == ["F16"] else "bf16"


def _account(spec: ModelSpec, stored: Mapping[str, StoredTensor], parts: Mapping[str, Part]) -> None:
    """Every weight stored is used, and every weight used is stored with its shape."""
    quantised = {checkpoint_name(name) for name in weight_shapes(spec) if weight_format(spec, name)}
    expected = {name: shape for name, shape in stored_shapes(spec).items() if name not in quantised}
    expected |= {name: part.shape for name, part in parts.items() if not part.optional or name in stored}
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
    for weight, part in parts.items():
        if weight in stored and stored[weight].dtype not in part.dtypes:
            raise Unsupported(spec.name, [f"weight {weight} must be {' or '.join(part.dtypes)}, but is {stored[weight].dtype}"])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class CheckpointWeights:
    """Tensors of a checkpoint, memory-mapped: nothing is read until its elements are used.

    CPU tensors share the file's pages (copy on write) with every later call: clone one before changing it in place.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = frozenset(weight_shapes(checkpoint.spec))
        self._parts = stored_parts(checkpoint.spec, checkpoint.scheme)
        self._open_files: dict[Path, Any] = {}
        if checkpoint.spec.tied_head and "lm_head.weight" in checkpoint.stored:
            self._require_equal_heads()

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        """The named weight on `device` in the checkpoint's own dtype, a quantised one as fp32; KeyError if there is no such weight."""
        if name not in self._names:
            raise KeyError(name)
        if weight_format(self._checkpoint.spec, name):
            return dequantise(self.quantised(name, device))
        tied = self._checkpoint.spec.tied_head and name == "head"
        return self._stored(checkpoint_name("embed" if tied else name)).to(device)

    def quantised(self, name: str, device: str = "cpu") -> QuantisedMatrix:
        """The named weight as codes, scales and zeros; KeyError if it is not stored so, `Unsupported` for groups that are permuted.

        `DamagedCheckpoint` where the codes are of another shape than the model's.
        """
        spec, scheme, module = self._checkpoint.spec, self._checkpoint.scheme, module_name(name)
        form = weight_format(spec, name)
        if scheme is None or form is None:
            raise KeyError(name)
        shape = weight_shapes(spec)[name]
        names = {part.name: f"{module}.{part.name}" for part in scheme.parts(*shape)}
        present = {part: stored for part, stored in names.items() if stored in self._parts and stored in self._checkpoint.stored}
        matrix = scheme.read(module, {part: self._stored(stored).to(device) for part, stored in present.items()}, form)
        if tuple(matrix.codes.shape) != shape:
            what = f"{module} must have codes of shape {list(shape)} by config.json, but has {list(matrix.codes.shape)}"
            raise DamagedCheckpoint(f"model {spec.name}: {what}; fetch the checkpoint again")
        return matrix

    @property
    def digest(self) -> str:
        """A content id: equal digests mean equal configs and weights. Reads the weight files."""
        return folder_digest(self._checkpoint)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        """fp32 [rows, head_dim / 2, 2] of (cos, sin)."""
        return rope_table(self._checkpoint.config, rows, device)

    def _stored(self, stored_name: str) -> torch.Tensor:
        file = self._checkpoint.stored[stored_name].file
        if file not in self._open_files:
            self._open_files[file] = _open(file)
        tensor: torch.Tensor = self._open_files[file].get_tensor(stored_name)
        if tensor.is_floating_point() and tensor.element_size() > 1 and tensor.numel():
            self._require_numbers(stored_name, tensor)
        return tensor

    def _require_numbers(self, stored_name: str, tensor: torch.Tensor) -> None:
        least, most = (float(bound) for bound in tensor.aminmax())
        if not (math.isfinite(least) and math.isfinite(most)):
            what = f"tensor {stored_name}: every element must be a number, but some are NaN or infinite"
            raise DamagedCheckpoint(f"model {self._checkpoint.spec.name}: {what}")

    def _require_equal_heads(self) -> None:
        """A tied model that stores its head anyway must store the embedding there: transformers would use both."""
        spec = self._checkpoint.spec
        embed, head = (self._stored(checkpoint_name(name)) for name in ("embed", "head"))
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
