"""Every output is computed exactly once: matrix rows, the head's candidates, KV heads and the rows of their windows."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from amk.isa.attention import PARTIAL_HEAD, Attention
from amk.isa.draw import Draw
from amk.isa.draw_head import DrawHead
from amk.isa.filter_draw import FilterDraw
from amk.isa.filter_head import FilterHead
from amk.isa.gemm_head import GemmHead
from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Instruction
from amk.isa.machine import TILE_ROWS
from amk.isa.matvec import MatVec
from amk.isa.sample import Sample
from amk.isa.sample_batch import SampleBatch
from amk.schedule.proof.packets import Matching
from amk.schedule.proof.report import Region, Report
from amk.schedule.proof.subject import SHOWN, Flags, Ints, Subject

HEAD_OF: dict[type[Instruction], type[Instruction]] = {
    Sample: GemvHead,
    Draw: DrawHead,
    FilterDraw: FilterHead,
    SampleBatch: GemmHead,
}
ALIKE = ("q0", "nq", "window", "unit_rows", "splits", "part_buf", "part_tag", "q_buf", "q_tag")


def check_matrices(subject: Subject, known: Flags, report: Report) -> None:
    """Tiles of each matrix, by tasks whose words agree with it: all, and each once."""
    found = [w for w in subject.words if issubclass(w.cls, MatVec)]
    columns = [np.concatenate([np.zeros(0, np.int64), *(w.column[n][known[w.ids]] for w in found)]) for n in ("weight", "tile0", "tiles")]
    ids = np.concatenate([np.zeros(0, np.int64), *(w.ids[known[w.ids]] for w in found)])
    by_matrix: list[list[tuple[int, int, int]]] = [[] for _ in subject.program.matrices]
    for weight, tile0, tiles, task in zip(*(c.tolist() for c in columns), ids.tolist(), strict=True):
        by_matrix[weight].append((tile0, tile0 + tiles, task))
    for matrix, parts in zip(subject.program.matrices, by_matrix, strict=True):
        tiles = -(-matrix.rows // TILE_ROWS)
        for first, stop, tasks in uneven(sorted(parts), tiles):
            region = Region(matrix.name, first * TILE_ROWS, min(matrix.rows, stop * TILE_ROWS))
            said = f"{subject.names(tasks)} all compute rows {region}" if tasks else f"no task computes rows {region}"
            report.add("coverage", said, subject.ids(tasks), [region])


def uneven(parts: list[tuple[int, int, int]], tiles: int) -> Iterator[tuple[int, int, list[int]]]:
    """Ranges of [0, tiles) that no part covers, or two do (with the two)."""
    reached, last = 0, -1
    for first, stop, task in parts:
        if first > reached:
            yield reached, first, []
        elif first < reached:
            yield first, min(reached, stop), [last, task]
        if stop > reached:
            reached, last = stop, task
    if reached < tiles:
        yield reached, tiles, []


def check_outputs(subject: Subject, m: Matching, report: Report) -> None:
    """One task hands out the token, it has seen every candidate, and the candidates are of one head."""
    samples = _ids(subject, *HEAD_OF)
    heads = _ids(subject, *HEAD_OF.values())
    if len(samples) > 1:
        report.add("coverage", f"{subject.names(samples)} all hand the token to the host, but one must", subject.ids(samples))
    weights = {getattr(subject.tasks[i], "weight", 0) for i in heads.tolist()}
    if len(weights) > 1:
        report.add(
            "coverage", f"{subject.names(heads)} write the logits of {len(weights)} heads, but a program has one", subject.ids(heads[:16])
        )
    if not len(samples) or not len(heads):
        return
    needed = HEAD_OF[type(subject.tasks[int(samples[0])])]
    for task in (i for i in heads.tolist() if type(subject.tasks[i]) is not needed):
        said = f"{subject.names([task])} is of another kind than {subject.names(samples[:1])} takes, which is {needed.stem}"
        report.add("kind", said, subject.ids([task, int(samples[0])]))
    sampled = np.zeros(len(m.groups), dtype=bool)
    sampled[m.groups.of[np.isin(m.groups.reads.task, samples)]] = True
    seen = np.zeros(len(m.written.owner), dtype=bool)
    seen[m.source[(m.source >= 0) & sampled[m.read.owner]]] = True
    unseen = np.unique(m.writes.task[m.written.owner[~seen]])
    for task in unseen[np.isin(unseen, heads)].tolist():
        report.add("coverage", f"the candidate of {subject.names([task])} is read by no sample", subject.ids([task]))


def check_tokens(subject: Subject, m: Matching, report: Report) -> None:
    """What an embedding takes as its token a task that chooses has published: candidates are packets of the same kind, but no tokens.

    So every task of a token comes after the choice of the token before, and nothing of it is published where that choice ended the launch.
    """
    carried = np.flatnonzero((m.source >= 0) & m.groups.carried[m.read.owner])
    publisher = m.writes.task[m.written.owner[m.source[carried]]]
    wrong = ~np.isin(publisher, _ids(subject, *HEAD_OF))
    pairs = np.unique(np.stack([m.read.owner[carried[wrong]], publisher[wrong]]), axis=1)
    for group, writer in pairs.T.tolist():
        tasks = m.groups.tasks(group)
        said = f"{subject.names(tasks)} takes as its token what {subject.names([writer])} publishes, which chooses none"
        report.add("kind", said, subject.ids([*tasks[:SHOWN], writer]))


def _ids(subject: Subject, *classes: type[Instruction]) -> Ints:
    return np.concatenate([np.zeros(0, np.int64), *(w.ids for w in subject.words if w.cls in classes)])


def check_splits(subject: Subject, positions: Ints, report: Report) -> None:
    """Each KV head of each layer has one tail, and its working splits are alike: together they see every row of the window once."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i in _ids(subject, Attention).tolist():
        task = subject.tasks[i]
        assert isinstance(task, Attention)
        groups.setdefault((task.layer, task.kv_head), []).append(i)
    if not groups:
        return
    _check_heads(subject, set(groups), report)
    for key, tasks in groups.items():
        _check_group(subject, key, tasks, positions, report)


def _check_heads(subject: Subject, taken: set[tuple[int, int]], report: Report) -> None:
    """Every KV head of every layer of the cache is taken by somebody."""
    kv = subject.program.kv
    layers = 1 + max(layer for layer, _ in taken)
    for layer in range(min(kv.layers, layers)):
        absent = next((head for head in range(kv.heads) if (layer, head) not in taken), None)
        if absent is not None:
            region = Region(f"L{layer} KV heads", absent, absent + 1)
            report.add("coverage", f"no attention task takes {region}", regions=[region])
    if layers < kv.layers:
        region = Region("KV layers", layers, kv.layers)
        report.add("coverage", f"no attention task takes {region}", regions=[region])


def _check_group(subject: Subject, key: tuple[int, int], ids: list[int], positions: Ints, report: Report) -> None:
    tasks = {i: task for i in ids if isinstance(task := subject.tasks[i], Attention)}
    where = f"layer {key[0]}, KV head {key[1]}"
    tails = [i for i, task in tasks.items() if task.split == 0]
    if len(tails) != 1:
        report.add(
            "coverage", f"{where} must have one tail (split 0), but has {len(tails)} among {subject.names(ids)}", subject.ids(ids[:16])
        )
        return
    tail = tasks[tails[0]]
    group = subject.program.machine.heads // subject.program.machine.kv_heads
    if tail.nq != group:
        region = Region(f"L{key[0]} query heads", key[1] * group, (key[1] + 1) * group)
        report.add(
            "coverage", f"{subject.names(tails)} takes {tail.nq} of the query heads {region} of its KV head", subject.ids(tails), [region]
        )
    working = tail.span(int(positions[tails[0]])).active_splits
    holders: dict[int, list[int]] = {split: [] for split in range(working)}
    for i, task in tasks.items():
        if task.split in holders:
            holders[task.split].append(i)
            _check_alike(subject, tails[0], i, report)
        elif task.active(int(positions[i])):
            _check_alike(subject, tails[0], i, report)
    region = Region(f"L{key[0]} head {key[1]} KV rows", 0, subject.program.machine.context)
    for split, held in holders.items():
        if not held:
            report.add("coverage", f"no task takes split {split} of {working} of {region}", subject.ids(tails), [region])
        elif len(held) > 1:
            report.add("coverage", f"{subject.names(held)} all take split {split} of {region}", subject.ids(held[:16]), [region])


def _check_alike(subject: Subject, one: int, other: int, report: Report) -> None:
    a, b = subject.tasks[one], subject.tasks[other]
    unlike = [name for name in ALIKE if getattr(a, name) != getattr(b, name)]
    if unlike:
        said = f"{subject.names([one, other])} share a KV head, but differ in {', '.join(unlike)}"
        report.add("coverage", said, subject.ids([one, other]))


def check_partials(subject: Subject, m: Matching, report: Report) -> None:
    """Partials are read by the tail of their own KV head alone, as partials: nobody else leaves them out where their split is idle."""
    head = np.full(len(subject.tasks), -1, dtype=np.int64)
    split = np.full(len(subject.tasks), -1, dtype=np.int64)
    start = np.full(len(subject.tasks), -1, dtype=np.int64)
    size = subject.program.machine.head_dim + PARTIAL_HEAD
    offsets = np.array([b.offset for b in subject.program.buffers] or [0], dtype=np.int64)
    for w in subject.words:
        if w.cls is Attention:
            head[w.ids], split[w.ids] = (w.column["layer"] << 16) + w.column["kv_head"], w.column["split"]
            buffers = np.minimum(w.column["part_buf"], len(offsets) - 1)
            start[w.ids] = offsets[buffers] + w.column["q0"] * (w.column["splits"] - 1) * size
    reads = m.groups.reads
    publisher = np.where(m.source >= 0, m.writes.task[m.written.owner[m.source]] if len(m.written.owner) else 0, 0)
    partial = np.flatnonzero((m.source >= 0) & (split[publisher] > 0)) if len(subject.tasks) else np.zeros(0, np.int64)
    fits = np.zeros(len(m.groups), dtype=bool)
    owner = np.full(len(m.groups), -1, dtype=np.int64)
    owner[m.groups.of] = head[reads.task]
    fits[:] = True
    strange = (split[reads.task] != 0) | (head[reads.task] != owner[m.groups.of]) | (reads.start != start[reads.task]) | reads.carried
    strange |= ~reads.paired  # of attention's reads its partials alone are paired: a new row is waited for at every position
    fits[m.groups.of[strange]] = False
    wrong = partial[~fits[m.read.owner[partial]] | (owner[m.read.owner[partial]] != head[publisher[partial]])]
    pairs = np.unique(np.stack([m.read.owner[wrong], publisher[wrong]]), axis=1)
    for group, writer in pairs.T.tolist():
        tasks = m.groups.tasks(group)
        said = (
            f"{subject.names(tasks)} reads the partial of {subject.names([writer])}, which nobody publishes at positions with fewer KV rows"
        )
        report.add("coverage", said, subject.ids([*tasks, writer]))
