"""Which SM does what."""

from __future__ import annotations

from collections import Counter

import pytest

from amk.isa.attention import Attention
from amk.isa.matvec import MatVec
from amk.schedule.compile import compile_program, lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.targets import TARGETS, small_target
from amk.tests.schedule.configs import config_of
from amk.tests.schedule.specs import LLAMA_1B, SMOLLM2, TOY, WINDOWED
from amk.tests.schedule.trace import trace


def tiles_by_sm(program: Program, matrix: str) -> list[list[tuple[int, int]]]:
    """Tile ranges of a matrix on each SM."""
    weight = [m.name for m in program.matrices].index(matrix)
    return [[(t.tile0, t.tile0 + t.tiles) for t in q if isinstance(t, MatVec) and t.weight == weight] for q in program.queues]


def counts(program: Program, matrix: str) -> list[int]:
    return [sum(stop - start for start, stop in ranges) for ranges in tiles_by_sm(program, matrix)]


@pytest.fixture(scope="module")
def balanced() -> Program:
    return lower(LLAMA_1B, Config(), TARGETS["h200"])


@pytest.mark.parametrize("matrix", ["L0.qkv", "L7.o", "L3.gate_up", "L15.down", "head"])
def test_load_balance_gives_every_phase_shares_that_differ_by_one_tile(balanced: Program, matrix: str) -> None:
    shares = counts(balanced, matrix)
    assert max(shares) - min(shares) <= 1
    assert all(len(ranges) <= 1 for ranges in tiles_by_sm(balanced, matrix))


def test_load_balance_evens_out_the_token(balanced: Program) -> None:
    """The most loaded SM streams at most 1 % more weight than the mean: less than the last tile of the head and one of down."""
    loads = [sum(sum(t.chunk_bytes(balanced.machine, 0)) for t in q if isinstance(t, MatVec)) for q in balanced.queues]
    contiguous = lower(LLAMA_1B, Config(sm_assignment="contiguous"), TARGETS["h200"])
    plain = [sum(sum(t.chunk_bytes(balanced.machine, 0)) for t in q if isinstance(t, MatVec)) for q in contiguous.queues]
    mean = sum(loads) / len(loads)
    assert max(loads) < 1.02 * mean
    assert max(loads) <= max(plain)


def test_an_sm_that_ends_a_phase_late_begins_the_next_one_only_where_there_are_too_few_sms() -> None:
    for spec, tiles in ((SMOLLM2, 36), (LLAMA_1B, 128)):
        program = lower(spec, Config(), TARGETS["h200"])
        for layer in range(program.kv.layers):
            tails = {sm for sm, q in enumerate(program.queues) for t in q if isinstance(t, Attention) and (t.layer, t.split) == (layer, 0)}
            late = sum(shares > 0 for sm, shares in enumerate(counts(program, f"L{layer}.o")) if sm in tails)
            assert late == max(0, tiles - (132 - len(tails)))


def test_larger_tiles_stay_together(balanced: Program) -> None:
    program = lower(LLAMA_1B, Config(n_tile=128), TARGETS["h200"])
    ranges = [r for ranges in tiles_by_sm(program, "L0.qkv") for r in ranges]
    assert len(ranges) == 24 and all(start % 8 == 0 and stop - start == 8 for start, stop in ranges)


def test_contiguous_tiles_go_up_with_the_sm_and_make_one_task() -> None:
    program = lower(LLAMA_1B, Config(sm_assignment="contiguous"), TARGETS["h200"])
    ranges = [r for ranges in tiles_by_sm(program, "head") for r in ranges]
    assert ranges == sorted(ranges) and len(ranges) == 132


def test_round_robin_deals_tiles_in_turn() -> None:
    program = lower(TOY, Config(sm_assignment="round_robin"), small_target(4))
    assert tiles_by_sm(program, "L0.gate_up") == [[(sm + 4 * i, sm + 4 * i + 1) for i in range(4)] for sm in range(4)]


def test_attention_of_a_layer_spreads_over_different_sms(balanced: Program) -> None:
    for layer in (0, 9):
        per_sm = Counter(sm for sm, q in enumerate(balanced.queues) for t in q if isinstance(t, Attention) and t.layer == layer)
        assert len(per_sm) == 128 and set(per_sm.values()) == {1}


def test_splits_come_before_tails_on_every_sm() -> None:
    program = lower(WINDOWED, Config(kv_splits=4), small_target(2))
    for queue in program.queues:
        for layer in range(2):
            is_tail = [t.split == 0 for t in queue if isinstance(t, Attention) and t.layer == layer]
            assert is_tail == sorted(is_tail)


def test_explicit_map_is_followed_in_one_layer_and_in_all() -> None:
    obj = {"sm_assignment": {"o": [0, 1, 1, 2, 3, 3, 0, 0], "L1.o": [2] * 8, "attention": [1, 1]}, "kernel_knobs": {"kv_splits": 1}}
    program = lower(WINDOWED, config_of(obj), small_target(4))
    assert tiles_by_sm(program, "L0.o") == [[(0, 1), (6, 8)], [(1, 3)], [(3, 4)], [(4, 6)]]
    assert tiles_by_sm(program, "L1.o") == [[], [], [(0, 8)], []]
    assert [sum(isinstance(t, Attention) for t in q) for q in program.queues] == [0, 4, 0, 0]
    assert trace(program, (0, 100, 101)) == []


@pytest.mark.parametrize(
    ("assignment", "text"),
    [
        ({"o": [0, 0, 0]}, "sm_assignment o: must be the SM of each of its 4 units, but got '3 of them'"),
        ({"o": [0, 0, 0, 4]}, "sm_assignment o: must be SMs from 0 to 3, but got 4"),
        (
            {"gate": [0]},
            "sm_assignment gate: must be one of embed, qkv, attention, o, gate_up, down, head, sample, or one of them in a layer",
        ),
        ({"L1.o": [0, 0, 0, 0]}, "sm_assignment L1 o: must be one of embed, qkv"),
    ],
)
def test_explicit_map_that_does_not_suit_the_model_is_rejected(assignment: dict[str, list[int]], text: str) -> None:
    result = compile_program(TOY, config_of({"sm_assignment": assignment}), small_target(4))
    assert isinstance(result, list)
    assert str(result[0]).startswith(text)
