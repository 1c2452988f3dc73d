"""Buffers laid over each other: the validator and the orders of the actors must agree on which may share packets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from amk.schedule.program import Program
from amk.schedule.validate import ValidProgram, validate
from amk.vm.interface import LaunchFailed
from amk.vm.reference import UnprovenVM
from amk.vm.scheduler import ORDERS, adversarial

START = 50  # both splits have rows to stream


def overlapped(program: Program) -> Iterator[tuple[str, Program]]:
    """The program with each pair of its buffers at one place."""
    room = program.arena_packets + max(buffer.packets for buffer in program.buffers)
    for a, b in combinations(range(len(program.buffers)), 2):
        buffers = list(program.buffers)
        buffers[b] = replace(buffers[b], offset=buffers[a].offset)
        yield f"{buffers[b].name} over {buffers[a].name}", replace(program, buffers=tuple(buffers), arena_packets=room)


def outcome(program: Program, source: Any, seed: int) -> torch.Tensor | None:
    """Logits of three tokens in one order, or None where the launch hangs."""
    try:
        logits: torch.Tensor = UnprovenVM(program, source, order=adversarial(seed)).decode([1, 2, 3], START, logits=True).logits
    except LaunchFailed:
        return None
    return logits


def test_accepted_overlaps_change_nothing_and_rejected_ones_fail_in_some_order(make_spec: Any, make_program: Any, make_source: Any) -> None:
    spec = make_spec("bf16", layers=1)
    source = make_source(spec)
    program = make_program(spec, sms=2, page_allocation="linear", threads_per_block=128, kv_block=16, kv_splits=2)
    answer = outcome(program, source, 0)
    assert answer is not None
    accepted = 0
    for name, candidate in overlapped(program):
        outcomes = (outcome(candidate, source, seed) for seed in range(4 * len(ORDERS)))
        broken = next((True for logits in outcomes if logits is None or not torch.equal(logits, answer)), False)
        valid = isinstance(validate(candidate), ValidProgram)
        assert broken != valid, name
        accepted += valid
    assert accepted > 5
