"""Identity of programs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from amk.isa.registry import encode
from amk.schedule.compile import lower
from amk.schedule.config import config_dict
from amk.schedule.digest import encode_tasks, program_digest, schedule_id
from amk.schedule.knobs import Config
from amk.schedule.program import Buffer, Program
from amk.schedule.targets import small_target
from amk.tests.schedule.configs import config_of
from amk.tests.schedule.specs import BIASED, NORMED, TOY, WINDOWED


@pytest.fixture(scope="module")
def program() -> Program:
    return lower(TOY, Config(), small_target())


@pytest.mark.parametrize("fusion", [(), ("norm", "qkv", "gate_up")])
def test_quick_encoding_is_the_registrys(fusion: tuple[str, ...]) -> None:
    for spec in (BIASED, NORMED, WINDOWED):
        for queue in lower(spec, Config(fusion=fusion), small_target()).queues:
            assert encode_tasks(queue) == b"".join(map(encode, queue))


def test_task_with_a_field_too_large_is_an_error_that_names_it(program: Program) -> None:
    with pytest.raises(OverflowError, match=r"wait_count: must fit uint16, but got 65536"):
        encode_tasks([replace(program.queues[0][0], wait_count=65536)])


def test_id_is_twelve_hex_characters_and_the_same_for_the_canonical_config(program: Program) -> None:
    again = lower(TOY, config_of(config_dict(Config())), small_target())
    assert schedule_id(program) == schedule_id(again)
    assert len(schedule_id(program)) == 12 and int(schedule_id(program), 16) >= 0


def test_names_do_not_count(program: Program) -> None:
    renamed = replace(
        program,
        buffers=tuple(replace(b, name="x") for b in program.buffers),
        counters=tuple("y" for _ in program.counters),
        matrices=tuple(replace(m, name="z") for m in program.matrices),
    )
    assert program_digest(renamed) == program_digest(program)


def swapped(program: Program) -> Program:
    return replace(program, streams=tuple(stream[::-1] for stream in program.streams))


def moved(program: Program) -> Program:
    first, *rest = program.buffers
    return replace(program, buffers=(Buffer(first.name, first.kind, first.offset + 16, first.packets), *rest))


def exchanged(program: Program) -> Program:
    first, second, *rest = program.queues
    return replace(program, queues=(second, first, *rest))


def repacked(program: Program) -> Program:
    return replace(program, matrices=(replace(program.matrices[0], sources=("a",)), *program.matrices[1:]))


@pytest.mark.parametrize(
    "change",
    [
        swapped,
        moved,
        exchanged,
        repacked,
        lambda p: replace(p, scratch_bytes=p.scratch_bytes + 16),
        lambda p: replace(p, machine=replace(p.machine, inflight=p.machine.inflight + 1)),
        lambda p: replace(p, constants=p.constants[1:]),
        lambda p: replace(p, kv=replace(p.kv, rows=16)),
        lambda p: replace(p, queues=(p.queues[0][:-1], *p.queues[1:])),
    ],
)
def test_everything_executed_counts(program: Program, change: Callable[[Program], Program]) -> None:
    assert program_digest(change(program)) != program_digest(program)
    assert schedule_id(change(program)) != schedule_id(program)


def test_kernel_knobs_count_in_the_id_alone(program: Program) -> None:
    other = replace(program, device=replace(program.device, release_early=8))
    assert program_digest(other) == program_digest(program)
    assert schedule_id(other) != schedule_id(program)
