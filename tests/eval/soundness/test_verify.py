"""The validator against the explorer and the trace checker: a part of the measurement that `dev/verify_full.py` makes in full."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from amk.eval.soundness.explorer import explore
from amk.eval.soundness.footprint import launches
from amk.eval.soundness.lowerings import BATCH_EVERY, OF_BATCH, OF_PREFILL, VARIANTS, lowering
from amk.eval.soundness.mutants import MUTATIONS, mutate
from amk.eval.soundness.random_programs import MAX_SMS, is_small, random_program
from amk.eval.soundness.random_stretches import random_stretch
from amk.eval.soundness.trace import check_traces
from amk.eval.soundness.verify import Case, Outcome, case_program, family_of, judge_all, run_verify, summary
from amk.isa.abi import NONE
from amk.isa.instruction import Instruction
from amk.isa.seat_qkv import SeatQkv
from amk.schedule.program import Program, TaskId
from amk.schedule.proven import ValidProgram
from amk.schedule.validate import validate
from amk.tests.schedule.builder import changed, find

ROOT = Path(__file__).resolve().parents[3]
PARTS = 4  # so that the workers of pytest share them


@pytest.mark.parametrize("part", range(PARTS))
def test_validator_accepts_nothing_unsafe_and_nearly_everything_safe(part: int) -> None:
    found = run_verify(programs=2500, mutants=40, seed=1000 + part, processes=1)
    assert found["programs"]["false_accepts"] == [] and found["mutants"]["false_accepts"] == []
    assert found["programs"]["raised"] == [] and found["mutants"]["raised"] == []
    assert found["programs"]["cases"] == 2500 and found["programs"]["safe_share"] >= 0.3
    assert found["programs"]["false_reject_share"] <= 0.05 and found["mutants"]["false_reject_share"] <= 0.05
    assert all(found["programs"]["families"][family]["safe"] >= 0.3 * 0.12 * 2500 for family in ("batch", "draw", "filter"))
    assert found["passed"]


@pytest.mark.parametrize("part", range(2))
def test_explorer_and_trace_checker_agree(part: int) -> None:
    """They share the footprint and the static rules, but no line of what decides on deadlocks and races."""
    for number in range(1000):
        _, program = case_program(("program", 2000 + part, number))
        explored, traced = explore(program, tokens=3), check_traces(program, Random(number), tokens=3, orders=4)
        assert (explored is None) == (traced is None), (number, explored, traced)


def test_a_case_is_the_same_program_every_time() -> None:
    for case in (("program", 5, 17), ("mutant", 5, 17)):
        assert case_program(case) == case_program(case)


def test_programs_without_mutations_are_small_and_mostly_safe() -> None:
    programs = [random_program(Random(number)) for number in range(200)]
    assert all(is_small(program) and program.machine.sms <= MAX_SMS for program in programs)
    assert sum(explore(program) is None for program in programs) >= 180


def test_every_mutation_changes_some_lowering() -> None:
    for name, mutation in MUTATIONS.items():
        made = (mutation(Random(number), lowering(number)) for number in range(24))
        assert any(mutant is not None and mutant != lowering(number) for number, mutant in enumerate(made)), name


def test_lowerings_themselves_are_safe() -> None:
    for variant in range(0, VARIANTS, 16):
        assert check_traces(lowering(variant), Random(variant), orders=2) is None


def test_lowerings_of_batches_are_safe_with_seats_at_different_places() -> None:
    for variant in range(OF_BATCH, VARIANTS, 8 * BATCH_EVERY):
        program = lowering(variant)
        assert program.machine.batch == 8
        assert any(len(set(positions)) > 1 for launch in launches(program, 2) for positions in launch) or program.machine.context == 16
        assert check_traces(program, Random(variant), orders=2) is None


def test_random_programs_are_of_every_family() -> None:
    """Some batches attend: a task a seat, each at a place of its own in the cache."""
    programs = [random_program(Random(number)) for number in range(400)]
    found = Counter(map(family_of, programs))
    assert set(found) == {"greedy", "draw", "filter", "batch", "prefill"} and min(found.values()) >= 20
    attending = [program for program in programs if program.machine.sequences > 1 and program.kv.layers]
    assert attending and all(isinstance(validate(program), ValidProgram) and explore(program) is None for program in attending)


def test_lowerings_for_prefill_are_safe() -> None:
    for variant in range(OF_PREFILL, VARIANTS, 8 * BATCH_EVERY):
        program = lowering(variant)
        assert family_of(program) == "prefill" and len(launches(program, 2)) == 1
        assert check_traces(program, Random(variant), orders=2) is None


def test_a_chunk_of_a_stretch_that_nobody_takes_is_found() -> None:
    """No second token comes to take it for its own."""
    program = lowering(OF_PREFILL)
    twice = (*program.streams[0], program.streams[0][-1])
    wrong = replace(program, streams=(twice, *program.streams[1:]))
    found = check_traces(wrong, Random(0), orders=2)
    assert found is not None and found.kind == "ring" and not isinstance(validate(wrong), ValidProgram)


GATED_FAULTS: dict[str, Callable[[Program], Program]] = {
    "no wait": lambda p: changed(p, last_of(p, SeatQkv), wait_counter=NONE, wait_count=0),
    "one arrival fewer": lambda p: changed(p, last_of(p, SeatQkv), wait_count=p.task(last_of(p, SeatQkv)).wait_count - 1),
    "an earlier phase": lambda p: changed(p, last_of(p, SeatQkv), wait_counter=0, wait_count=8),
}


def last_of(program: Program, cls: type[Instruction]) -> TaskId:
    return find(program, cls)[-1]


@pytest.mark.parametrize("fault", GATED_FAULTS)
def test_explorer_and_trace_checker_find_early_reads_of_a_stretch(fault: str) -> None:
    program = random_stretch(Random(3))
    assert explore(program) is None and check_traces(program, Random(0), orders=4) is None
    wrong = GATED_FAULTS[fault](program)
    for found in (explore(wrong), check_traces(wrong, Random(0), orders=4)):
        assert found is not None and found.kind == "race"


def test_explorer_and_trace_checker_agree_on_stretches() -> None:
    """Whether they are as made, or a buffer lies on another's, or a task waits for or arrives at another counter."""
    aimed = ("share_slot", "other_gate", "move_arrival", "drop_wait", "shift_threshold", "move_task", "swap_entries", "shrink_inflight")
    safe = 0
    for number in range(600):
        random = Random(f"stretch/{number}")
        program = random_stretch(random)
        if number % 3:
            program = MUTATIONS[random.choice(aimed)](random, program) or program
        explored, traced = explore(program), check_traces(program, Random(number), orders=4)
        assert (explored is None) == (traced is None), (number, explored, traced)
        verdict = isinstance(validate(program), ValidProgram)
        assert not (verdict and explored is not None), (number, explored)
        safe += verdict
    assert 200 < safe < 500


def test_mutate_names_what_it_did() -> None:
    program = random_program(Random(3))
    name, mutant = mutate(Random(4), program)
    assert name in MUTATIONS and mutant != program


def test_processes_and_their_number_change_no_outcome() -> None:
    counts = [run_verify(programs=120, mutants=4, seed=9, processes=n) for n in (1, 2)]
    assert [c["programs"] for c in counts[:1]] == [c["programs"] for c in counts[1:]] and counts[0]["mutants"] == counts[1]["mutants"]
    assert json.loads(json.dumps(counts[0])) == counts[0]


def test_progress_is_told_and_no_time_means_no_cases() -> None:
    told: list[tuple[int, int]] = []
    run_verify(programs=60, mutants=0, seed=0, progress=lambda done, wanted: told.append((done, wanted)), processes=1)
    assert told[-1] == (60, 60)
    assert run_verify(programs=60, mutants=0, minutes=0.0, processes=1)["programs"]["cases"] == 0


def test_time_that_is_up_ends_a_run_of_any_number_of_cases() -> None:
    assert run_verify(programs=10**15, mutants=10**15, minutes=0.0, processes=1)["programs"]["cases"] == 0


def test_no_worker_outlives_a_killed_run() -> None:
    command = [sys.executable, str(ROOT / "amk_bootstrap.py"), "amk.amk_cli", "verify", "--programs", "200000", "--mutants", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True) as run:
        try:
            while not _workers(run.pid):
                assert run.poll() is None
            run.kill()
            run.communicate(timeout=60)  # returns when the last that could write there has ended
        finally:
            for worker in _workers(run.pid):
                os.kill(worker, signal.SIGKILL)


def _workers(session: int) -> list[int]:
    """Processes of a session that multiprocessing has started and that have loaded the validator."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            spawned = b"spawn_main" in (folder / "cmdline").read_bytes()
            if spawned and os.getsid(int(folder.name)) == session and "numpy" in (folder / "maps").read_text():
                found.append(int(folder.name))
    return found


def test_a_run_without_cases_does_not_pass() -> None:
    assert not run_verify(programs=60, mutants=0, minutes=0.0, processes=1)["passed"]


def test_summary_counts_every_wrong_verdict() -> None:
    outcomes = [
        Outcome("0/program/0", (), None, None),
        Outcome("0/program/1", ("drop_check",), "[race] a", None),
        Outcome("0/program/2", ("drop_wait",), None, ("[race] b",)),
        Outcome("0/program/3", (), "[deadlock] c", ("[deadlock] d",)),
        Outcome("0/program/4", (), "[deadlock] e", None, raised="KeyError: 1"),
        Outcome("0/program/5", (), None, None, too_large=True),
    ]
    found = summary(outcomes)
    assert (found["cases"], found["safe"], found["too_large"]) == (5, 2, 1)
    assert found["unsafe"] == {"deadlock": 2, "race": 1}
    assert [line["case"] for line in found["false_accepts"]] == ["0/program/1"]
    assert [line["case"] for line in found["false_rejects"]] == ["0/program/2"] and found["false_reject_share"] == 0.5
    assert [line["case"] for line in found["raised"]] == ["0/program/4"]


def test_judge_all_keeps_the_order_of_cases() -> None:
    cases: tuple[Case, ...] = tuple(("program", 0, number) for number in range(5))
    assert [outcome.case for outcome in judge_all(cases)] == [f"0/program/{number}" for number in range(5)]
