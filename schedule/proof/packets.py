"""Which publish each read checks: the arena cut at the edges of all accesses, and tags matched by equality piece by piece."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amk.schedule.proof.footprint import KIND_NAMES, Accesses, Footprint
from amk.schedule.proof.limits import Limits
from amk.schedule.proof.report import Region, Report
from amk.schedule.proof.subject import Ints, Subject

MOST_EDGES = 1 << 20  # so that two of them, a tag and a kind are one 64-bit key
KEY_KINDS = 32  # at least as many as there are kinds


@dataclass(frozen=True)
class Pieces:
    """Accesses (or groups of equal ones) cut into pieces: `owner` has `piece`, whose packets are [edges[piece], edges[piece + 1])."""

    owner: Ints
    piece: Ints


@dataclass(frozen=True)
class Groups:
    """Reads of the same packets with the same tag are one group; `of[i]` is the group of read i of `reads` (checked reads only)."""

    reads: Accesses
    of: Ints
    start: Ints
    stop: Ints
    tag: Ints
    carried: np.ndarray[tuple[int], np.dtype[np.bool_]]
    kind: Ints

    def __len__(self) -> int:
        return len(self.start)

    def tasks(self, group: int) -> Ints:
        return np.unique(self.reads.task[self.of == group])


@dataclass(frozen=True)
class Matching:
    """`written` are the pieces of publishes, `read` those of groups; piece i of `read` checks piece `source[i]` of `written`, or -1."""

    edges: Ints
    writes: Accesses
    groups: Groups
    written: Pieces
    read: Pieces
    source: Ints

    def region(self, subject: Subject, access: Accesses, owner: int, first: int, last: int) -> Region:
        """Pieces [first, last] of an access, named through its buffer."""
        buffer = int(access.buffer[owner])
        return named(subject, buffer, int(self.edges[first]), int(self.edges[last + 1]))


def named(subject: Subject, buffer: int, start: int, stop: int) -> Region:
    """Packets [start, stop) of the arena as packets of a buffer."""
    found = subject.program.buffers[buffer]
    base = found.offset + (0 if found.space == "arena" else subject.program.arena_packets)
    return Region(found.name, start - base, stop - base)


def match(subject: Subject, footprint: Footprint, limits: Limits, report: Report) -> Matching | None:
    """Matches every checked read with the publishes of its tag; None (reported) if the arena is cut too finely to be proven."""
    reads, writes = footprint.reads.take(footprint.reads.tag > 0), footprint.writes
    edges = np.unique(np.concatenate([reads.start, reads.stop, writes.start, writes.stop]))
    if len(edges) > MOST_EDGES:
        report.add("resources", f"accesses must have at most {MOST_EDGES} edges to be proven, but have {len(edges)}")
        return None
    groups = _groups(reads, edges)
    work = int(_lengths(edges, writes.start, writes.stop).sum() + _lengths(edges, groups.start, groups.stop).sum())
    if work > limits.pieces:
        report.add("resources", f"accesses must have at most {limits.pieces} pieces between them to be proven, but have {work}")
        return None
    written, read = _cut(edges, writes.start, writes.stop), _cut(edges, groups.start, groups.stop)
    matching = Matching(edges, writes, groups, written, read, np.zeros(0, np.int64))
    return _matched(subject, matching, report)


def _groups(reads: Accesses, edges: Ints) -> Groups:
    start, stop = np.searchsorted(edges, reads.start), np.searchsorted(edges, reads.stop)
    key = (((start * (len(edges) + 1) + stop) * (1 << 16) + reads.tag) * KEY_KINDS + reads.kind) * 2 + reads.carried
    _, first, of = np.unique(key, return_index=True, return_inverse=True)
    return Groups(reads, of, reads.start[first], reads.stop[first], reads.tag[first], reads.carried[first], reads.kind[first])


def _lengths(edges: Ints, start: Ints, stop: Ints) -> Ints:
    return np.searchsorted(edges, stop) - np.searchsorted(edges, start)


def _cut(edges: Ints, start: Ints, stop: Ints) -> Pieces:
    lengths = _lengths(edges, start, stop)
    owner = np.repeat(np.arange(len(start), dtype=np.int64), lengths)
    within = np.arange(len(owner), dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return Pieces(owner, np.searchsorted(edges, start)[owner] + within)


def _matched(subject: Subject, m: Matching, report: Report) -> Matching:
    written_key = m.written.piece * (1 << 16) + m.writes.tag[m.written.owner]
    order = np.argsort(written_key, kind="stable")
    keys = written_key[order]
    wanted = m.read.piece * (1 << 16) + m.groups.tag[m.read.owner]
    low, high = np.searchsorted(keys, wanted, "left"), np.searchsorted(keys, wanted, "right")
    source = np.where(high > low, order[np.minimum(low, max(0, len(order) - 1))] if len(order) else -1, -1)
    matched = Matching(m.edges, m.writes, m.groups, m.written, m.read, source)
    _report_unpublished(subject, matched, report)
    twice = np.flatnonzero(high > low + 1)
    second = order[low[twice] + 1]
    _report_twice(subject, matched, twice, second, report)
    _report_kinds(subject, matched, report)
    return matched


def _runs(owner: Ints, piece: Ints) -> list[tuple[int, int, int]]:
    """(position of the first, first piece, last piece) of each run of neighbouring pieces of one owner."""
    if not len(owner):
        return []
    breaks = np.flatnonzero((np.diff(owner) != 0) | (np.diff(piece) != 1)) + 1
    starts = np.concatenate([[0], breaks])
    stops = np.concatenate([breaks, [len(owner)]]) - 1
    return [(int(a), int(piece[a]), int(piece[b])) for a, b in zip(starts, stops, strict=True)]


def _group_region(subject: Subject, m: Matching, group: int, first: int, last: int) -> tuple[Ints, Region]:
    """The tasks of a group and some of its pieces as a region of the buffer that they read."""
    read = int(np.flatnonzero(m.groups.of == group)[0])
    return m.groups.tasks(group), m.region(subject, m.groups.reads, read, first, last)


def _report_unpublished(subject: Subject, m: Matching, report: Report) -> None:
    missing = np.flatnonzero(m.source < 0)
    for at, first, last in _runs(m.read.owner[missing], m.read.piece[missing]):
        if report.full("coverage"):
            report.count("coverage", 1)
            continue
        group = int(m.read.owner[missing[at]])
        tasks, region = _group_region(subject, m, group, first, last)
        verb = "read" if len(tasks) > 1 else "reads"
        said = f"{subject.names(tasks)} {verb} {region} with tag {m.groups.tag[group]}, which nobody publishes"
        report.add("coverage", said, subject.ids(tasks), [region])


def _report_twice(subject: Subject, m: Matching, twice: Ints, second: Ints, report: Report) -> None:
    for at, first, last in _runs(m.read.owner[twice], m.read.piece[twice]):
        if report.full("coverage"):
            report.count("coverage", 1)
            continue
        group = int(m.read.owner[twice[at]])
        tasks, region = _group_region(subject, m, group, first, last)
        a, b = (int(m.writes.task[m.written.owner[w]]) for w in (m.source[twice[at]], second[at]))
        said = f"{subject.names([a, b])} both publish {region} with tag {m.groups.tag[group]}, which {subject.names(tasks)} read"
        report.add("coverage", said, subject.ids([a, b, *tasks]), [region])


def _report_kinds(subject: Subject, m: Matching, report: Report) -> None:
    """Reads through one buffer of what another, overlapping one holds, or of seats in another order than they were written."""
    has = m.writes.kind[m.written.owner[m.source]] if len(m.written.owner) else np.zeros_like(m.source)
    wrong = np.flatnonzero((m.source >= 0) & (has != m.groups.kind[m.read.owner]))
    for at, first, last in _runs(m.read.owner[wrong], m.read.piece[wrong]):
        group = int(m.read.owner[wrong[at]])
        tasks, region = _group_region(subject, m, group, first, last)
        writer = int(m.writes.task[m.written.owner[m.source[wrong[at]]]])
        kinds = KIND_NAMES[m.groups.kind[group]], KIND_NAMES[int(has[wrong[at]])]
        said = f"{subject.names(tasks)} read {region} as {kinds[0]} packets, but {subject.names([writer])} publishes {kinds[1]} there"
        report.add("kind", said, subject.ids([*tasks, writer]), [region])
