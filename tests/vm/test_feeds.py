"""Weight feeds and the way of Turing: what each build is made of, and that it is built for every card it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amk.dev.build_variants import Variant, variants
from amk.models.registry import describe
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.targets import FEED_CAPABILITY, TARGETS, Target
from amk.vm.build import BuildFailed, compile_kernel
from amk.vm.source import kernel_source

# What no build of a feed may hold: words of the others.
FOREIGN = {"bulk": ("cp.async.cg", "ld.global.cs"), "cp_async": ("cp.async.bulk", "ld.global.cs"),
           "plain": ("cp.async.", "mbarrier.arrive", "mbarrier.init", "createpolicy")}  # fmt: skip


def program(feed: str, dtype: str = "fp16") -> Program:
    return lower(replace(describe("toy-2L"), dtype=dtype), Config(weight_feed=feed), TARGETS["h200"])


def test_kernels_are_built_for_every_listed_card_with_each_feed_that_it_has() -> None:
    """`make check` compiles them (dev/build_variants.py)."""
    cases = [(variant, TARGETS[card]) for variant in variants() for card in ("h200", *variant.others)]
    built = {(target.arch, feed) for variant, target in cases for feed in [feed_of(variant, target)]}
    assert {target.arch for target in TARGETS.values()} == {arch for arch, _ in built}
    assert {(target.arch, target.feeds[0]) for target in TARGETS.values()} <= built
    assert {("sm_90a", feed) for feed in FEED_CAPABILITY} <= built


def feed_of(variant: Variant, target: Target) -> str:
    asked: str = variant.config.get("kernel_knobs", {}).get("weight_feed", "auto")
    return target.feeds[0] if asked == "auto" else asked


@pytest.mark.parametrize("feed", FEED_CAPABILITY)
def test_a_source_holds_nothing_of_the_other_feeds(feed: str) -> None:
    source = kernel_source(program(feed))
    assert not [words for words in FOREIGN[feed] if words in source]


def test_feeds_are_binaries_of_their_own_with_the_same_records() -> None:
    programs = [program(feed) for feed in FEED_CAPABILITY]
    assert len({compile_kernel(kernel_source(p), "sm_90a").digest for p in programs}) == len(programs)
    assert len({p.queues for p in programs}) == 1


@pytest.mark.parametrize(
    ("feed", "first", "before"), [("bulk", "sm_90a", "sm_89"), ("cp_async", "sm_80", "sm_75"), ("plain", "sm_75", None)]
)
def test_a_feed_builds_for_the_first_card_that_has_it_and_not_for_the_last_that_has_not(feed: str, first: str, before: str | None) -> None:
    source = kernel_source(program(feed))
    assert feed in replace(TARGETS["h200"], arch=first).feeds
    assert compile_kernel(source, first).stack_bytes == 0
    if before:
        assert feed not in replace(TARGETS["h200"], arch=before).feeds
        with pytest.raises(BuildFailed):
            compile_kernel(source, before)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_turing_builds_every_element_type_that_it_has(dtype: str) -> None:
    source = kernel_source(program("plain", dtype))
    if dtype in TARGETS["t4"].dtypes:
        assert compile_kernel(source, "sm_75").stack_bytes == 0
    else:
        with pytest.raises(BuildFailed):
            compile_kernel(source, "sm_75")


def test_the_macro_takes_turings_way_on_another_card_and_changes_nothing_on_its_own() -> None:
    plain, forced = (kernel_source(program("plain"), TURING=on) for on in (0, 1))
    assert compile_kernel(plain, "sm_90a").digest != compile_kernel(forced, "sm_90a").digest
    assert compile_kernel(plain, "sm_75").digest == compile_kernel(forced, "sm_75").digest
    assert "m16n8k8" in plain and "m16n8k16" in plain
