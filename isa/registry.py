"""Every instruction, found by looking at this folder: a module whose `.cuh` of the same stem exists defines one."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from amk.isa.abi import TASK_BYTES, Field, record_dtype, record_fields, record_header
from amk.isa.instruction import Instruction
from amk.isa.matvec import MatVec

FOLDER = Path(__file__).parent
HEADER = (Field("op", "u16"),)


@cache
def instructions() -> dict[str, type[Instruction]]:
    """Instruction classes by stem, in opcode order: alphabetical, those of batches, those that draw and those by rows behind the others."""
    found: dict[str, type[Instruction]] = {}
    for path in sorted(FOLDER.glob("*.cuh")):
        module = import_module(f"amk.isa.{path.stem}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Instruction)]
        found |= {c.stem: c for c in classes if c.stem == path.stem}
    return dict(sorted(found.items(), key=lambda item: (item[1].by_rows, item[1].draws, item[1].batched, item[0])))


@cache
def opcodes() -> dict[type[Instruction], int]:
    """Opcode of each instruction class: 1, 2, ...; none is 0."""
    return {cls: number for number, cls in enumerate(instructions().values(), start=1)}


@cache
def word_fields(cls: type[Instruction]) -> tuple[Field, ...]:
    """The record of an instruction on the device: opcode, then its own integer fields."""
    return HEADER + record_fields(cls)


@cache
def task_dtype(cls: type[Instruction]) -> np.dtype[Any]:
    return record_dtype(cls.__name__, word_fields(cls), TASK_BYTES)


def encode(task: Instruction) -> bytes:
    """The task's 64-byte record; OverflowError if a field does not fit its type."""
    record = np.zeros((), dtype=task_dtype(type(task)))
    record["op"] = opcodes()[type(task)]
    for field in fields(task):
        value = getattr(task, field.name)
        kind = record.dtype[field.name]
        if not np.iinfo(kind).min <= value <= np.iinfo(kind).max:
            raise OverflowError(f"{type(task).__name__}.{field.name}: must fit {kind}, but got {value}")
        record[field.name] = value
    return record.tobytes()


def decode(record: bytes) -> Instruction:
    """The task that `encode` made these 64 bytes from; KeyError if no instruction has the opcode."""
    by_code = {code: cls for cls, code in opcodes().items()}
    cls = by_code[int.from_bytes(record[:2], "little")]
    words = np.frombuffer(record, dtype=task_dtype(cls))[0]
    return cls(**{f.name: int(words[f.name]) for f in fields(cls)})


def headers(batched: bool = False, draws: bool = False, by_rows: bool = False) -> str:
    """C structs of every instruction's record and its opcode, and the words that all matrix-vector products begin with.

    Instructions of batches are left out where the machine computes one token at a time, those that draw, and those by rows, where
    the program has none.
    """
    parts = [record_header("MatVecTask", word_fields(MatVec), task_dtype(MatVec))]
    for cls in instructions().values():
        if cls.batched > batched or cls.draws > draws or cls.by_rows > by_rows:
            continue
        parts.append(record_header(f"{cls.__name__}Task", word_fields(cls), task_dtype(cls)))
        parts.append(f"constexpr uint16_t OP_{cls.stem.upper()} = {opcodes()[cls]};")
    return "\n".join(parts)
