"""The validator never raises: whatever a program's fields hold, it answers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from random import Random
from typing import Any

import pytest

from amk.isa.instruction import Instruction
from amk.schedule.program import Program
from amk.schedule.proven import ValidProgram
from amk.schedule.validate import Rejection, validate
from amk.tests.schedule.builder import Sizes, changed, decoder, find

DECODER = decoder(Sizes())
INTEGERS = (-(1 << 80), -(1 << 31), -17, -1, 0, 1, 2, 15, 16, 17, 0xFFFE, 0xFFFF, 1 << 16, (1 << 31) - 1, 1 << 31, 1 << 63, 1 << 80)
STRANGE: tuple[Any, ...] = (None, "", "x", 1.5, float("nan"), float("inf"), (), ("a",), True, b"\x00", object(), {})
TABLES = ("machine", "buffers", "matrices", "shapes", "constants", "kv", "counters", "queues", "streams")


def spoiled(value: Any, random: Random, strange: bool) -> Any:
    """`value` with one thing somewhere inside replaced by garbage."""
    if is_dataclass(value) and not isinstance(value, type):
        name = random.choice([f.name for f in fields(value) if f.init])
        return replace(value, **{name: spoiled(getattr(value, name), random, strange)})
    if isinstance(value, tuple) and value and random.random() < 0.9:
        at = random.randrange(len(value))
        return (*value[:at], spoiled(value[at], random, strange), *value[at + 1 :])
    if isinstance(value, tuple) and random.random() < 0.5:
        return random.choice(((), value[1:], (*value, *value[:1])))
    return random.choice(STRANGE if strange else INTEGERS)


def answer(program: Program) -> tuple[Rejection, ...]:
    verdict = validate(program)
    assert isinstance(verdict, ValidProgram | tuple)
    if isinstance(verdict, ValidProgram):
        return ()
    assert verdict and all(isinstance(r, Rejection) and r.message.startswith(f"[{r.kind}] ") for r in verdict)
    return verdict


@pytest.mark.parametrize("strange", (False, True), ids=("integers", "anything"))
@pytest.mark.parametrize("seed", range(8))
def test_it_never_raises_on_spoiled_fields(seed: int, strange: bool) -> None:
    random = Random(seed)
    for _ in range(60):
        program = DECODER
        for _ in range(random.choice((1, 1, 1, 2, 5))):
            table = random.choice((*TABLES, "queues", "queues", "arena_packets", "scratch_bytes"))
            program = replace(program, **{table: spoiled(getattr(program, table), random, strange)})
        answer(program)


@pytest.mark.parametrize("table", TABLES)
def test_it_never_raises_on_empty_or_absent_tables(table: str) -> None:
    for value in ((), None, 0, "text", [1], ((),), (None,)):
        assert answer(replace(DECODER, **{table: value})) or value in ((), None)


@pytest.mark.parametrize("table", ("machine", "kv", "buffers", "matrices", "shapes", "constants"))
def test_every_integer_of_a_table_may_be_any_integer(table: str) -> None:
    value = getattr(DECODER, table)
    record = value[0] if isinstance(value, tuple) else value
    for name in (f.name for f in fields(record) if type(getattr(record, f.name)) is int):
        for number in INTEGERS:
            other = replace(record, **{name: number})
            answer(replace(DECODER, **{table: (other, *value[1:]) if isinstance(value, tuple) else other}))


@pytest.mark.parametrize(
    "cls", sorted({type(task) for queue in DECODER.queues for task in queue}, key=lambda cls: cls.stem), ids=lambda cls: cls.stem
)
def test_every_word_of_a_task_may_be_any_integer(cls: type[Instruction]) -> None:
    at = find(DECODER, cls)[-1]
    for name in (f.name for f in fields(cls)):
        for number in INTEGERS:
            answer(changed(DECODER, at, **{name: number}))


def test_empty_queues_are_a_program_without_outputs() -> None:
    empty = tuple(() for _ in DECODER.queues)
    found = answer(replace(DECODER, queues=empty, streams=empty))
    assert {r.kind for r in found} == {"coverage"}
    nothing = replace(DECODER, queues=empty, streams=empty, matrices=(), kv=replace(DECODER.kv, layers=0))
    assert answer(nothing) == ()
