"""Identity of programs: hashes over what is executed and nothing else, so that configs that realise the same program share an id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, fields
from functools import cache
from operator import attrgetter
from struct import Struct, error

from amk.isa.abi import Field
from amk.isa.instruction import Instruction
from amk.isa.registry import encode, opcodes, task_dtype, word_fields
from amk.schedule.program import Program

STRUCT_CODE = {"u16": "H", "i32": "i", "u32": "I", "ptr": "Q"}
ID_CHARACTERS = 12


def program_digest(program: Program) -> str:
    """SHA-256 (64 hex characters) of all that decides what the machine computes, where and in which order.

    Names of buffers and counters are not in it; names of weights are, for they say what is packed.
    """
    return _hash([_facts(program), *_queue_bytes(program)])


def schedule_id(program: Program) -> str:
    """12 hex characters for the program with the kernel knobs that only the device code reads."""
    return _hash([program_digest(program).encode(), _json(asdict(program.device))])[:ID_CHARACTERS]


def encode_tasks(tasks: Iterable[Instruction]) -> bytes:
    """The records of tasks, one after another: what `isa.registry.encode` gives for each, at a tenth of its time.

    OverflowError if a field does not fit its type.
    """
    try:
        return b"".join(_packer(type(task))(task) for task in tasks)
    except error:
        return b"".join(encode(task) for task in tasks)  # names the field


@cache
def _packer(cls: type[Instruction]) -> Callable[[Instruction], bytes]:
    dtype, words, opcode = task_dtype(cls), word_fields(cls), opcodes()[cls]
    assert dtype.fields is not None
    pack = Struct(_format(words, [int(dtype.fields[f.name][1]) for f in words], dtype.itemsize)).pack
    values = attrgetter(*(f.name for f in words[1:]))
    assert {f.name for f in words[1:]} == {f.name for f in fields(cls)}
    return lambda task: pack(opcode, *values(task))


def _format(words: tuple[Field, ...], offsets: list[int], size: int) -> str:
    """The struct format of a record whose fields lie at `offsets`."""
    text, at = "<", 0
    for field, offset in zip(words, offsets, strict=True):
        code = STRUCT_CODE[field.ctype]
        text += f"{offset - at}x{code}"
        at = offset + Struct("<" + code).size
    return f"{text}{size - at}x"


def _facts(program: Program) -> bytes:
    return _json(
        {
            "machine": _machine(program),
            "buffers": [(b.kind, b.offset, b.packets, b.space) for b in program.buffers],
            "arena_packets": program.arena_packets,
            "matrices": [(m.sources, m.layout, m.rows, m.cols, m.weights and m.weights.flags) for m in program.matrices],
            "shapes": [(s.cols, s.flags) for s in program.shapes],
            "constants": [(c.sources, c.layout, c.start, c.count) for c in program.constants],
            "kv": asdict(program.kv),
            "counters": len(program.counters),
            "scratch_bytes": program.scratch_bytes,
            "streams": program.streams,
        }
    )


def _machine(program: Program) -> dict[str, object]:
    """The machine's fields; what programs of one token have alike is left out, so that they keep their ids."""
    alike = {"batch": 1, "prefill": False, "slot": 0}
    return {name: value for name, value in asdict(program.machine).items() if name not in alike or value != alike[name]}


def _queue_bytes(program: Program) -> Iterable[bytes]:
    return (encode_tasks(queue) for queue in program.queues)


def _json(facts: object) -> bytes:
    return json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()


def _hash(parts: list[bytes]) -> str:
    """A hash that depends on where each part ends."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
