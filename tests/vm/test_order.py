"""The legal order of whole tasks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from amk.isa.abi import NONE
from amk.isa.instruction import Access
from amk.isa.machine import kv_span
from amk.isa.matvec import MatVec
from amk.schedule.program import Program
from amk.vm.order import legal_order, widest_positions


def packets(program: Program, access: Access) -> set[tuple[int, int]]:
    """(packet of the arena, tag) pairs of an access."""
    offset = program.buffers[access.buffer].offset
    return {(offset + packet, access.tag) for packet in range(access.start, access.stop)}


@pytest.mark.parametrize("position", [0, 31, 32, 100, 255])
def test_every_checked_packet_is_published_earlier(position: int, make_spec: Any, make_program: Any) -> None:
    program = make_program(make_spec(windows=(None, 60)), kv_block=16, kv_splits=4)
    published: set[tuple[int, int]] = set()
    for task in legal_order(program):
        for access in task.reads(program.machine, position):
            assert access.carried or packets(program, access) <= published
        for access in task.writes(program.machine, position):
            published |= packets(program, access)


def test_merged_products_publish_what_their_slices_do_and_nothing_is_lost(make_spec: Any, make_program: Any) -> None:
    program = make_program(make_spec(hidden=128, intermediate=320), sms=5)
    order = legal_order(program)
    tasks = [task for queue in program.queues for task in queue]
    assert len(order) < len(tasks)

    def tiles(some: list[Any]) -> Counter[tuple[int, int]]:
        return Counter((t.weight, t.tile0 + tile) for t in some if isinstance(t, MatVec) for tile in range(t.tiles))

    def others(some: list[Any]) -> Counter[Any]:
        return Counter(t for t in some if not isinstance(t, MatVec))

    assert tiles(order) == tiles(tasks)
    assert others(order) == others(tasks)
    assert all(task.wait_counter == NONE or task in tasks or isinstance(task, MatVec) for task in order)


@pytest.mark.parametrize("window", [0, 5, 16, 17, 40, 47, 100])
@pytest.mark.parametrize("context", [16, 48, 64, 256])
def test_the_last_16_positions_have_the_most_active_splits(window: int, context: int, make_spec: Any, make_program: Any) -> None:
    machine = replace(make_program(make_spec()).machine, context=context)
    units = [kv_span(position, window, 16, 99).units for position in range(context)]
    assert max(units) == max(units[position] for position in widest_positions(machine))
