"""Programs that draw are proven like others; what would choose from the wrong scores is refused by validator and trace checker alike."""

from __future__ import annotations

from dataclasses import fields, replace
from random import Random
from typing import Any

import pytest

from amk.eval.soundness.static_rules import static_problem
from amk.eval.soundness.trace import check_traces
from amk.isa.abi import NONE
from amk.isa.draw import Draw
from amk.isa.draw_head import DrawHead
from amk.isa.embed import Embed
from amk.isa.filter_draw import FilterDraw
from amk.isa.filter_head import TILE_PACKETS, FilterHead
from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Instruction
from amk.isa.sample import Sample
from amk.schedule.compile import compile_program, lower
from amk.schedule.digest import program_digest
from amk.schedule.knobs import Config
from amk.schedule.program import Program, TaskId
from amk.schedule.proven import ValidProgram
from amk.schedule.settings import Chooser
from amk.schedule.targets import small_target
from amk.schedule.validate import validate
from amk.tests.schedule.builder import Sizes, changed, decoder, find
from amk.tests.schedule.specs import SMALL

SPEC = replace(SMALL[0], vocab=77, layers=1, windows=())
CHOOSERS: tuple[Chooser, ...] = ("greedy", "draw", "filter")
KINDS: dict[Chooser, tuple[type[Instruction], type[Instruction]]] = {
    "greedy": (GemvHead, Sample),
    "draw": (DrawHead, Draw),
    "filter": (FilterHead, FilterDraw),
}


def program(chooser: Chooser, **knobs: Any) -> Program:
    return lower(SPEC, Config(**knobs), small_target(3), context=64, chooser=chooser)


def rejected(wrong: Program) -> str:
    """The validator's first reason; the other checker must refuse it too."""
    verdict = validate(wrong)
    assert isinstance(verdict, tuple)
    assert static_problem(wrong) or check_traces(wrong, Random(0), orders=4)
    return verdict[0].message


@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("page_allocation", ["linear", "graph_color"])
def test_each_way_of_choosing_is_proven(chooser: Chooser, page_allocation: str) -> None:
    built = program(chooser, page_allocation=page_allocation, n_tile=16)
    assert isinstance(validate(built), ValidProgram)
    assert check_traces(built, Random(0), orders=4) is None
    head, sample = KINDS[chooser]
    assert find(built, head) and len(find(built, sample)) == 1
    assert built.draws == (chooser != "greedy")


def test_each_way_of_choosing_is_a_program_of_its_own() -> None:
    assert len({program_digest(program(chooser)) for chooser in CHOOSERS}) == len(CHOOSERS)
    assert program_digest(program("greedy")) == program_digest(lower(SPEC, Config(), small_target(3), context=64))


@pytest.mark.parametrize("chooser", CHOOSERS)
@pytest.mark.parametrize("other", CHOOSERS)
def test_a_sample_takes_the_scores_of_its_own_kind_of_head(chooser: Chooser, other: Chooser) -> None:
    """Heads of another kind that have the same words, beside the legal one."""
    built, cls = program(chooser, n_tile=16), KINDS[other][0]
    queues = [[_as(task, cls) if type(task) is KINDS[chooser][0] else task for task in queue] for queue in built.queues]
    wrong = replace(built, queues=tuple(map(tuple, queues)))
    if chooser == other:
        assert isinstance(validate(wrong), ValidProgram)
    else:
        assert rejected(wrong).startswith(("[kind]", "[bounds]", "[coverage]"))


def _as(task: Instruction, cls: type[Instruction]) -> Instruction:
    return cls(**{field.name: getattr(task, field.name) for field in fields(task)})


@pytest.mark.parametrize("change", [-1, 1])
def test_filters_see_every_tile_of_the_vocabulary(change: int) -> None:
    built = program("filter")
    (site,) = find(built, FilterDraw)
    assert "5" in rejected(changed(built, site, tiles=5 + change))


def test_a_tile_whose_scores_go_elsewhere_is_missed() -> None:
    built = program("filter", n_tile=16)
    site = find(built, FilterHead)[-1]
    assert "nobody publishes" in rejected(changed(built, site, out_tag=1))


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_an_embedding_takes_the_token_and_no_candidate(chooser: Chooser) -> None:
    """Both are u32 packets. The other half of the embedding takes the token, so every overwrite stays in order."""
    built = decoder(Sizes(tiles=3))  # one task of the head: whoever has read its candidate comes after all of it
    (head_at,), (sample_at,), embeds = find(built, GemvHead), find(built, Sample), find(built, Embed)
    head, sample = built.task(head_at), built.task(sample_at)
    if chooser == "draw":
        built = _placed(_placed(built, head_at, _as(head, DrawHead)), sample_at, _as(sample, Draw))
    if chooser == "filter":
        words = {f.name: getattr(sample, f.name) for f in fields(sample) if f.name != "count"}
        built = _placed(_placed(built, head_at, _as(head, FilterHead)), sample_at, FilterDraw(**words, tiles=3))
        built = _with_more_room(built, words["in_buf"])
    assert isinstance(validate(built), ValidProgram)
    taken = {"token_buf": getattr(sample, "in_buf"), "token_tag": getattr(sample, "in_tag"), "wait_counter": NONE}  # noqa: B009
    said = rejected(changed(built, embeds[1], **taken))
    assert said.startswith("[kind]") and "takes as its token" in said


def _placed(program: Program, at: TaskId, task: Instruction) -> Program:
    queues = [list(queue) for queue in program.queues]
    queues[at[0]][at[1]] = task
    return replace(program, queues=tuple(map(tuple, queues)))


def _with_more_room(program: Program, buffer: int) -> Program:
    """Scores of three tiles need more packets than candidates do."""
    grown = replace(program.buffers[buffer], packets=3 * TILE_PACKETS, offset=program.arena_packets)
    buffers = (*program.buffers[:buffer], grown, *program.buffers[buffer + 1 :])
    return replace(program, buffers=buffers, arena_packets=grown.offset + grown.packets)


@pytest.mark.parametrize("chooser", CHOOSERS)
def test_a_batch_is_greedy(chooser: Chooser) -> None:
    made = compile_program(replace(SPEC, dtype="bf16"), Config(), small_target(8), context=64, chooser=chooser, batch=8)
    if chooser == "greedy":
        assert isinstance(made, Program)
    else:
        assert isinstance(made, list) and "batch: must be 1 for programs that draw, but got 8" in str(made[0])
