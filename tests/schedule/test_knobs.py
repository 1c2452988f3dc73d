"""The knob table, and configs as JSON data."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from amk.schedule.compile import compile_program, effective_config, lower
from amk.schedule.config import config_dict, knob_value, neighbours, parse_config, with_value
from amk.schedule.digest import program_digest, schedule_id
from amk.schedule.knobs import KNOBS, RULES, Config, Knob
from amk.schedule.program import Program
from amk.schedule.rejection import Rejection
from amk.schedule.render import config_schema, knob_table_markdown, search_space
from amk.schedule.targets import TARGETS, Target, small_target
from amk.tests.schedule.configs import GUIDE, config_of, random_config
from amk.tests.schedule.specs import LLAMA_1B, SMOLLM2, TOY, WIDE_HEADS, WINDOWED

NESTED: list[Any] = []
for _ in range(20000):
    NESTED = [NESTED]
NUMBERS: tuple[Any, ...] = (True, False, 0, -1, 7, 10**5000, 0.5, math.nan, math.inf, -math.inf, 1j)
MAPS: tuple[Any, ...] = ({}, {"": 1}, {"qkv": [0]}, {"o": "x"}, {3: [1]}, {"o": [True]}, {"a": NESTED})
JUNK = (*NUMBERS, *MAPS, None, "", "16", "contiguous", b"x", [], [None], [[]], ["norm", "norm"], ["norm", 3], NESTED, object(), {1, 2})


def texts(obj: Any) -> list[str]:
    result = parse_config(obj)
    assert isinstance(result, list)
    return [str(problem) for problem in result]


def one(name: str, value: Any) -> dict[str, Any]:
    """The config that sets one dotted knob."""
    for part in reversed(name.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def plain(knob: Knob, value: Any) -> Any:
    return list(value) if knob.type == "set" else value


def test_empty_object_is_the_default_config() -> None:
    assert parse_config({}) == Config()


@pytest.mark.parametrize("seed", range(20))
def test_canonical_form_parses_to_the_same_config(seed: int) -> None:
    config = random_config(seed)
    assert parse_config(config_dict(config)) == config


def test_guide_config_is_taken_as_it_stands() -> None:
    canonical = config_dict(config_of(GUIDE))
    assert {key: canonical[key] for key in GUIDE} == GUIDE


def test_order_of_fusions_does_not_matter() -> None:
    assert config_of({"fusion_grouping": ["gate_up", "norm"]}) == config_of({"fusion_grouping": ["norm", "gate_up"]})


def test_explicit_map_survives_the_round_trip() -> None:
    obj = {"sm_assignment": {"o": [1, 0], "L1.qkv": [2]}}
    assert config_dict(config_of(obj))["sm_assignment"] == obj["sm_assignment"]


@pytest.mark.parametrize(
    ("obj", "text"),
    [
        ({"tiling": {"gemv": {"N_tile": 7}}}, "gemv N_tile: must be one of (16, 32, 64, 128, 256, 512), but got 7"),
        ({"tiling": {"gemv": {"N_tile": True}}}, "gemv N_tile: must be one of (16, 32, 64, 128, 256, 512), but got True"),
        ({"pipelining_depth": 0}, "pipelining_depth: must be an integer from 1 to 12, but got 0"),
        ({"kernel_knobs": {"sync": "counters"}}, "sync: must be one of ('counter', 'tags'), but got 'counters'"),
        (
            {"kernel_knobs": 3},
            "kernel_knobs: must be an object with keys of ('stage_bytes', 'cache_hint', 'sync', 'poll_sleep_ns', 'release_early'",
        ),
        ({"tiling": {"gemm": 1}}, "tiling: unknown key 'gemm' (1); allowed keys are gemv, attention"),
        ({"Tiling": {}}, "config: unknown key 'Tiling' ({}); allowed keys are tiling, fusion_grouping, sm_assignment"),
        ([], "config: must be an object with keys of"),
        ({"smem_bytes_per_block": 8191}, "smem_bytes_per_block: must be 0 or at least one stage (8192 bytes), but got 8191"),
        ({"sm_assignment": {"o": [-1]}}, "sm_assignment o: must be a list of SM numbers, one for each tile of the op, but got [-1]"),
        ({"sm_assignment": {"o": [True]}}, "sm_assignment o: must be a list of SM numbers, one for each tile of the op, but got [True]"),
        ({"fusion_grouping": ["qkv", "qkv"]}, "fusion_grouping: must be a list of distinct entries of ('norm', 'qkv', 'gate_up')"),
    ],
)
def test_problem_is_one_sentence_with_what_is_allowed(obj: Any, text: str) -> None:
    (found,) = texts(obj)
    assert found.startswith(text)


@pytest.mark.parametrize("op", ["a\x1b[31m\nb", "o" * 5000, "\ud800", "L0." + "\t" * 5000])
@pytest.mark.parametrize("sms", [[1], "x"])
def test_a_name_of_the_callers_is_shown_as_values_are(op: str, sms: Any) -> None:
    """Whether the map is refused as it is read or where its ops are looked up."""
    config = parse_config({"sm_assignment": {op: sms}})
    problems = compile_program(TOY, config, TARGETS["h200"]) if isinstance(config, Config) else config
    assert isinstance(problems, list) and problems
    for problem in problems:
        assert problem.text.startswith("sm_assignment ") and problem.key.startswith("sm_assignment.")
        assert all(text.isprintable() and len(text) < 600 for text in (problem.text, problem.key))


def test_what_a_class_of_the_callers_looks_like_stays_on_a_line() -> None:
    class Strange:
        def __repr__(self) -> str:
            return "\x1b[31m\n"

    (found,) = texts({"sm_assignment": Strange()})
    assert found.endswith("but got \\x1b[31m\\n")


def test_all_problems_are_reported_at_once() -> None:
    found = parse_config(
        {"tiling": {"gemv": {"N_tile": 7, "M": 1}}, "pipelining_depth": "4", "colour": 1, "kernel_knobs": {"release_early": 3}}
    )
    assert isinstance(found, list)
    assert [p.key for p in found] == ["tiling.gemv.N_tile", "tiling.gemv.M", "pipelining_depth", "colour", "kernel_knobs.release_early"]


@pytest.mark.parametrize(
    ("obj", "keys"),
    [
        ({"smem_bytes_per_block": 100, "pipelining_depth": 0}, ["pipelining_depth", "smem_bytes_per_block"]),
        ({"smem_bytes_per_block": 100, "kernel_knobs": {"sinc": "tags"}}, ["kernel_knobs.sinc", "smem_bytes_per_block"]),
        ({"smem_bytes_per_block": 100, "kernel_knobs": {"stage_bytes": 7}}, ["kernel_knobs.stage_bytes"]),
        ({"smem_bytes_per_block": 100, "kernel_knobs": 3}, ["kernel_knobs"]),
        ({"smem_bytes_per_block": 100, "sm_assignment": {"o": 3}}, ["sm_assignment.o", "smem_bytes_per_block"]),
        ({"smem_bytes_per_block": -1, "kernel_knobs": {"stage_bytes": 32768}}, ["smem_bytes_per_block"]),
    ],
)
def test_a_rule_is_judged_beside_other_problems_where_its_own_knobs_are_known(obj: Any, keys: list[str]) -> None:
    found = parse_config(obj)
    assert isinstance(found, list) and [problem.key for problem in found] == keys


@pytest.mark.parametrize("seed", range(10))
def test_a_rule_names_every_knob_it_reads(seed: int) -> None:
    config, others = with_value(random_config(seed), "smem_bytes_per_block", 8192), random_config(seed + 100)
    for rule in RULES:
        for knob in KNOBS:
            if knob.name not in rule.knobs:
                assert rule.check(with_value(config, knob.name, knob_value(others, knob.name))) == rule.check(config)


def test_ring_of_exactly_one_stage_is_accepted_and_one_byte_less_is_not() -> None:
    assert isinstance(parse_config({"smem_bytes_per_block": 32768, "kernel_knobs": {"stage_bytes": 32768}}), Config)
    assert isinstance(parse_config({"smem_bytes_per_block": 32767, "kernel_knobs": {"stage_bytes": 32768}}), list)


@pytest.mark.parametrize("knob", KNOBS, ids=lambda k: k.name)
def test_junk_for_a_knob_is_a_rejection_that_names_it(knob: Knob) -> None:
    for value in JUNK:
        result = parse_config(one(knob.name, value))
        if isinstance(result, Config):
            assert config_dict(result) == config_dict(with_value(Config(), knob.name, knob.parse(value)[0]))
        else:
            assert result and all(isinstance(p, Rejection) and p.key.startswith(knob.name) and len(p.text) < 500 for p in result)


def random_json(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(JUNK)
    keys = [part for knob in KNOBS for part in knob.name.split(".")] + ["", "x", 5, None, "kernel_knobs.sync"]
    return {rng.choice(keys): random_json(rng, depth - 1) for _ in range(rng.randint(0, 5))}


def test_parse_config_never_raises() -> None:
    rng = random.Random(5)
    results = [parse_config(value) for value in JUNK] + [parse_config(random_json(rng, 4)) for _ in range(2000)]
    assert all(isinstance(r, Config) or (r and all(isinstance(p, Rejection) for p in r)) for r in results)


@pytest.mark.parametrize("knob", KNOBS, ids=lambda k: k.name)
def test_schema_accepts_what_the_parser_accepts(knob: Knob) -> None:
    validator = jsonschema.Draft202012Validator(config_schema())
    accepted = [plain(knob, knob.default), *(plain(knob, v) for v in knob.values if knob.type != "set")]
    odd: list[Any] = [None, True, -1, 7, 1 << 20, (1 << 20) + 1, "", "16", [], {}, {"qkv": [0]}, {"o": [-1]}, {"o": "x"}, ["norm", "norm"]]
    for value in accepted + odd:
        parsed = knob.parse(value)[1] == []
        assert validator.is_valid(one(knob.name, value)) == parsed, value


def test_schema_is_itself_a_valid_schema_and_closed() -> None:
    jsonschema.Draft202012Validator.check_schema(config_schema())
    assert not jsonschema.Draft202012Validator(config_schema()).is_valid({"tiling": {"gemv": {"n_tile": 16}}})


def test_search_space_lists_every_knob_with_its_default_among_its_values() -> None:
    space = search_space(SMOLLM2, TARGETS["h200"])
    assert list(space) == [knob.name for knob in KNOBS]
    for entry in space.values():
        assert entry["desc"] and entry["consumer"]
        default = entry["default"]
        if "choices" in entry:
            assert all(d in entry["choices"] for d in (default if entry["type"] == "set" else [default]))
        else:
            assert entry["min"] <= default <= entry["max"]


def test_search_space_leaves_out_stages_that_cannot_hold_16_kv_rows() -> None:
    assert search_space(WIDE_HEADS, TARGETS["h200"])["kernel_knobs.stage_bytes"]["choices"] == [0, 32768]
    assert search_space(SMOLLM2, TARGETS["h200"])["kernel_knobs.stage_bytes"]["choices"] == [0, 8192, 16384, 20480, 24576, 32768]


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda t: t.name)
def test_search_space_offers_the_feeds_that_the_card_has_and_the_others_are_rejected_by_name(target: Target) -> None:
    model = replace(TOY, dtype="fp32")
    offered = search_space(model, target)["kernel_knobs.weight_feed"]["choices"]
    assert offered == ["auto", *{7: ["plain"], 8: ["cp_async", "plain"]}.get(target.capability // 10, ["bulk", "cp_async", "plain"])]
    for feed in ("auto", "bulk", "cp_async", "plain"):
        result = compile_program(model, Config(weight_feed=feed), target)
        if feed in offered:
            assert isinstance(result, Program)
            assert result.device.weight_feed == (offered[1] if feed == "auto" else feed)
        else:
            assert isinstance(result, list)
            assert [r.key for r in result] == ["kernel_knobs.weight_feed"]
            assert all(f"'{name}'" in result[0].text for name in offered) and target.arch in result[0].text


def test_documentation_has_a_row_for_every_knob() -> None:
    rows = [line for line in knob_table_markdown().splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [knob.name for knob in KNOBS]
    assert all(row.count("|") == 7 for row in rows)


@pytest.mark.parametrize("seed", range(10))
def test_neighbours_are_valid_and_differ_in_the_one_knob_they_name(seed: int) -> None:
    config = random_config(seed)
    for name, other in neighbours(config):
        assert [k.name for k in KNOBS if knob_value(config, k.name) != knob_value(other, k.name)] == [name]
        assert parse_config(config_dict(other)) == other


def test_steps_are_to_the_next_value_down_and_up() -> None:
    depths = [other.pipelining_depth for name, other in neighbours(Config(pipelining_depth=5)) if name == "pipelining_depth"]
    assert depths == [4, 6]


def test_neighbours_that_break_a_rule_are_left_out() -> None:
    """From a ring of exactly one stage no step is to a larger stage."""
    full = Config(smem_bytes_per_block=20480, stage_bytes=20480)
    assert [other.stage_bytes for name, other in neighbours(full) if name == "kernel_knobs.stage_bytes"] == [16384]


def test_steps_from_automatic_values_are_steps_from_what_they_came_to_be() -> None:
    """Were they steps from 0, each would be to the smallest value: one split, a ring of two stages."""
    realised = config_of(effective_config(Config(), lower(LLAMA_1B, Config(), TARGETS["h200"], context=4096)))
    near: dict[str, set[Any]] = {}
    for name, other in neighbours(Config(), realised):
        near.setdefault(name, set()).add(knob_value(other, name))
        assert with_value(other, name, knob_value(Config(), name)) == Config()
    assert (realised.kv_splits, near["kernel_knobs.kv_splits"]) == (16, {8})
    assert (realised.stage_bytes, near["kernel_knobs.stage_bytes"]) == (16384, {8192, 20480})
    assert (realised.reduction_slots, near["kernel_knobs.reduction_slots"]) == (4, {2, 8})
    assert (realised.smem_bytes_per_block, near["smem_bytes_per_block"]) == (196608, {163840})
    assert near["kernel_knobs.weight_feed"] == {"cp_async", "plain"}
    assert set(near) == {name for name, _ in neighbours(Config())}


def test_every_knob_has_a_neighbour_of_the_default() -> None:
    assert {name for name, _ in neighbours(Config())} == {knob.name for knob in KNOBS}


# Knobs whose values are realised in the device code, and how many programs (queues, buffers, machine) they make.
PROGRAMS = {
    "kernel_knobs.cache_hint": 1,
    "kernel_knobs.poll_sleep_ns": 1,
    "kernel_knobs.release_early": 1,
    "kernel_knobs.weight_feed": 2,  # plain loads have one stage under way
}


@pytest.mark.parametrize("knob", KNOBS, ids=lambda k: k.name)
def test_every_value_of_a_knob_makes_a_program_of_its_own(knob: Knob) -> None:
    """With a ring that leaves room for choices, on a model whose sizes tell them apart; automatic values may equal what they choose."""
    model, target = WINDOWED, small_target(6)
    start = with_value(Config(), "smem_bytes_per_block", 196608) if knob.name != "smem_bytes_per_block" else Config()
    values = [(), ("norm",), ("qkv",), ("gate_up",), *[knob.choices]] if knob.type == "set" else [v for v in knob.values if v != 0]
    if knob.name == "tiling.gemv.N_tile":
        values = values[:4]  # beyond 128 rows every matrix of the model is one unit an SM
    if knob.name == "kernel_knobs.kv_splits":
        values = [1, 2, 4]  # 512 rows are at most 8 units of 64, and the window's two
    if knob.name == "kernel_knobs.weight_feed":
        values = ["bulk", "cp_async", "plain"]
    programs = [lower(model, with_value(start, knob.name, value), target) for value in values]
    assert len({schedule_id(p) for p in programs}) == len(values)
    digests = {program_digest(p) for p in programs}
    assert len(digests) == PROGRAMS.get(knob.name, len(values))
