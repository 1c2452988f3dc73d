"""Programs proven and built ahead in other processes are those that this process would make."""

from __future__ import annotations

from amk.dev.prebuild import Build, ahead, built
from amk.eval.candidate import prepare
from amk.eval.card import Place
from amk.models.registry import describe
from amk.schedule.digest import program_digest
from amk.schedule.targets import TARGETS

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
