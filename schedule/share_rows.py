"""Pass 7: gate and up whose tiles the consumer warps share out whole, where that is possible and most warps get one.

Measured on an H200 (docs/performance-log.md, v12). It comes last, as it asks how stages cut a tile; nothing but the instruction changes.
"""

from __future__ import annotations

from dataclasses import replace

from amk.isa.gemv_glu import GemvGlu
from amk.isa.gemv_glu_rows import GemvGluRows, rows_possible
from amk.isa.instruction import Instruction
from amk.schedule.program import Program

LEAST_SHARE = 1 / 2  # of the warps must have a tile in a round


def share_rows(program: Program) -> Program:
    """The program with `gemv_glu_rows` in place of each `gemv_glu` that may be one."""
    queues = tuple(tuple(_shared(task, program) for task in queue) for queue in program.queues)
    return replace(program, queues=queues) if queues != program.queues else program


def _shared(task: Instruction, program: Program) -> Instruction:
    machine = program.machine
    if type(task) is not GemvGlu or not rows_possible(machine, task.cols, task.flags):
        return task
    if min(task.tiles, machine.stages) < LEAST_SHARE * machine.consumer_warps:
        return task
    rows = GemvGluRows.of(task)
    return rows if rows.shared_bytes(machine) <= program.scratch_bytes else task
