"""The weight stream: its order is the queue's, and every chunk fits a stage."""

from __future__ import annotations

from typing import Any

import numpy as np

from amk.isa.attention import Attention
from amk.isa.instruction import Instruction
from amk.isa.machine import KV_BLOCK_ROWS, KV_STREAM_LAG, piece_of
from amk.isa.matmul import MatMul
from amk.isa.matvec import MatVec
from amk.isa.weight_format import FORMAT_FLAGS, format_of
from amk.schedule.proof.report import Region, Report
from amk.schedule.proof.subject import Flags, Ints, Subject, Words
from amk.schedule.proof.tables import COPY_BYTES


def check_streams(subject: Subject, silent: Flags, report: Report) -> None:
    """The chunk that a consumer takes next is the one that its task expects, on every SM. `silent` tasks stream nothing at any position."""
    program, first = subject.program, 0
    for sm, (queue, stream) in enumerate(zip(program.queues, program.streams, strict=True)):
        quiet = set(np.flatnonzero(silent[first : first + len(queue)]).tolist())
        first += len(queue)
        expected = [index for index, task in enumerate(queue) if task.streamed and index not in quiet]
        entries = [_entry(entry, len(queue)) for entry in stream]
        found = [entry for entry in entries if not (entry in quiet and queue[int(entry)].streamed)]
        if found != expected:
            at = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
            _report_order(sm, at, found, expected, report)


def _entry(entry: object, tasks: int) -> int:
    """The place in the queue that a stream entry names, -1 for none."""
    return entry if type(entry) is int and 0 <= entry < tasks else -1


def _report_order(sm: int, at: int, found: list[int], expected: list[int], report: Report) -> None:
    is_, wanted = (entries[at] if at < len(entries) else None for entries in (found, expected))
    tasks = [(sm, entry) for entry in (is_, wanted) if entry is not None and entry >= 0]
    said = f"the stream of SM {sm} must have its queue's order, but where the queue goes on with {_told(wanted)} it has {_told(is_)}"
    report.add("ring", said, tasks)


def _told(entry: int | None) -> str:
    if entry is None:
        return "nothing"
    return f"task {entry}" if entry >= 0 else "an entry that is no task of this queue"


def check_chunks(subject: Subject, silent: Flags, report: Report) -> bool:
    """Whether every chunk fits a stage, reported where not; without that no task's chunks or scratch can be told."""
    machine = subject.program.machine
    before = report.found["ring"]
    if machine.stage_bytes % COPY_BYTES:
        report.add("ring", f"machine.stage_bytes must be a multiple of {COPY_BYTES}, but is {machine.stage_bytes}")
    for words in subject.words:
        ids = words.ids[~silent[words.ids]]
        if issubclass(words.cls, MatVec):
            _matvec_chunks(subject, words, silent, report)
        elif words.cls is Attention:
            _chunk(subject, ids, machine.kv_block_bytes, "KV blocks of", report)
        elif words.cls.streamed:
            _own_chunks(subject, ids.tolist(), report)
    return report.found["ring"] == before


def _chunk(subject: Subject, ids: Ints, size: int, what: str, report: Report) -> None:
    stage = subject.program.machine.stage_bytes
    if len(ids) and size > stage:
        report.add("ring", f"{subject.names(ids)} stream {what} {size} bytes, but a stage has {stage}", subject.ids(ids[:16]))


def _matvec_chunks(subject: Subject, words: Words, silent: Flags, report: Report) -> None:
    """Chunks of a product hold at least one piece of each consumer warp; pieces differ by weight format."""
    machine = subject.program.machine
    formats = words.column["flags"] & FORMAT_FLAGS
    for flags in np.unique(formats).tolist():
        piece = piece_of(machine, format_of(flags))
        ids = words.ids[(formats == flags) & ~silent[words.ids]]
        _chunk(subject, ids, piece.bytes * machine.consumer_warps + piece.tail, "chunks of one piece a consumer warp,", report)


def _own_chunks(subject: Subject, tasks: list[int], report: Report) -> None:
    machine = subject.program.machine
    for number in tasks:
        largest = max(subject.tasks[number].chunk_bytes(machine, machine.context - 1), default=0)
        if largest > machine.slot_bytes:
            said = f"streams a chunk of {largest} bytes, but a slot of the ring has {machine.slot_bytes}"
            report.add("ring", f"{subject.names([number])} {said}", subject.ids([number]))


def check_lag(subject: Subject, silent: Flags, report: Report) -> None:
    """A KV row may be streamed KV_STREAM_LAG tokens after its own; that token must have ended, and none may wait for its own end."""
    lag = subject.program.machine.kv_lag
    streaming = [i for words in subject.words if words.cls is Attention for i in words.ids[~silent[words.ids]].tolist()]
    if not streaming:
        return
    if lag > KV_STREAM_LAG:
        position = 2 * KV_BLOCK_ROWS  # the first one that streams rows
        row = position - KV_STREAM_LAG
        task = subject.tasks[streaming[0]]
        region = Region(f"L{getattr(task, 'layer', 0)} KV rows", row, row + 1)
        told = f"stream {region} at position {position}, but wait only for the end of position {position - lag} (machine.kv_lag {lag})"
        report.add("race", f"{subject.names(streaming)} {told}", subject.ids(streaming[:16]), [region])
    if lag < 1:
        said = f"machine.kv_lag must be at least 1, but is {lag}: {subject.names(streaming)} would wait for the end of their own token"
        report.add("deadlock", said, subject.ids(streaming[:16]))


def scratch_bytes(subject: Subject) -> Ints:
    """Scratch that each task needs. It depends on few words, so equal ones are asked once."""
    machine = subject.program.machine
    asked: dict[Any, int] = {}
    needs = np.zeros(len(subject.tasks), dtype=np.int64)
    for words in subject.words:
        names = {MatMul: ("cols", "flags", "batch"), MatVec: ("cols", "flags"), Attention: ("nq",)}
        shared = next((keys for cls, keys in names.items() if issubclass(words.cls, cls)), None)
        if shared is None and words.cls.shared_bytes is Instruction.shared_bytes:
            continue
        keys = zip(*(words.column[name].tolist() for name in shared), strict=True) if shared else [(i,) for i in words.ids.tolist()]
        for number, key in zip(words.ids.tolist(), keys, strict=True):
            if (words.cls, key) not in asked:
                asked[words.cls, key] = subject.tasks[number].shared_bytes(machine)
            needs[number] = asked[words.cls, key]
    return needs
