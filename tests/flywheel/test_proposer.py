"""Proposals: repeatable, never twice the same program, and every knob's every value within reach."""

from __future__ import annotations

import random

import pytest

from amk.flywheel.proposer import MAX_DRAWS, Proposal, Proposer, draw
from amk.schedule.config import config_dict, knob_value, neighbours, parse_config
from amk.schedule.knobs import KNOBS, Config, Rule
from amk.schedule.rejection import reject


def proposals(proposer: Proposer, count: int, incumbent: Config | None = None) -> list[Proposal]:
    found = (proposer.propose(incumbent or Config()) for _ in range(count))
    return [proposal for proposal in found if proposal is not None]


def test_the_default_comes_first_and_once() -> None:
    sources = [p.source for p in proposals(Proposer(0, 0.5), 40)]
    assert sources[0] == "default" and "default" not in sources[1:]
    assert set(sources[1:]) == {"explore", "mutate"}


def test_equal_seeds_give_equal_proposals_and_others_do_not() -> None:
    first, again, other = (proposals(Proposer(seed, 0.35), 60) for seed in (7, 7, 8))
    assert first == again
    assert first != other


@pytest.mark.parametrize("explore_fraction", [0.0, 0.35, 1.0])
def test_no_config_is_proposed_twice_and_all_are_valid(explore_fraction: float) -> None:
    configs = [p.config for p in proposals(Proposer(1, explore_fraction), 150)]
    assert len(configs) == len(set(configs)) == 150
    assert all(parse_config(config_dict(config)) == config for config in configs)


def test_every_value_of_every_knob_is_explored() -> None:
    configs = [p.config for p in proposals(Proposer(2, 1.0), 300)]
    for knob in KNOBS:
        values = {knob_value(config, knob.name) for config in configs}
        reached = {choice for value in values for choice in value} if knob.type == "set" else values
        assert reached == set(knob.values), knob.name
        assert knob.type != "set" or any(value == () for value in values)


def test_what_is_drawn_breaks_no_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search values of the table's knobs break none of the table's rules, so here is one that most draws break."""
    name = "tiling.gemv.N_tile"
    narrow = Rule("N_tile is 16", (name,), lambda config: None if config.n_tile == 16 else reject(name, config.n_tile, "16"))
    monkeypatch.setattr("amk.flywheel.proposer.RULES", (narrow,))
    source = random.Random(8)
    assert {draw(source).n_tile for _ in range(10)} == {16}


def test_without_exploring_all_neighbours_of_the_incumbent_are_tried_first() -> None:
    incumbent = Config(n_tile=128)
    near = {config for _, config in neighbours(incumbent)}
    first, *rest = proposals(Proposer(3, 0.0), 1 + len(near), incumbent)
    assert first.source == "default"
    assert {p.config for p in rest if p.source == "mutate"} == near - {Config()}


def test_explore_fraction_is_the_share_of_random_configs() -> None:
    proposer = Proposer(4, 0.35)
    sources = [p.source for n in range(400) if (p := proposer.propose(Config(pipelining_depth=1 + n % 12, n_tile=(16, 64, 256)[n % 3])))]
    assert 0.25 < sources[:120].count("explore") / 120 < 0.45


def identify(config: Config) -> str:
    """Eight programs in all."""
    return f"{config.threads_per_block} {config.sync} {config.page_allocation}"


def test_configs_of_a_program_that_was_proposed_are_not() -> None:
    ids = [identify(p.config) for p in proposals(Proposer(5, 0.5, identify), 20)]
    assert len(ids) == len(set(ids)) == 8


def test_a_used_up_space_ends_with_none_after_few_draws() -> None:
    asked: list[Config] = []

    def one_program(config: Config) -> str:
        asked.append(config)
        return "the only one"

    proposer = Proposer(6, 0.5, one_program)
    assert proposer.propose(Config()) is not None
    assert proposer.propose(Config()) is None
    assert len(asked) <= 1 + MAX_DRAWS + len(neighbours(Config()))


def test_a_config_without_an_id_is_proposed_once() -> None:
    configs = [p.config for p in proposals(Proposer(7, 1.0, lambda _: None), 100)]
    assert len(configs) == len(set(configs)) == 100


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_explore_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ValueError, match="explore_fraction"):
        Proposer(0, fraction)
