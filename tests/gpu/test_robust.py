"""Hangs that end by themselves, the end of the tags, delayed actors, and bits that never move."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amk.models.model import Model
from amk.tests.gpu.machines import llama, machine, named
from amk.vm.abort import Actor
from amk.vm.cuda import LAST_EPOCH
from amk.vm.interface import LaunchFailed

pytestmark = pytest.mark.cuda
TOKENS = [3, 141, 59, 26, 5, 35, 89, 79, 32, 38]
ACTORS = {actor.name.lower().replace("_", " "): int(actor) for actor in Actor}


def model() -> Model:
    return llama("robust", num_attention_heads=8, num_key_value_heads=2, head_dim=64)


def outputs(vm: Any, steps: int = 80) -> torch.Tensor:
    decoded = vm.decode(TOKENS, 0, steps=steps, logits=True)
    assert decoded.logits is not None
    return decoded.logits


@pytest.mark.parametrize("actor", ACTORS)
def test_a_hang_ends_by_itself_and_the_next_evaluation_works(actor: str) -> None:
    stuck = machine(model(), macros={"HANG_ACTOR": ACTORS[actor]}, spin_limit=1 << 16)
    with pytest.raises(LaunchFailed) as failure:
        stuck.decode(TOKENS, 0, steps=20)
    assert failure.value.kind == "timeout"
    assert torch.isfinite(outputs(machine(model()))).all()


def test_a_machine_works_again_after_a_hang_of_its_own() -> None:
    vm = machine(model(), spin_limit=1 << 16)
    expected = outputs(vm)
    vm.counters.fill_(-(2**30))  # every hint far in the past: watchers wait in vain
    with pytest.raises(LaunchFailed) as failure:
        outputs(vm)
    assert failure.value.kind == "timeout"
    assert torch.equal(outputs(vm), expected)


def test_the_host_can_end_a_launch() -> None:
    vm = machine(model(), macros={"HANG_ACTOR": ACTORS["consumer"]}, spin_limit=1 << 30)
    vm.host_abort.fill_(1)
    with pytest.raises(LaunchFailed):
        vm.decode(TOKENS, 0)


def test_a_machine_works_again_after_who_hears_of_tokens_raised() -> None:
    class Enough(Exception):
        pass

    def hear(step: int, token: int) -> None:
        raise Enough

    vm, heard = machine(model(), max_steps=1024), []
    expected = outputs(vm)
    with pytest.raises(Enough):
        vm.decode(TOKENS, 0, steps=1024, on_token=hear)
    assert torch.cuda.current_stream().query()  # the launch is over: nothing that it writes is told as a later one's
    tokens = vm.decode(TOKENS, 0, steps=80, on_token=lambda step, token: heard.append(token)).tokens
    assert heard == list(tokens)
    assert torch.equal(outputs(vm), expected)


@pytest.mark.parametrize("before", [0, 1, 5, 79, 80, 81, 200])
def test_a_launch_near_the_end_of_the_tags_is_correct(before: int) -> None:
    vm = machine(model())
    expected = outputs(vm)
    last = LAST_EPOCH // vm.program.machine.tags
    vm._reset()
    vm.epoch = last - before
    vm.counters.zero_()
    # Counters are the tokens' since the arena was zeroed, times the arrivals of one token.
    vm.counters += torch.tensor([_wrapped(n * vm.epoch) for n in vm.arrivals()], dtype=torch.int32, device="cuda")
    assert torch.equal(outputs(vm), expected)


def _wrapped(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - 2**32 if value >= 2**31 else value


def test_runs_are_bit_identical() -> None:
    vm = machine(named("small"))
    first = outputs(vm)
    assert all(torch.equal(outputs(vm), first) for _ in range(20))


@pytest.mark.parametrize("name", ["toy", "small"])
def test_delaying_random_actors_never_changes_a_bit(name: str) -> None:
    expected = outputs(machine(named(name)))
    stressed = machine(named(name), macros={"STRESS": 1})
    assert all(torch.equal(outputs(stressed), expected) for _ in range(10))


@pytest.mark.parametrize("changes", [{}, {"fusion_grouping": []}], ids=["fused", "unfused"])
def test_without_hints_delays_change_no_bit(changes: dict[str, Any]) -> None:
    """Counters are hints: without them consumers run apart, and only tags and barriers keep them right."""
    config = {"kernel_knobs": {"sync": "tags"}} | changes
    expected = outputs(machine(named("small"), config))
    stressed = machine(named("small"), config, macros={"STRESS": 1})
    assert all(torch.equal(outputs(stressed), expected) for _ in range(10))


def test_hints_change_no_bit() -> None:
    model = named("llama-3.2-1b-shape")
    assert torch.equal(outputs(machine(model), 24), outputs(machine(model, {"kernel_knobs": {"sync": "tags"}}), 24))


def test_stale_memory_is_never_read() -> None:
    """Rows past the sequence, logits and packets hold NaN and old values: the outputs do not change."""
    vm = machine(model())
    expected = outputs(vm)
    vm.kv.fill_(0xFF)  # NaN in every row
    vm.arena.copy_(torch.full_like(vm.arena, 0x7FC00000))  # NaN with tag 0, never published
    assert torch.equal(outputs(vm), expected)


def test_an_arena_may_lie_elsewhere() -> None:
    """In memory that held another's packets, too."""
    vm = machine(model())
    expected, elsewhere = outputs(vm), vm.arena.clone()
    assert torch.equal(outputs(vm), expected)  # so that the tags in its first place are of later epochs
    vm.move_arena(elsewhere)
    assert torch.equal(outputs(vm), expected)
    with pytest.raises(ValueError, match=r"arena: must be \[\d+\] of torch.int64"):
        vm.move_arena(elsewhere[1:])


def test_many_tokens_of_one_launch_equal_single_launches() -> None:
    vm = machine(model())
    together = vm.decode(TOKENS, 0, steps=64)
    token, singly = TOKENS[0], []
    for position in range(64):
        token = vm.decode([TOKENS[position] if position < len(TOKENS) else token], position).tokens[0]
        singly.append(token)
    assert list(together.tokens) == singly
