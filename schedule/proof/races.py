"""Every overwrite of a packet comes after what it must: docs/machine.md, "A slot of the arena".

Each piece of the arena has its publishes of one token in a row; after the last comes the first of the next token. A publish must come after
every reader of the value before it. Where that has no reader, nothing can tell that it is there: only its own thread may write again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from amk.schedule.proof.ancestors import EMPTY, Ancestors, Ranks
from amk.schedule.proof.packets import Matching, named
from amk.schedule.proof.report import Region, Report
from amk.schedule.proof.subject import SHOWN, Ints, Subject
from amk.schedule.proof.waits import Nodes


@dataclass(frozen=True)
class Turns:
    """`then[w]` is the written piece that overwrites written piece w; `next_token[w]` whether it does so in the token after."""

    then: Ints
    next_token: np.ndarray[tuple[int], np.dtype[np.bool_]]


def check_overwrites(subject: Subject, m: Matching, nodes: Nodes, ancestors: Ancestors, report: Report) -> None:
    """Reports overwrites that are not ordered after a reader, and unordered writers."""
    if not len(m.written.owner):
        return
    prover = _Prover(subject, m, nodes, ancestors, report, _turns(m, nodes, ancestors))
    prover.readers()
    prover.unread()


def _turns(m: Matching, nodes: Nodes, ancestors: Ancestors) -> Turns:
    written = m.written
    rank = ancestors.rank[nodes.publisher[written.owner]]
    order = np.lexsort((written.owner, rank, written.piece))
    piece = written.piece[order]
    first = np.concatenate([[True], piece[1:] != piece[:-1]])
    start = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    last = np.concatenate([first[1:], [True]])
    following = np.where(last, start, np.arange(len(order)) + 1)
    then = np.zeros(len(order), dtype=np.int64)
    then[order] = order[np.minimum(following, len(order) - 1)]
    next_token = np.zeros(len(order), dtype=bool)
    next_token[order] = last
    return Turns(then, next_token)


class _Prover:
    def __init__(self, subject: Subject, m: Matching, nodes: Nodes, ancestors: Ancestors, report: Report, turns: Turns) -> None:
        self.subject, self.m, self.nodes, self.ancestors, self.report, self.turns = subject, m, nodes, ancestors, report, turns
        self.one_token = subject.program.machine.context == 1 or subject.program.machine.prefill
        self.rank: list[int] = ancestors.rank.tolist()
        rank = ancestors.rank[nodes.reader]
        groups = len(m.groups)
        self.low, self.high = np.full(groups, len(nodes), dtype=np.int64), np.full(groups, -1, dtype=np.int64)
        np.minimum.at(self.low, m.groups.of, rank)
        np.maximum.at(self.high, m.groups.of, rank)
        self.by_group = np.argsort(m.groups.of, kind="stable")
        self.group_offset = np.searchsorted(m.groups.of[self.by_group], np.arange(groups + 1))
        self.base = np.array([s.base for s in ancestors.before], dtype=np.int64)
        self.masks: dict[int, int] = {}
        self.past: dict[int, Ranks] = {}
        self.lacking: dict[tuple[int, int], int] = {}

    def readers(self) -> None:
        """Every reader of a value before the publish that overwrites it."""
        known = np.flatnonzero(self.m.source >= 0)
        source, group = self.m.source[known], self.m.read.owner[known]
        writer = self.m.written.owner[self.turns.then[source]]
        later, carried = self.turns.next_token[source], self.m.groups.carried[group]
        if self.one_token:
            keep = ~later
            known, group, writer, later, carried = known[keep], group[keep], writer[keep], later[keep], carried[keep]
        too_late = carried & ~later  # the value is gone before the token that reads it begins
        here = carried == later  # reader and writer are in one token
        node = self.nodes.publisher[writer]
        settled = here & ~too_late & (self.high[group] < self.base[node])
        pending = np.flatnonzero(~settled)
        key = (group[pending] * len(self.m.writes) + writer[pending]) * 4 + later[pending] * 2 + carried[pending]
        for at in pending[np.unique(key, return_index=True)[1]].tolist():
            g, w = int(group[at]), int(writer[at])
            if too_late[at]:
                missing = self._members(g)
            else:
                missing = self._missing(g, int(node[at]), here=bool(here[at]))
            if missing:
                self._tell_reader(g, missing, w, bool(later[at]), self._region(int(known[at])))

    def _mask(self, group: int) -> int:
        if group not in self.masks:
            low, mask = int(self.low[group]), 0
            for node in self._members(group):
                mask |= 1 << (self.rank[node] - low)
            self.masks[group] = mask
        return self.masks[group]

    def _members(self, group: int) -> list[int]:
        """Nodes that read a group."""
        which = self.by_group[self.group_offset[group] : self.group_offset[group + 1]]
        return np.unique(self.nodes.reader[which]).tolist()  # type: ignore[no-any-return]  # numpy's tolist is not typed by shape

    def _past(self, node: int) -> Ranks:
        """What of the token before a node comes after."""
        carried = self.ancestors.carries[node]
        if carried not in self.past:
            self.past[carried] = self.ancestors.last_token(node) if carried else EMPTY
        return self.past[carried]

    def _missing(self, group: int, node: int, *, here: bool) -> list[int]:
        """Nodes that read a group and are not before a node: its ancestors and itself, or those of the token before."""
        before = self.ancestors.before[node] if here else self._past(node)
        if int(self.high[group]) < before.base:
            return []
        key = (group, id(before))
        if key not in self.lacking:
            self.lacking[key] = before.lacking(int(self.low[group]), self._mask(group))
        lacking = self.lacking[key]
        own = self.rank[node] - before.base
        if here and own >= 0:
            lacking &= ~(1 << own)
        if not lacking:
            return []
        return [n for n in self._members(group) if not before.holds(self.rank[n]) and not (here and n == node)]

    def unread(self) -> None:
        """A value that nobody reads is overwritten by its own publish of the next token alone: a thread's stores to a packet stay in order.

        Another packet of the publish that was read tells nothing about this one.
        """
        read = np.zeros(len(self.m.written.owner), dtype=bool)
        read[self.m.source[self.m.source >= 0]] = True
        old, new = self.m.written.owner, self.m.written.owner[self.turns.then]
        loose = np.flatnonzero(~read & (old != new) & ~(self.turns.next_token & self.one_token))
        key = (old[loose] * len(self.m.writes) + new[loose]) * 2 + self.turns.next_token[loose]
        for at in loose[np.unique(key, return_index=True)[1]].tolist():
            self._tell_writers(int(old[at]), int(new[at]), bool(self.turns.next_token[at]), self._written_region(at))

    def _region(self, read_piece: int) -> Region:
        group = int(self.m.read.owner[read_piece])
        read = int(self.by_group[self.group_offset[group]])
        piece = int(self.m.read.piece[read_piece])
        return named(self.subject, int(self.m.groups.reads.buffer[read]), int(self.m.edges[piece]), int(self.m.edges[piece + 1]))

    def _written_region(self, written_piece: int) -> Region:
        write, piece = int(self.m.written.owner[written_piece]), int(self.m.written.piece[written_piece])
        return named(self.subject, int(self.m.writes.buffer[write]), int(self.m.edges[piece]), int(self.m.edges[piece + 1]))

    def _tell_reader(self, group: int, missing: list[int], write: int, next_token: bool, region: Region) -> None:
        if self.report.full("race"):
            self.report.count("race", 1)
            return
        readers = list(dict.fromkeys(int(self.nodes.task[n]) for n in missing))
        writer = int(self.m.writes.task[write])
        when = " of the next token" if next_token else ""
        said = f"{self.subject.names(readers)} and {self.subject.names([writer])}{when} touch {region} and nothing orders them: "
        tail = f"the publish may overwrite tag {self.m.groups.tag[group]} before it is read"
        self.report.add("race", said + tail, self.subject.ids([*readers[:SHOWN], writer]), [region])

    def _tell_writers(self, old: int, new: int, next_token: bool, region: Region) -> None:
        if self.report.full("race"):
            self.report.count("race", 1)
            return
        a, b = int(self.m.writes.task[old]), int(self.m.writes.task[new])
        when = " of the next token" if next_token else ""
        both = f"{self.subject.names([a])} and {self.subject.names([b])}{when} both publish {region}"
        said = f"{both} and nothing orders them: nobody reads the first"
        self.report.add("race", said, self.subject.ids([a, b]), [region])
