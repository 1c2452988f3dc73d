"""Pass 7: gate and up whose tiles the consumer warps share out whole, where that is possible and most warps get one.

Measured on an H200 (docs/performance-log.md, v12 and v13). It comes last, as it asks how stages cut a tile. What changes is the
instruction, and that nobody counts its arrivals.
"""

from __future__ import annotations

from dataclasses import replace

from amk.isa.abi import NONE
from amk.isa.gemv_glu import GemvGlu
from amk.isa.gemv_glu_rows import GemvGluRows, rows_possible
from amk.isa.instruction import Instruction
from amk.schedule.program import Program

LEAST_SHARE = 1 / 2  # of the warps must have a tile in a round


def share_rows(program: Program) -> Program:
    """The program with `gemv_glu_rows` in place of each `gemv_glu` that may be one."""
    queues = tuple(tuple(_shared(task, program) for task in queue) for queue in program.queues)
    return uncounted(replace(program, queues=queues)) if queues != program.queues else program


def uncounted(program: Program) -> Program:
    """The program without the counters at which only tasks by rows arrive.

    An SM publishes all tiles of such a task at once, and all SMs do so at about the same time: when a counter tells of the
    first, the last are there too. Who reads them is quicker when it looks at their tags from the beginning.
    """
    tasks = [task for queue in program.queues for task in queue]
    counted = {task.done_counter for task in tasks if not task.by_rows}
    gone = {task.done_counter for task in tasks} - counted - {NONE}
    if not gone:
        return program
    left = [counter for counter in range(len(program.counters)) if counter not in gone]
    numbers = {counter: number for number, counter in enumerate(left)}

    def renumbered(task: Instruction) -> Instruction:
        wait, done = numbers.get(task.wait_counter, NONE), numbers.get(task.done_counter, NONE)
        return replace(task, wait_counter=wait, wait_count=task.wait_count if wait != NONE else 0, done_counter=done)

    queues = tuple(tuple(map(renumbered, queue)) for queue in program.queues)
    return replace(program, queues=queues, counters=tuple(program.counters[counter] for counter in left))


def _shared(task: Instruction, program: Program) -> Instruction:
    machine = program.machine
    if type(task) is not GemvGlu or not rows_possible(machine, task.cols, task.flags):
        return task
    if min(task.tiles, machine.stages) < LEAST_SHARE * machine.consumer_warps:
        return task
    rows = GemvGluRows.of(task)
    return rows if rows.shared_bytes(machine) <= program.scratch_bytes else task
