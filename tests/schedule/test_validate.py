"""What the validator must reject, each beside its last legal neighbour."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, ClassVar

import pytest

from amk.isa.abi import NONE
from amk.isa.attention import PARTIAL_HEAD, Attention
from amk.isa.embed import Embed
from amk.isa.gemv import Gemv
from amk.isa.gemv_glu import GemvGlu
from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Access, Instruction, Memory, Publishes
from amk.isa.machine import Machine
from amk.isa.registry import instructions
from amk.isa.sample import Sample
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import KvCache, Program
from amk.schedule.proven import ValidProgram
from amk.schedule.resources import shared_layout
from amk.schedule.targets import small_target
from amk.schedule.validate import Limits, Rejection, validate
from amk.tests.schedule.builder import MACHINE, Builder, Sizes, Value, changed, changed_all, decoder, find, moved
from amk.tests.schedule.configs import random_config
from amk.tests.schedule.specs import SMALL, random_spec

DECODER = decoder(Sizes())
SHORT = replace(MACHINE, hidden=16)  # of programs whose values have one tile


def rejections(program: Program, limits: Limits | None = None) -> tuple[Rejection, ...]:
    verdict = validate(program, limits)
    return verdict if isinstance(verdict, tuple) else ()


def kinds(program: Program, limits: Limits | None = None) -> set[str]:
    return {rejection.kind for rejection in rejections(program, limits)}


def only(program: Program, kind: str, limits: Limits | None = None) -> Rejection:
    """The first rejection of a program that must have some, all of one kind."""
    found = rejections(program, limits)
    assert {r.kind for r in found} == {kind}, [str(r) for r in found]
    assert all(r.message.startswith(f"[{kind}] ") for r in found)
    return found[0]


def machine(program: Program, **changes: Any) -> Program:
    return replace(program, machine=replace(program.machine, **changes))


def test_a_decoder_built_by_hand_is_proven() -> None:
    for sizes in (Sizes(), Sizes(layers=1, splits=1), Sizes(tiles=3, counters=False), Sizes(window=40), Sizes(splits=4, unit_rows=32)):
        verdict = validate(decoder(sizes))
        assert isinstance(verdict, ValidProgram), [str(r) for r in verdict]


@pytest.mark.parametrize("spec", SMALL, ids=lambda s: s.name)
@pytest.mark.parametrize("sms", (1, 3))
def test_lowerings_of_small_models_are_proven(spec: Any, sms: int) -> None:
    assert rejections(lower(spec, Config(), small_target(sms))) == ()


@pytest.mark.parametrize("seed", range(40))
def test_lowerings_of_random_models_with_random_configs_are_proven(seed: int) -> None:
    config = replace(random_config(seed), smem_bytes_per_block=0, stage_bytes=0)
    assert rejections(lower(random_spec(seed), config, small_target(1 + seed % 7))) == ()


def test_only_validate_makes_a_valid_program() -> None:
    with pytest.raises(TypeError, match="only amk.schedule.validate.validate"):
        ValidProgram(DECODER, object())


# ---- deadlocks and the ring ----------------------------------------------------------------------------------------------------------


def two_products(*, crossed: bool) -> Program:
    """SM 0 makes a from x, and d from c; SM 1 makes c from a. Crossed, SM 0 wants c before it makes a."""
    b = Builder(SHORT)
    token = b.value("token", "u32", 1)
    x, a, c, d = (b.value(name, "f32", 16) for name in "xacd")
    b.add(0, Embed(token_buf=token.buffer, token_tag=token.tag, out_buf=x.buffer, out_tag=x.tag, col0=0, cols=16))
    steps = [(0, "w0", x, a), (1, "w1", a, c), (0, "w2", c, d)]
    for sm, name, source, out in steps:
        b.product(Gemv, b.matrix(name, 16, 16), source, out, 1, lambda _, sm=sm: sm)
    pairs = b.value("pairs", "u32", 2 * 3)
    head = b.matrix("head", MACHINE.vocab, 16)
    b.product(GemvHead, head, d, pairs, 1, lambda _: 1)
    sample = Sample(in_buf=pairs.buffer, in_tag=pairs.tag, out_buf=token.buffer, out_tag=token.tag, count=3)
    b.add(1, sample)
    return moved(b.program(), (0, 1), 2) if crossed else b.program()


def test_queues_of_two_sms_that_wait_for_each_other_are_a_deadlock() -> None:
    assert rejections(two_products(crossed=False)) == ()
    found = only(two_products(crossed=True), "deadlock")
    assert set(found.tasks) == {(0, 1), (0, 2), (1, 0)}
    assert "gemv w2 rows 0:16" in found.message and "wait for each other" in found.message


def test_a_threshold_is_reached_by_all_arrivals_and_not_by_one_more() -> None:
    site = find(DECODER, Sample)[0]
    count = DECODER.task(site).wait_count
    assert rejections(changed(DECODER, site, wait_count=count)) == ()
    assert only(changed(DECODER, site, wait_count=count + 1), "deadlock").tasks == (site,)


def test_a_counter_that_only_later_tasks_of_the_sm_reach_is_a_deadlock() -> None:
    first = find(DECODER, Gemv)[0]
    last = DECODER.task(find(DECODER, Sample)[0]).wait_counter
    assert only(changed(DECODER, first, wait_counter=last, wait_count=1), "deadlock").tasks


def test_a_dropped_hint_is_safe() -> None:
    for site in find(DECODER, Gemv)[:4]:
        assert rejections(changed(DECODER, site, wait_counter=NONE, wait_count=0)) == ()


def test_a_carried_wait_looks_at_the_token_before() -> None:
    embed = find(DECODER, Embed)[0]
    head = DECODER.task(find(DECODER, Sample)[0])
    assert rejections(changed(DECODER, embed, wait_counter=head.wait_counter, wait_count=head.wait_count)) == ()
    over = changed(DECODER, embed, wait_counter=head.wait_counter, wait_count=head.wait_count + 1)
    assert only(over, "deadlock").tasks == (embed,)


def test_a_stream_in_another_order_than_its_queue_is_rejected() -> None:
    stream = DECODER.streams[0]
    swapped = (stream[1], stream[0], *stream[2:])
    found = only(replace(DECODER, streams=(swapped, *DECODER.streams[1:])), "ring")
    assert set(found.tasks) == {(0, stream[0]), (0, stream[1])}
    assert only(replace(DECODER, streams=(stream[:-1], *DECODER.streams[1:])), "ring")
    assert only(replace(DECODER, streams=((*stream, stream[-1]), *DECODER.streams[1:])), "ring")


def test_the_ring_holds_a_chunk_of_its_size_and_none_larger() -> None:
    program = decoder(Sizes(machine=replace(MACHINE, consumer_warps=1)))
    block, fragment = program.machine.kv_block_bytes, 512
    assert rejections(machine(program, stage_bytes=block)) == ()
    found = only(machine(program, stage_bytes=block - 16), "ring")
    assert "KV blocks" in found.message and found.tasks[0] == find(program, Attention, split=0)[0]
    short = decoder(Sizes(machine=replace(MACHINE, consumer_warps=1, context=32)))  # streams no KV rows
    assert rejections(machine(short, stage_bytes=fragment)) == ()
    assert "piece" in rejections(machine(short, stage_bytes=fragment - 16))[0].message


def test_a_ring_without_stages_is_rejected() -> None:
    assert rejections(machine(DECODER, stages=1, inflight=1)) == ()
    assert only(machine(DECODER, stages=0), "bounds")
    assert only(machine(DECODER, inflight=0), "bounds")
    assert only(machine(DECODER, reduction_slots=0), "bounds")


@pytest.mark.parametrize("stages", [2, 5])
def test_a_throttled_feeder_may_copy_and_looks_at_slots_of_the_ring(stages: int) -> None:
    throttled = partial(machine, DECODER, stages=stages, inflight=2)
    for depth, watermark in ((0, 0), (1, 1), (2, 1), (1, stages - 1)):
        assert rejections(throttled(throttled=depth, watermark=watermark)) == ()
    assert "waits forever" in only(throttled(throttled=0, watermark=1), "deadlock").message
    assert "both be 0 or neither" in only(throttled(throttled=1, watermark=0), "deadlock").message
    assert f"less than the {stages} stages" in only(throttled(throttled=1, watermark=stages), "ring").message
    assert only(throttled(throttled=-1, watermark=1), "bounds")


# ---- races ---------------------------------------------------------------------------------------------------------------------------


def test_a_feeder_may_lag_17_tokens_and_not_18() -> None:
    assert rejections(machine(DECODER, kv_lag=17)) == ()
    assert rejections(machine(DECODER, kv_lag=1)) == ()
    found = only(machine(DECODER, kv_lag=18), "race")
    assert found.regions[0][1:] == (15, 16) and found.tasks
    assert only(machine(DECODER, kv_lag=0), "deadlock")


def test_without_streamed_rows_the_lag_does_not_matter() -> None:
    short = decoder(Sizes(machine=replace(MACHINE, context=32)))
    assert rejections(machine(short, kv_lag=99)) == ()
    assert "race" in kinds(machine(decoder(Sizes(machine=replace(MACHINE, context=33))), kv_lag=99))


def test_an_unchecked_read_is_a_race() -> None:
    site = find(DECODER, Gemv)[3]
    found = only(changed(DECODER, site, x_tag=0), "race")
    assert found.tasks == (site,) and found.regions[0].name == "x0"


def ping_pong(buffers: int) -> Program:
    """x0 -> x1 -> x2 -> ... each made from all of the one before by two tasks; value i lies in buffer i mod `buffers`."""
    b = Builder(MACHINE)
    token = b.value("token", "u32", 1)
    places = [b.buffer(f"x{i}", "f32", 32) for i in range(buffers)]
    values = [b.version(places[i % buffers]) for i in range(4)]
    tags = {"token_buf": token.buffer, "token_tag": token.tag, "out_buf": values[0].buffer, "out_tag": values[0].tag}
    for half in (0, 1):
        b.add(half, Embed(col0=16 * half, cols=16, **tags))
    for i in range(3):
        b.product(Gemv, b.matrix(f"w{i}", 32, 32), values[i], values[i + 1], 1, lambda task: task)
    head(b, values[3], token)
    return b.program()


def head(b: Builder, x: Value, token: Value) -> None:
    """All of the head, and the sample, on SM 0."""
    pairs = b.value("pairs", "u32", 2 * 3)
    b.product(GemvHead, b.matrix("head", MACHINE.vocab, b.buffers[x.buffer].packets), x, pairs, 1, lambda _: 0)
    b.add(0, Sample(in_buf=pairs.buffer, in_tag=pairs.tag, out_buf=token.buffer, out_tag=token.tag, count=3))


def test_two_buffers_may_alternate_and_one_may_not() -> None:
    assert rejections(ping_pong(2)) == ()
    found = [r for r in rejections(ping_pong(1)) if r.kind == "race"]
    assert found and found[0].regions[0].name == "x0"
    assert "gemv w0" in found[0].message and "nothing orders them" in found[0].message


def test_overlapping_buffers_are_one_place() -> None:
    program = ping_pong(4)
    first, second = program.buffers[1], program.buffers[2]
    apart = replace(second, offset=first.offset + 32)
    beside = replace(program, buffers=(*program.buffers[:2], apart, *program.buffers[3:]))
    assert rejections(beside) == ()
    over = replace(apart, offset=apart.offset - 2)
    assert kinds(replace(program, buffers=(*program.buffers[:2], over, *program.buffers[3:]))) == {"race"}


def test_program_order_between_tasks_of_one_sm_orders_nothing() -> None:
    """SM 0 reads a, and a later task of it overwrites a: another SM's publish must carry the order."""

    def program(*, ordered: bool) -> Program:
        b = Builder(SHORT)
        token = b.value("token", "u32", 1)
        x, y, c = b.value("x", "f32", 16), b.value("y", "f32", 16), b.value("c", "f32", 32)
        a = b.value("a", "f32", 16)
        again = b.version(a.buffer)
        b.add(0, Embed(token_buf=token.buffer, token_tag=token.tag, out_buf=x.buffer, out_tag=x.tag, col0=0, cols=16))
        b.product(Gemv, b.matrix("w0", 16, 16), x, a, 1, lambda _: 1)
        b.product(Gemv, b.matrix("w1", 16, 16), a, y, 1, lambda _: 0)
        b.product(Gemv, b.matrix("w2", 16, 16), y if ordered else x, again, 1, lambda _: 0)
        b.product(Gemv, b.matrix("w3", 16, 16), y, c, 1, lambda _: 1)
        b.product(Gemv, b.matrix("w4", 16, 16), again, c, 1, lambda _: 1, out_start=16)
        head(b, c, token)
        return b.program()

    assert rejections(program(ordered=True)) == ()
    assert "gemv w1" in only(program(ordered=False), "race").message


def test_a_storers_read_is_ordered_before_the_publishes_of_its_tile_and_later_ones_only() -> None:
    """A task reads one tile of y, whose task reads r tile by tile, and overwrites tile 0 or tile 1 of r."""

    def program(read: int, overwritten: int) -> Program:
        b = Builder(SHORT)
        token = b.value("token", "u32", 1)
        x, y, c = b.value("x", "f32", 16), b.value("y", "f32", 32), b.value("c", "f32", 48)
        r = b.value("r", "f32", 32)
        again = b.version(r.buffer)
        b.add(0, Embed(token_buf=token.buffer, token_tag=token.tag, out_buf=x.buffer, out_tag=x.tag, col0=0, cols=16))
        b.product(Gemv, b.matrix("w0", 32, 16), x, r, 2, lambda _: 1)
        b.product(Gemv, b.matrix("w1", 32, 16), x, y, 2, lambda _: 0, res_buf=r.buffer, res_tag=r.tag)
        b.product(Gemv, b.matrix("w2", 16, 16), y, again, 1, lambda _: 1, x_start=16 * read, out_start=16 * overwritten)
        b.product(Gemv, b.matrix("w3", 32, 32), y, c, 2, lambda _: 1)
        b.product(Gemv, b.matrix("w4", 16, 16), again, c, 1, lambda _: 1, x_start=16 * overwritten, out_start=32)
        head(b, c, token)
        return b.program()

    assert rejections(program(0, 0)) == ()
    assert rejections(program(1, 0)) == ()
    assert rejections(program(1, 1)) == ()
    found = only(program(0, 1), "race")
    assert found.regions[0] == ("r", 16, 32)


def side_branch(context: int, *, joined: bool) -> Program:
    """x -> y -> c. The head reads c, or else x, and then nothing that the next token waits for comes after the reader of y."""
    b = Builder(replace(SHORT, context=context))
    token = b.value("token", "u32", 1)
    x, y, c = b.value("x", "f32", 16), b.value("y", "f32", 16), b.value("c", "f32", 16)
    b.add(0, Embed(token_buf=token.buffer, token_tag=token.tag, out_buf=x.buffer, out_tag=x.tag, col0=0, cols=16))
    b.product(Gemv, b.matrix("w0", 16, 16), x, y, 1, lambda _: 1)
    b.product(Gemv, b.matrix("w1", 16, 16), y, c, 1, lambda _: 1)
    head(b, c if joined else x, token)
    return b.program()


def test_an_overwrite_in_the_next_token_must_come_after_this_tokens_readers() -> None:
    assert rejections(side_branch(96, joined=True)) == ()
    found = rejections(side_branch(96, joined=False))
    assert {r.kind for r in found} == {"race"} and all("of the next token" in r.message for r in found)
    assert {r.regions[0] for r in found} == {("x", 0, 16), ("y", 0, 16)}


def test_a_context_of_one_row_has_no_next_token() -> None:
    assert rejections(side_branch(1, joined=False)) == ()
    assert kinds(side_branch(2, joined=False)) == {"race"}


def test_packets_that_nobody_reads_are_overwritten_by_their_own_publish_alone() -> None:
    """y has two tiles and one is read: that says nothing about the other one's packets, which z overlaps or not."""

    def program(overlap: int) -> Program:
        b = Builder(SHORT)
        token = b.value("token", "u32", 1)
        x, y = b.value("x", "f32", 16), b.value("y", "f32", 32)
        z = b.value("z", "f32", 16, offset=b.buffers[y.buffer].offset + 32 - overlap)
        b.add(0, Embed(token_buf=token.buffer, token_tag=token.tag, out_buf=x.buffer, out_tag=x.tag, col0=0, cols=16))
        b.product(Gemv, b.matrix("w0", 32, 16), x, y, 2, lambda _: 1)
        b.product(Gemv, b.matrix("w1", 16, 16), y, z, 1, lambda _: 0)
        head(b, z, token)
        return b.program()

    assert rejections(program(0)) == ()
    assert "nobody reads the first" in only(program(2), "race").message


# ---- coverage, bounds and kinds ------------------------------------------------------------------------------------------------------


def test_an_uncovered_tile_is_named() -> None:
    site = find(DECODER, GemvGlu)[1]
    sm, index = site
    task = DECODER.task(site)
    queue = DECODER.queues[sm][:index] + DECODER.queues[sm][index + 1 :]
    queues = tuple(queue if i == sm else q for i, q in enumerate(DECODER.queues))
    streams = tuple(tuple(i for i, t in enumerate(q) if t.streamed) for q in queues)
    found = rejections(replace(DECODER, queues=queues, streams=streams))
    rows = 16 * task.tile0, 16 * task.tile0 + 16
    assert any(r.kind == "coverage" and r.regions[0] == ("L0.gate_up", *rows) for r in found)
    assert any(r.kind == "coverage" and "which nobody publishes" in r.message for r in found)


def test_a_doubly_written_tile_is_named() -> None:
    first, second = find(DECODER, GemvGlu)[:2]
    found = rejections(changed(DECODER, second, tile0=DECODER.task(first).tile0))
    tiles = [r for r in found if r.kind == "coverage" and "all compute rows" in r.message]
    assert tiles and set(tiles[0].tasks) == {first, second}
    assert any(r.kind == "coverage" and "both publish" in r.message and "with tag" in r.message for r in found)


def test_the_last_tile_is_in_bounds_and_the_next_is_not() -> None:
    program = decoder(Sizes(tiles=8))
    site = find(program, GemvHead)[0]
    task = program.task(site)
    assert (task.tile0, task.tiles) == (0, 3) and rejections(program) == ()
    assert "tiles 0:4, but its matrix has tiles 0:3" in only_of(changed(program, site, tiles=4), "bounds")
    assert only_of(changed(program, site, tile0=-1), "bounds")


def only_of(program: Program, kind: str) -> str:
    """The message of the first rejection of a kind; others may come with it."""
    return next(r.message for r in rejections(program) if r.kind == kind)


def test_the_last_packet_is_in_bounds_and_the_next_is_not() -> None:
    buffer = next(i for i, b in enumerate(DECODER.buffers) if b.name == "candidates")
    short = replace(DECODER.buffers[buffer], packets=DECODER.buffers[buffer].packets - 1)
    found = rejections(replace(DECODER, buffers=(*DECODER.buffers[:buffer], short, *DECODER.buffers[buffer + 1 :])))
    assert {r.kind for r in found} == {"bounds"} and all(r.regions[0].name == "candidates" for r in found)
    assert only(replace(DECODER, arena_packets=DECODER.arena_packets - 1), "bounds").regions[0].name == "candidates"


def test_the_first_packet_is_in_bounds_and_the_one_before_is_not() -> None:
    """y lies first in the arena: nothing else has packets below it."""

    def program(start: int) -> Program:
        b = Builder(SHORT)
        y, x, z = (b.value(name, "f32", 16) for name in "yxz")
        token = b.value("token", "u32", 1)
        b.add(0, Embed(token_buf=token.buffer, token_tag=token.tag, out_buf=x.buffer, out_tag=x.tag, col0=0, cols=16))
        b.product(Gemv, b.matrix("w0", 16, 16), x, y, 1, lambda _: 0, out_start=start)
        b.product(Gemv, b.matrix("w1", 16, 16), y, z, 1, lambda _: 1, x_start=start)
        head(b, z, token)
        return b.program()

    assert rejections(program(0)) == ()
    found = rejections(program(-16))
    assert {(r.kind, r.regions[0]) for r in found} == {("bounds", ("y", -16, 0))}
    assert tasks_of(found) == {(0, 1), (1, 0)}


def test_a_bias_lies_within_the_constants() -> None:
    site = find(DECODER, Gemv, rows=DECODER.constants[0].count)[0]
    assert rejections(changed(DECODER, site, bias=0)) == ()
    assert "as its bias" in only(changed(DECODER, site, bias=1), "bounds").message
    assert only(changed(DECODER, site, bias=DECODER.constants[0].count), "bounds").tasks == (site,)


def test_a_kv_window_reaches_the_last_row_of_the_cache_and_no_further() -> None:
    assert rejections(replace(DECODER, kv=KvCache(2, 2, 96))) == ()
    assert "past the cache" in only(replace(DECODER, kv=KvCache(2, 2, 80)), "bounds").message
    assert only(machine(DECODER, context=97), "bounds").regions[0] == ("kv", 96, 97)


def test_each_kv_head_has_one_tail_and_every_split_once() -> None:
    second = find(DECODER, Attention, layer=1, kv_head=0, split=1)[0]
    assert "2 among" in only_of(changed(DECODER, second, split=0), "coverage")
    assert "no task takes split 1" in only_of(changed(DECODER, second, kv_head=1, q0=2, k_start=80, v_start=112), "coverage")
    third = decoder(Sizes(splits=3))
    idle = find(third, Attention, layer=0, kv_head=0, split=2)[0]
    assert "all take split 1" in only_of(changed(third, idle, split=1), "coverage")


@pytest.mark.parametrize("word", ["q0", "nq", "window", "unit_rows", "splits", "part_buf", "part_tag", "q_buf", "q_tag"])
def test_splits_of_a_kv_head_are_alike(word: str) -> None:
    second = find(DECODER, Attention, layer=1, kv_head=0, split=1)[0]
    other = {"window": 64, "unit_rows": 32}.get(word, getattr(DECODER.task(second), word) + 1)
    found = rejections(changed(DECODER, second, **{word: other}))
    assert any(r.kind == "coverage" and r.message.endswith(f"differ in {word}") for r in found)


def test_every_kv_head_is_attended_to() -> None:
    other = find(DECODER, Attention, layer=0, kv_head=1)
    program = DECODER
    for site in other:
        program = changed(program, site, layer=1)
    assert "no attention task takes L0 KV heads[1:2]" in only_of(program, "coverage")


def test_a_partial_is_for_its_tail_alone() -> None:
    """At early positions split 1 publishes nothing, so nobody else may count on its partial."""
    part = next(i for i, b in enumerate(DECODER.buffers) if b.name == "partials")
    writer = DECODER.task(find(DECODER, Attention, layer=0, split=1)[0])
    reader = find(DECODER, GemvGlu)[0]
    task = DECODER.task(reader)
    found = rejections(changed(DECODER, reader, x_buf=part, x_tag=writer.part_tag, x_start=0, cols=task.cols))
    assert any(r.kind == "coverage" and "at positions with fewer KV rows" in r.message and reader in r.tasks for r in found)


@pytest.mark.parametrize("row", ["k", "v"])
@pytest.mark.parametrize("off", [0, 2])
def test_a_tail_reads_partials_as_partials_and_not_as_its_new_row(row: str, off: int) -> None:
    """Nobody publishes them at early positions, where it waits for its new row all the same."""
    site = find(DECODER, Attention, layer=0, split=0)[0]
    tail = DECODER.task(site)
    start = tail.q0 * (tail.splits - 1) * (MACHINE.head_dim + PARTIAL_HEAD) + off
    words = {f"{row}_buf": tail.part_buf, f"{row}_tag": tail.part_tag, f"{row}_start": start}
    found = rejections(changed(DECODER, site, **words))
    assert any(r.kind == "coverage" and "at positions with fewer KV rows" in r.message and site in r.tasks for r in found)


def test_a_publish_to_weights_is_rejected() -> None:
    number = next(i for i, b in enumerate(DECODER.buffers) if b.name == "active")
    fixed = replace(DECODER.buffers[number], space="weights", offset=0)
    found = rejections(replace(DECODER, buffers=(*DECODER.buffers[:number], fixed, *DECODER.buffers[number + 1 :])))
    writers = [r for r in found if "read-only" in r.message]
    assert writers and writers[0].kind == "kind" and writers[0].regions[0].name == "active"
    assert writers[0].tasks[0] in find(DECODER, GemvGlu)


@pytest.mark.parametrize("word,value", [("cols", 33), ("rows", 63), ("flags", 0), ("shape", 0)])
def test_a_task_that_disagrees_with_its_matrix_or_shape_is_rejected(word: str, value: int) -> None:
    site = find(DECODER, GemvGlu)[0]
    task = DECODER.task(site)
    assert getattr(task, word) != value or word == "shape"
    program = changed(DECODER, site, **{word: value if word != "shape" else (task.shape + 1) % len(DECODER.shapes)})
    assert "kind" in kinds(program)


def test_packets_of_another_kind_are_rejected() -> None:
    number = next(i for i, b in enumerate(DECODER.buffers) if b.name == "active")
    wrong = replace(DECODER.buffers[number], kind="f32")
    found = only(replace(DECODER, buffers=(*DECODER.buffers[:number], wrong, *DECODER.buffers[number + 1 :])), "kind")
    assert "as narrow packets, but the buffer holds f32" in found.message


def test_an_fp32_machine_needs_whole_packets_for_each_element() -> None:
    assert "bounds" in kinds(machine(DECODER, dtype="fp32", stage_bytes=8192))
    assert only(machine(DECODER, dtype="int8"), "kind")


def test_every_candidate_is_sampled() -> None:
    site = find(DECODER, Sample)[0]
    assert "read by no sample" in only_of(changed(DECODER, site, count=DECODER.task(site).count - 1), "coverage")


@pytest.mark.parametrize("heads", [1, 2])
def test_candidates_are_of_one_head(heads: int) -> None:
    b = Builder(SHORT)
    token, x = b.value("token", "u32", 1), b.value("x", "f32", 16)
    b.add(0, Embed(token_buf=token.buffer, token_tag=token.tag, out_buf=x.buffer, out_tag=x.tag, col0=0, cols=16))
    pairs = b.value("pairs", "u32", 6 * heads)
    ids = [b.product(GemvHead, b.matrix(f"head{i}", MACHINE.vocab, 16), x, pairs, 1, lambda _: 0) for i in range(heads)]
    b.add(0, Sample(in_buf=pairs.buffer, in_tag=pairs.tag, out_buf=token.buffer, out_tag=token.tag, count=3 * heads))
    program = changed_all(b.program(), {at: {"out_start": 2 * i} for i, at in enumerate(chain(*ids))})
    if heads == 1:
        assert rejections(program) == ()
    else:
        assert "the logits of 2 heads" in only(program, "coverage").message


def test_tags_go_up_to_the_machines() -> None:
    assert rejections(machine(DECODER, tags=DECODER.machine.tags)) == ()
    assert only(machine(DECODER, tags=DECODER.machine.tags - 1), "resources")


# ---- resources and handlers ----------------------------------------------------------------------------------------------------------


def test_shared_memory_may_be_full_and_not_overfull() -> None:
    need = shared_layout(DECODER).total
    assert rejections(DECODER, Limits(shared_bytes=need)) == ()
    assert str(need) in only(DECODER, "resources", Limits(shared_bytes=need - 1)).message


def test_scratch_is_the_largest_need_and_no_less() -> None:
    need = max(task.shared_bytes(DECODER.machine) for queue in DECODER.queues for task in queue)
    assert rejections(replace(DECODER, scratch_bytes=need)) == ()
    assert only(replace(DECODER, scratch_bytes=need - 1), "resources").tasks


def test_threads_and_counters_have_limits() -> None:
    counters = len(DECODER.counters)
    assert rejections(DECODER, Limits(counters=counters, threads=160)) == ()
    assert only(DECODER, "resources", Limits(counters=counters - 1))
    assert only(DECODER, "resources", Limits(threads=159))


def test_every_block_has_an_sm_of_its_own() -> None:
    assert rejections(DECODER, Limits(sms=DECODER.machine.sms)) == ()
    assert "run at once" in only(DECODER, "resources", Limits(sms=DECODER.machine.sms - 1)).message


@pytest.mark.parametrize("hidden", [DECODER.machine.hidden * 1024, DECODER.machine.hidden + 16])
def test_an_embedding_row_is_as_long_as_what_embed_tasks_take_of_it(hidden: int) -> None:
    """Device code finds a token's row at so many times `hidden` elements."""
    assert f"all {hidden} of an embedding row" in only(machine(DECODER, hidden=hidden), "bounds").message


@pytest.mark.parametrize(
    ("knob", "value"),
    [
        *(("sync", v) for v in ("none", "", None, "counter ")),
        *(("weight_feed", v) for v in ("auto", "none", 1)),
        *(("release_early", v) for v in (-16, 3, 32, True, 16.0, "16")),
        *(("poll_sleep_ns", v) for v in (-1, 1 << 40, None)),
        *(("cache_hint", v) for v in ("evict_last", ["none"])),
    ],
)
def test_device_knobs_are_values_of_their_knobs(knob: str, value: Any) -> None:
    assert f"device.{knob} must be one of" in only(replace(DECODER, device=replace(DECODER.device, **{knob: value})), "kind").message


def test_device_knobs_are_there() -> None:
    assert "program.device must be a DeviceKnobs" in only(replace(DECODER, device=None), "kind").message  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Undone(Instruction):
    """An instruction that exists in Python only."""

    stem: ClassVar[str] = "undone"

    def reads(self, machine: Machine, position: int) -> list[Access]:
        return []

    def writes(self, machine: Machine, position: int) -> list[Access]:
        return []

    def run(self, memory: Memory, position: int) -> Publishes:
        return []

    def flops(self, machine: Machine, position: int) -> int:
        return 0


def test_an_instruction_without_device_code_is_rejected() -> None:
    program = replace(DECODER, queues=((*DECODER.queues[0], Undone()), *DECODER.queues[1:]))
    assert only(program, "handler").tasks == ((0, len(DECODER.queues[0])),)
    without = frozenset(instructions()) - {"sample"}
    assert only(DECODER, "handler", Limits(handlers=without)).tasks == tuple(find(DECODER, Sample))


# ---- how it reports ------------------------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_and_equal_kinds_are_counted() -> None:
    sites = find(DECODER, Gemv)[:10]
    program = DECODER
    for site in sites:
        program = changed(program, site, x_tag=0)
    program = machine(program, kv_lag=18)
    every = rejections(program, Limits(reports=100))
    assert tasks_of(every) >= set(sites) and {r.kind for r in every} == {"race"}
    found = rejections(program, Limits(reports=4))
    assert found[:4] == every[:4] and found[4].message == f"[race] and {len(every) - 4} more of this kind"


def tasks_of(found: Iterable[Rejection]) -> set[tuple[int, int]]:
    return {task for rejection in found for task in rejection.tasks}
