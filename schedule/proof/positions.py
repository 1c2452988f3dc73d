"""Positions: which splits of each attention task are at work, and the one footprint that stands for every position.

Only attention depends on the position: splits from `active_splits` on touch nothing, and the tail reads that many partials fewer. The proof
looks at one *fullest* token, in which every split works that works at some position. Other positions follow from it, because taking an
idle split out of the fullest token
- takes reads, publishes and waits away and adds none, so what ended still ends;
- breaks no order among the tasks left: whatever came after the split's publish came after the tail, which reads the publish,
  and whatever came before it came before the q packets, which the tail reads with the same tag (check_splits);
- leaves no reader without its publish: only the tail reads partials, and just those of working splits (check_partials).
This holds for each token of a launch on its own, so for every sequence of positions.
"""

from __future__ import annotations

import numpy as np

from amk.isa.attention import Attention
from amk.isa.machine import KV_BLOCK_ROWS, kv_span
from amk.schedule.proof.subject import Flags, Ints, Subject


def fullest_positions(subject: Subject) -> Ints:
    """For each task a position at which it touches most: one of the last 16, as the KV blocks of a window repeat after 16 rows."""
    context = subject.program.machine.context
    last = range(max(0, context - KV_BLOCK_ROWS), context)
    positions = np.zeros(len(subject.tasks), dtype=np.int64)
    best: dict[tuple[int, int, int], int] = {}
    for words in subject.words:
        if words.cls is not Attention:
            continue
        keys = zip(*(words.column[name].tolist() for name in ("window", "unit_rows", "splits")), strict=True)
        for number, (window, unit_rows, splits) in zip(words.ids.tolist(), keys, strict=True):
            key = (window, unit_rows, splits)
            if key not in best:
                best[key] = max((kv_span(p, window, unit_rows, splits).units, p) for p in last)[1]
            positions[number] = best[key]
    return positions


def silent_tasks(subject: Subject, positions: Ints) -> Flags:
    """Attention tasks that stream no KV rows at any position: the window never has a unit for their split."""
    silent = np.zeros(len(subject.tasks), dtype=bool)
    for words in subject.words:
        if words.cls is Attention:
            for i in words.ids.tolist():
                silent[i] = not subject.tasks[i].streamed_blocks(int(positions[i]))
    return silent
