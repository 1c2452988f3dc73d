"""The weight stream: its order is the queue's, and every chunk fits a stage."""

from __future__ import annotations

from typing import Any

import numpy as np

from amk.isa.attention import Attention
from amk.isa.instruction import Instruction
from amk.isa.machine import FRAGMENT_BYTES
from amk.isa.matvec import MatVec
from amk.schedule.proof.report import Report
from amk.schedule.proof.subject import Subject

COPY_BYTES = 16  # bulk copies begin at multiples of this


def check_streams(subject: Subject, report: Report) -> None:
    """The chunk that a consumer takes next is the one that its task expects, on every SM."""
    program = subject.program
    for sm, (queue, stream) in enumerate(zip(program.queues, program.streams, strict=True)):
        expected = tuple(index for index, task in enumerate(queue) if task.streamed)
        if stream == expected and all(type(entry) is int for entry in stream):
            continue
        at = next((i for i, (a, b) in enumerate(zip(stream, expected, strict=False)) if a != b), min(len(stream), len(expected)))
        found = _entry(stream, at, len(queue))
        wanted = _entry(expected, at, len(queue))
        tasks = [(sm, entry) for entry in (found, wanted) if isinstance(entry, int)]
        said = f"the stream of SM {sm} must have its queue's order, but its entry {at} is {_told(found)} where the queue has {_told(wanted)}"
        report.add("ring", said, tasks)


def _entry(entries: tuple[Any, ...], at: int, tasks: int) -> int | str:
    if at >= len(entries):
        return "nothing"
    entry = entries[at]
    return entry if type(entry) is int and 0 <= entry < tasks else "no task of this queue"


def _told(entry: int | str) -> str:
    return f"task {entry}" if isinstance(entry, int) else entry


def check_chunks(subject: Subject, report: Report) -> bool:
    """Whether every chunk fits a stage, reported where not; without that no task's chunks or scratch can be told."""
    machine = subject.program.machine
    before = report.found["ring"]
    if machine.stage_bytes % COPY_BYTES:
        report.add("ring", f"machine.stage_bytes must be a multiple of {COPY_BYTES}, but is {machine.stage_bytes}")
    fragments = FRAGMENT_BYTES * machine.consumer_warps
    for words in subject.words:
        if issubclass(words.cls, MatVec) and fragments > machine.stage_bytes:
            said = f"need {fragments} bytes a chunk, one fragment a consumer warp, but a stage has {machine.stage_bytes}"
            report.add("ring", f"{subject.names(words.ids)} {said}", subject.ids(words.ids[:16]))
        elif words.cls is Attention and machine.kv_block_bytes > machine.stage_bytes:
            said = f"stream KV blocks of {machine.kv_block_bytes} bytes, but a stage has {machine.stage_bytes}"
            report.add("ring", f"{subject.names(words.ids)} {said}", subject.ids(words.ids[:16]))
        elif words.cls.streamed and not issubclass(words.cls, MatVec | Attention):
            _own_chunks(subject, words.ids.tolist(), report)
    return report.found["ring"] == before


def _own_chunks(subject: Subject, tasks: list[int], report: Report) -> None:
    machine = subject.program.machine
    for number in tasks:
        largest = max(subject.tasks[number].chunk_bytes(machine, machine.context - 1), default=0)
        if largest > machine.stage_bytes:
            said = f"streams a chunk of {largest} bytes, but a stage has {machine.stage_bytes}"
            report.add("ring", f"{subject.names([number])} {said}", subject.ids([number]))


def scratch_bytes(subject: Subject) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Scratch that each task needs. It depends on few words, so equal ones are asked once."""
    machine = subject.program.machine
    asked: dict[Any, int] = {}
    needs = np.zeros(len(subject.tasks), dtype=np.int64)
    for words in subject.words:
        names = {MatVec: ("cols",), Attention: ("nq",)}
        shared = next((keys for cls, keys in names.items() if issubclass(words.cls, cls)), None)
        if shared is None and words.cls.shared_bytes is Instruction.shared_bytes:
            continue
        keys = zip(*(words.column[name].tolist() for name in shared), strict=True) if shared else [(i,) for i in words.ids.tolist()]
        for number, key in zip(words.ids.tolist(), keys, strict=True):
            if (words.cls, key) not in asked:
                asked[words.cls, key] = subject.tasks[number].shared_bytes(machine)
            needs[number] = asked[words.cls, key]
    return needs
