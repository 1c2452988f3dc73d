"""The binary interface: one list of fields per record renders the numpy dtype, the C struct and the hash the binary carries."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeAlias, get_args, get_type_hints

import numpy as np

U16: TypeAlias = Annotated[int, "u16"]
I32: TypeAlias = Annotated[int, "i32"]
U32: TypeAlias = Annotated[int, "u32"]
PTR: TypeAlias = Annotated[int, "ptr"]

NUMPY_TYPE = {"u16": "<u2", "i32": "<i4", "u32": "<u4", "ptr": "<u8"}
C_TYPE = {"u16": "uint16_t", "i32": "int32_t", "u32": "uint32_t", "ptr": "uint64_t"}
BYTES = {"u16": 2, "i32": 4, "u32": 4, "ptr": 8}
TASK_BYTES = 64  # one task record in shared memory, whatever its instruction
NONE = 0xFFFF  # a buffer, counter or tag field that names nothing


@dataclass(frozen=True)
class Field:
    """One integer of a record: its name and its type on the device."""

    name: str
    ctype: str


def record_fields(record: type[Any]) -> tuple[Field, ...]:
    """The ABI fields of a dataclass whose integer fields are annotated U16, I32, U32 or PTR; others are not part of it."""
    hints = get_type_hints(record, include_extras=True)
    typed = ((f.name, get_args(hints[f.name])) for f in fields(record))
    return tuple(Field(name, args[1]) for name, args in typed if len(args) == 2 and args[1] in C_TYPE)


def record_dtype(name: str, record_fields: tuple[Field, ...], total: int | None = None) -> np.dtype[Any]:
    """The numpy dtype of a record with the C compiler's natural alignment; ValueError if it needs more than `total` bytes."""
    offsets, at = [], 0
    for field in record_fields:
        at += -at % BYTES[field.ctype]
        offsets.append(at)
        at += BYTES[field.ctype]
    size = total if total is not None else at + -at % 8
    if at > size:
        raise ValueError(f"record {name}: must fit {size} bytes, but its fields need {at}; drop or narrow a field")
    return np.dtype(
        {
            "names": [f.name for f in record_fields],
            "formats": [NUMPY_TYPE[f.ctype] for f in record_fields],
            "offsets": offsets,
            "itemsize": size,
        }
    )


def record_header(name: str, record_fields: tuple[Field, ...], dtype: np.dtype[Any]) -> str:
    """The C struct of a record with asserts on its size and on every offset."""
    lines = [f"struct alignas({_alignment(dtype)}) {name} {{"]
    lines += [f"  {C_TYPE[f.ctype]} {f.name};" for f in record_fields]
    lines += ["};", f'static_assert(sizeof({name}) == {dtype.itemsize}, "{name} must have the size that the host packs");']
    assert dtype.fields is not None
    for f in record_fields:
        offset = dtype.fields[f.name][1]
        lines.append(f'static_assert(offsetof({name}, {f.name}) == {offset}, "{name}.{f.name} must lie where the host packs it");')
    return "\n".join(lines)


def _alignment(dtype: np.dtype[Any]) -> int:
    return 64 if dtype.itemsize == 64 else 8


def text_hash(*texts: str) -> int:
    """32 bits of the SHA-256 of texts, never 0: what the binary carries and the host compares."""
    digest = hashlib.sha256("\x00".join(texts).encode()).digest()
    return int.from_bytes(digest[:4], "little") | 1
