"""Every access of every task in the fullest token, as columns: who, which packets of the arena, with which tag."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import get_args

import numpy as np

from amk.isa.instruction import Access, Order
from amk.schedule.proof.report import Region, Report
from amk.schedule.proof.subject import Flags, Ints, Subject

KINDS = {"f32": 0, "narrow": 1, "u32": 2}
# A kind and the order in which a value's packets count are one number: those of a batch interleaved or not, those of a stretch by name.
INTERLEAVED = len(KINDS)
ORDERED = {order: at * len(KINDS) for at, order in enumerate(get_args(Order)[1:], start=2)} | {"": 0}
KIND_NAMES = (*KINDS, *(f"interleaved {kind}" for kind in KINDS), *(f"{kind} ({order})" for order in get_args(Order)[1:] for kind in KINDS))
FIELDS = attrgetter("buffer", "start", "stop", "tag", "kind", "actor", "carried", "tile", "interleaved", "paired", "order")


@dataclass(frozen=True)
class Accesses:
    """Accesses in task order. `start` and `stop` are packets of the arena (buffers of other spaces lie behind it)."""

    task: Ints
    buffer: Ints
    start: Ints
    stop: Ints
    tag: Ints
    kind: Ints
    storer: Flags
    carried: Flags
    tile: Ints
    paired: Flags

    def take(self, which: Flags) -> Accesses:
        return Accesses(*(getattr(self, name)[which] for name in self.__dataclass_fields__))

    def __len__(self) -> int:
        return len(self.task)


@dataclass(frozen=True)
class Footprint:
    """All reads and publishes. Packets are named through the buffers that hold them."""

    reads: Accesses
    writes: Accesses


def take_footprint(subject: Subject, positions: Ints, report: Report) -> Footprint | None:
    """The footprint at each task's position; None (reported) if an access leaves its buffer."""
    machine = subject.program.machine
    reads: list[list[Access]] = []
    writes: list[list[Access]] = []
    for task, position in zip(subject.tasks, positions.tolist(), strict=True):
        reads.append(task.reads(machine, position))
        writes.append(task.writes(machine, position))
    sound = True
    kept = []
    for verb, lists in (("reads", reads), ("publishes", writes)):
        accesses = _columns(lists)
        sound &= _in_bounds(subject, accesses, verb, report)
        accesses = accesses.take(accesses.stop > accesses.start)
        if sound:
            _kinds(subject, accesses, verb, report)
            _pairs(subject, accesses, verb, report)
            _whole(subject, accesses, verb, report)
            sound &= _tags(subject, accesses, verb, report)
            kept.append(_placed(subject, accesses))
    return Footprint(*kept) if sound else None


def _columns(lists: list[list[Access]]) -> Accesses:
    task = np.repeat(np.arange(len(lists), dtype=np.int64), [len(accesses) for accesses in lists])
    rows = [FIELDS(access) for accesses in lists for access in accesses]
    buffer, start, stop, tag, kind, actor, carried, tile, interleaved, paired, order = zip(*rows, strict=True) if rows else ((),) * 11
    kinds = np.array([KINDS[k] for k in kind], dtype=np.int64) + INTERLEAVED * np.array(interleaved, dtype=np.int64)
    kinds += np.array([ORDERED[o] for o in order], dtype=np.int64)
    storer = np.array([a == "storer" for a in actor], dtype=bool)
    buffers, starts, stops, tags, tiles = (np.array(column, dtype=np.int64) for column in (buffer, start, stop, tag, tile))
    flags = (np.array(column, dtype=bool) for column in (carried, paired))
    return Accesses(task, buffers, starts, stops, tags, kinds, storer, next(flags), tiles, next(flags))


def _in_bounds(subject: Subject, accesses: Accesses, verb: str, report: Report) -> bool:
    buffers = subject.program.buffers
    known = accesses.buffer < len(buffers)
    for i in np.flatnonzero(~known).tolist():
        said = f"{subject.names([accesses.task[i]])} {verb} buffer {accesses.buffer[i]}, but the program has {len(buffers)}"
        report.add("bounds", said, subject.ids([accesses.task[i]]))
    packets = np.array([b.packets for b in buffers] or [0], dtype=np.int64)[np.where(known, accesses.buffer, 0)]
    inside = ~known | ((accesses.start >= 0) & (accesses.start <= accesses.stop) & (accesses.stop <= packets))
    for i in np.flatnonzero(~inside).tolist():
        region = Region(buffers[accesses.buffer[i]].name, int(accesses.start[i]), int(accesses.stop[i]))
        said = f"{subject.names([accesses.task[i]])} {verb} {region}, but the buffer has packets 0:{packets[i]}"
        report.add("bounds", said, subject.ids([accesses.task[i]]), [region])
    return bool(known.all() and inside.all())


def _pairs(subject: Subject, accesses: Accesses, verb: str, report: Report) -> None:
    """What the device takes two packets at a time begins at an even one: it would not be one aligned access of 16 bytes."""
    offsets = np.array([b.offset for b in subject.program.buffers] or [0], dtype=np.int64)[accesses.buffer]
    for i in np.flatnonzero(accesses.paired & ((offsets + accesses.start) % 2 != 0)).tolist():
        region = _region(subject, accesses, i)
        who, first = subject.names([accesses.task[i]]), offsets[i] + accesses.start[i]
        said = f"{who} {verb} {region} in pairs, so its first packet in the arena must be even, but is {first}"
        report.add("bounds", said, subject.ids([accesses.task[i]]), [region])


def _whole(subject: Subject, accesses: Accesses, verb: str, report: Report) -> None:
    """Packets with an order of their own lie in it within the whole value, not where they count: who reads them reads all of the buffer."""
    if verb != "reads":
        return
    packets = np.array([b.packets for b in subject.program.buffers] or [0], dtype=np.int64)[accesses.buffer]
    ordered = accesses.kind >= 2 * len(KINDS)
    for i in np.flatnonzero(ordered & ((accesses.start != 0) | (accesses.stop != packets))).tolist():
        region, kind = _region(subject, accesses, i), KIND_NAMES[accesses.kind[i]]
        said = f"{subject.names([accesses.task[i]])} reads {region} as {kind} packets, which is all of a buffer, but this has {packets[i]}"
        report.add("bounds", said, subject.ids([accesses.task[i]]), [region])


def _kinds(subject: Subject, accesses: Accesses, verb: str, report: Report) -> None:
    buffers = subject.program.buffers
    has = np.array([KINDS[b.kind] for b in buffers] or [0], dtype=np.int64)[accesses.buffer]
    for i in np.flatnonzero(has != accesses.kind % len(KINDS)).tolist():
        region = _region(subject, accesses, i)
        asked, held = KIND_NAMES[accesses.kind[i]], KIND_NAMES[has[i]]
        said = f"{subject.names([accesses.task[i]])} {verb} {region} as {asked} packets, but the buffer holds {held}"
        report.add("kind", said, subject.ids([accesses.task[i]]), [region])
    if verb == "publishes":
        fixed = np.array([b.space == "weights" for b in buffers] or [False])[accesses.buffer]
        for i in np.flatnonzero(fixed).tolist():
            region = _region(subject, accesses, i)
            said = f"{subject.names([accesses.task[i]])} publishes to {region}, but that buffer is weights and read-only"
            report.add("kind", said, subject.ids([accesses.task[i]]), [region])


def _tags(subject: Subject, accesses: Accesses, verb: str, report: Report) -> bool:
    tags = subject.program.machine.tags
    beyond = (accesses.tag > tags) | ((accesses.tag == 0) & (verb == "publishes"))
    for i in np.flatnonzero(beyond).tolist():
        region = _region(subject, accesses, i)
        said = f"{subject.names([accesses.task[i]])} {verb} {region} with tag {accesses.tag[i]}, but a token has tags 1 to {tags}"
        report.add("resources", said, subject.ids([accesses.task[i]]), [region])
    if verb == "reads":
        for i in np.flatnonzero(accesses.tag == 0).tolist():
            region = _region(subject, accesses, i)
            said = f"{subject.names([accesses.task[i]])} reads {region} without checking a tag, so nothing orders it after a publish"
            report.add("race", said, subject.ids([accesses.task[i]]), [region])
    return not bool(beyond.any())


def _region(subject: Subject, accesses: Accesses, i: int) -> Region:
    return Region(subject.program.buffers[accesses.buffer[i]].name, int(accesses.start[i]), int(accesses.stop[i]))


def _placed(subject: Subject, accesses: Accesses) -> Accesses:
    arena = subject.program.arena_packets
    offsets = [b.offset + (0 if b.space == "arena" else arena) for b in subject.program.buffers]
    at = np.array(offsets or [0], dtype=np.int64)[accesses.buffer]
    columns = {name: getattr(accesses, name) for name in accesses.__dataclass_fields__}
    return Accesses(**columns | {"start": accesses.start + at, "stop": accesses.stop + at})
