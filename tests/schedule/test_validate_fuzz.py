"""The validator never raises: whatever a program's fields hold, it answers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from random import Random
from typing import Any

import pytest

from amk.eval.soundness.random_stretches import random_stretch
from amk.isa.instruction import Instruction
from amk.isa.stretch_glu import StretchGlu
from amk.isa.stretch_matmul import StretchMatMul
from amk.schedule.program import Program
from amk.schedule.proven import ValidProgram
from amk.schedule.validate import Rejection, validate
from amk.tests.schedule.builder import Sizes, changed, changed_all, decoder, find

DECODER = decoder(Sizes())
STRETCHES = (random_stretch(Random(seed)) for seed in range(99))
STRETCH = next(made for made in STRETCHES if find(made, StretchGlu) and isinstance(validate(made), ValidProgram))
PROGRAMS = (DECODER, STRETCH)
CLASSES = sorted({type(task) for program in PROGRAMS for queue in program.queues for task in queue}, key=lambda cls: cls.stem)
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


@pytest.mark.parametrize("start", PROGRAMS, ids=("decoder", "stretch"))
@pytest.mark.parametrize("strange", (False, True), ids=("integers", "anything"))
@pytest.mark.parametrize("seed", range(8))
def test_it_never_raises_on_spoiled_fields(seed: int, strange: bool, start: Program) -> None:
    random = Random(seed)
    for _ in range(60):
        program = start
        for _ in range(random.choice((1, 1, 1, 2, 5))):
            table = random.choice((*TABLES, "queues", "queues", "arena_packets", "scratch_bytes"))
            program = replace(program, **{table: spoiled(getattr(program, table), random, strange)})
        answer(program)


@pytest.mark.parametrize("program", PROGRAMS, ids=("decoder", "stretch"))
@pytest.mark.parametrize("table", TABLES)
def test_it_never_raises_on_empty_or_absent_tables(table: str, program: Program) -> None:
    for value in ((), None, 0, "text", [1], ((),), (None,)):
        assert answer(replace(program, **{table: value})) or value in ((), None)


@pytest.mark.parametrize("program", PROGRAMS, ids=("decoder", "stretch"))
@pytest.mark.parametrize("table", ("machine", "kv", "buffers", "matrices", "shapes", "constants"))
def test_every_integer_of_a_table_may_be_any_integer(table: str, program: Program) -> None:
    value = getattr(program, table)
    record = value[0] if isinstance(value, tuple) else value
    for name in (f.name for f in fields(record) if type(getattr(record, f.name)) is int):
        for number in INTEGERS:
            other = replace(record, **{name: number})
            answer(replace(program, **{table: (other, *value[1:]) if isinstance(value, tuple) else other}))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.stem)
def test_every_word_of_a_task_may_be_any_integer(cls: type[Instruction]) -> None:
    program = STRETCH if cls.gated else DECODER
    at = find(program, cls)[-1]
    for name in (f.name for f in fields(cls)):
        for number in INTEGERS:
            answer(changed(program, at, **{name: number}))


@pytest.mark.parametrize("cols", (1 << 20, (1 << 31) - 1))
def test_matrices_and_layers_of_a_stretch_may_be_of_any_size(cols: int) -> None:
    tasks = find(STRETCH, StretchMatMul, weight=0)
    matrices = (replace(STRETCH.matrices[0], cols=cols), *STRETCH.matrices[1:])
    assert answer(changed_all(replace(STRETCH, matrices=matrices), dict.fromkeys(tasks, {"cols": cols})))
    for sizes in ({"heads": 1 << 30, "kv_heads": 1 << 30, "head_dim": 16}, {"batch": 0xFFF8}):
        assert answer(replace(STRETCH, machine=replace(STRETCH.machine, **sizes)))  # type: ignore[arg-type]
    assert answer(replace(STRETCH, kv=replace(STRETCH.kv, layers=cols)))


def test_empty_queues_are_a_program_without_outputs() -> None:
    empty = tuple(() for _ in DECODER.queues)
    found = answer(replace(DECODER, queues=empty, streams=empty))
    assert {r.kind for r in found} == {"coverage"}
    nothing = replace(DECODER, queues=empty, streams=empty, matrices=(), kv=replace(DECODER.kv, layers=0))
    assert answer(nothing) == ()
