"""validate: proves a program, or says everything that is wrong with it.

What is proven is docs/machine.md's list, for every position up to the context and any number of tokens: no deadlock, no race, nothing
missing, nothing out of bounds, kinds and shapes that agree, device code for every task, shared memory within the card. Nothing of the
compiler's own dependency code is used.

Assumed, not proven: the device code does what each instruction states about itself (`reads`, `writes`, `chunk_bytes`), the hardware
shows a packet's value with its tag, and what was published before an arrival to who has waited for that, positions rise by one from
token to token, and only attention's footprint depends on the position.
Numerics are the oracle's.
Some safe programs are refused. It proves one token in which every split that ever works does so (proof/positions.py); with windows of
several lengths no real token may be like that. And of a stretch an overwrite must come after a reader through values that are read on the
way, though counters alone would do.
"""

from __future__ import annotations

from amk.schedule.collector import collector_paused
from amk.schedule.program import Program
from amk.schedule.proof.ancestors import SET_BYTES, find_ancestors
from amk.schedule.proof.coverage import check_matrices, check_outputs, check_partials, check_splits, check_tokens
from amk.schedule.proof.footprint import Footprint, take_footprint
from amk.schedule.proof.gates import check_gates, check_in_place
from amk.schedule.proof.limits import Limits
from amk.schedule.proof.packets import match
from amk.schedule.proof.positions import fullest_positions, silent_tasks
from amk.schedule.proof.races import check_overwrites
from amk.schedule.proof.report import Region, Rejection, Report
from amk.schedule.proof.resources import check_scratch, check_shared
from amk.schedule.proof.ring import check_chunks, check_lag, check_streams
from amk.schedule.proof.stretch import check_phases, check_products, check_seats
from amk.schedule.proof.subject import Subject, take_subject
from amk.schedule.proof.tables import check_tables
from amk.schedule.proof.waits import find_order, take_nodes
from amk.schedule.proof.words import check_words
from amk.schedule.proven import ValidProgram, proven

__all__ = ["Limits", "Region", "Rejection", "ValidProgram", "validate"]


@collector_paused()
def validate(program: Program, limits: Limits | None = None) -> ValidProgram | tuple[Rejection, ...]:
    """The program as proven within `limits` (default: an H200's), or every reason found why it is not.

    Later checks need what earlier ones found sound: tables, then words, then footprints, then waits, then races. Never raises.
    """
    limits = limits or Limits()
    report = Report(limits.reports)
    _prove(program, limits, report)
    return proven(program) if report.clean else report.rejections()


def _prove(program: Program, limits: Limits, report: Report) -> None:
    if not check_tables(program, limits, report):
        return
    check_shared(program, limits, report)
    subject = take_subject(program, limits, report)
    if subject is None:
        return
    known = check_words(subject, report)
    (check_products if program.machine.prefill else check_matrices)(subject, known, report)
    if not known.all():
        return
    positions = fullest_positions(subject)
    silent = silent_tasks(subject, positions)
    if fits := check_chunks(subject, silent, report):
        check_scratch(subject, report)
    check_streams(subject, silent, report)
    check_lag(subject, silent, report)
    check_splits(subject, positions, report)
    if program.machine.prefill:
        check_seats(subject, report)
    footprint = take_footprint(subject, positions, report) if fits else None  # how x is cut says how often a product reads it
    if footprint is not None:
        _prove_order(subject, footprint, limits, report)


def _prove_order(subject: Subject, footprint: Footprint, limits: Limits, report: Report) -> None:
    check_in_place(subject, footprint, report)
    matching = match(subject, footprint, limits, report)
    if matching is None:
        return
    check_outputs(subject, matching, report)
    check_tokens(subject, matching, report)
    check_partials(subject, matching, report)
    check_phases(subject, matching, report)
    nodes = take_nodes(subject, matching)
    order = find_order(subject, matching, nodes, report)
    if order is None:
        return
    check_gates(subject, matching, report)
    ancestors = find_ancestors(matching, nodes, order)
    if ancestors is None:
        report.add("resources", f"the order of {len(subject.tasks)} tasks must be proven in {SET_BYTES >> 20} MiB, but needs more")
        return
    check_overwrites(subject, matching, nodes, ancestors, report)
