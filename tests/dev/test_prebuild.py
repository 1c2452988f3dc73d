"""Programs proven and built ahead in other processes are those that this process would make."""

from __future__ import annotations

import pytest

from amk.dev import bench_batch, bench_prefill
from amk.dev.prebuild import Build, ahead, built
from amk.eval.candidate import prepare
from amk.eval.card import Place
from amk.models.registry import describe
from amk.schedule.digest import program_digest
from amk.schedule.targets import TARGETS
from amk.vm.source import kernel_source

PLACE = Place(TARGETS["h200"], "cpu", None)


def test_a_program_from_another_process_is_this_ones_and_a_refusal_keeps_its_reasons() -> None:
    good, bad = Build("toy", {"threads_per_block": 128}, None), Build("toy", {"threads_per_block": 100}, None)
    with ahead([good, bad], PLACE) as futures:
        candidate, refused = (future.result(timeout=300) for future in futures)
    assert candidate.program is not None and refused.program is None
    here = prepare(describe("toy"), PLACE, good.config)
    assert here.program is not None
    assert program_digest(candidate.program.program) == program_digest(here.program.program)
    assert refused.rejections == built(bad, PLACE).rejections != ()


def test_programs_of_batches_and_for_prefill_are_those_that_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sources = []
    monkeypatch.setattr("amk.dev.prebuild.compile_kernel", lambda source, arch: sources.append(source))
    name = "smollm2-135m-shape"
    programs = [built(case, PLACE).program for case in (*bench_batch.builds(name, (1, 8)), *bench_prefill.builds(name, (32,), 512))]
    machines = [program.program.machine for program in programs if program is not None]
    assert [(m.batch, m.prefill, m.context) for m in machines] == [(1, False, 4096), (8, False, 4096), (1, False, 512), (32, True, 512)]
    assert sources == [kernel_source(program.program) for program in programs if program is not None]
