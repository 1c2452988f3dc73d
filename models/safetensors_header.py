"""The header of a safetensors file, read and checked against the file's size, without torch.

Format: https://huggingface.co/docs/safetensors: 8 bytes of little-endian header length, a JSON header, then the data.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amk.models.errors import DamagedCheckpoint

_ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `dtype` as safetensors spells it (BF16, F16, F32, ...), shape, and the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of the file by its name; `DamagedCheckpoint` when the file cannot be read or is not as long as it says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            text = file.read(length) if length <= size - 8 else b""
    except OSError as error:
        raise DamagedCheckpoint(f"{path} cannot be read: {error.strerror}; fetch the checkpoint again") from error
    if size < 8 or length > size - 8:
        raise DamagedCheckpoint(f"{path} is truncated: its header does not fit its {size} bytes; fetch the checkpoint again")
    return _entries(path, text, size - 8 - length)


def _entries(path: Path, text: bytes, data_bytes: int) -> dict[str, StoredTensor]:
    try:
        header: dict[str, dict[str, Any]] = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: StoredTensor(path, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
        spans = {name: (int(entry["data_offsets"][0]), int(entry["data_offsets"][1])) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise DamagedCheckpoint(f"{path} has a broken safetensors header; fetch the checkpoint again") from error
    for name, (begin, end) in spans.items():
        expected = math.prod(tensors[name].shape) * _ELEMENT_BYTES.get(tensors[name].dtype, 0)
        if tensors[name].dtype in _ELEMENT_BYTES and end - begin != expected:
            raise DamagedCheckpoint(f"{path} gives {name} {end - begin} bytes where its shape needs {expected}; fetch it again")
    needed = max((end for _, end in spans.values()), default=0)
    if needed != data_bytes:
        raise DamagedCheckpoint(f"{path} must hold {needed} bytes of tensors, but holds {data_bytes}; fetch the checkpoint again")
    return tensors
