"""Shared memory: every task's scratch, and the block's whole layout, within the card."""

from __future__ import annotations

import numpy as np

from amk.schedule.program import Program
from amk.schedule.proof.limits import Limits
from amk.schedule.proof.report import Report
from amk.schedule.proof.ring import scratch_bytes
from amk.schedule.proof.subject import Subject
from amk.schedule.resources import shared_layout


def check_scratch(subject: Subject, report: Report) -> None:
    """Every task's scratch within `scratch_bytes`; asked for only where all chunks fit their stage."""
    needs, given = scratch_bytes(subject), subject.program.scratch_bytes
    for number in np.flatnonzero(needs > given).tolist():
        said = f"needs {needs[number]} bytes of scratch, but the program has {given}"
        report.add("resources", f"{subject.names([number])} {said}", subject.ids([number]))


def check_shared(program: Program, limits: Limits, report: Report) -> None:
    """The sum over a block's shared memory within the card's."""
    need = shared_layout(program).total
    if need > limits.shared_bytes:
        fullest = max(range(len(program.queues)), key=lambda sm: len(program.queues[sm]), default=0)
        tasks = len(program.queues[fullest]) if program.queues else 0
        said = f"a block needs {need} bytes of shared memory (SM {fullest} has {tasks} tasks), but the card gives {limits.shared_bytes}"
        report.add("resources", said)
