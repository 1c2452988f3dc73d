"""Waits of one actor for another of its SM, each with a neighbour that ends."""

from __future__ import annotations

from dataclasses import replace

from amk.isa.attention import Attention
from amk.isa.embed import Embed
from amk.isa.gemv import Gemv
from amk.isa.matvec import X_NARROW
from amk.isa.registry import instructions
from amk.isa.sample import Sample
from amk.schedule.program import Program
from amk.tests.schedule.builder import MACHINE, Builder, Sizes, changed, decoder, find, moved
from amk.tests.schedule.test_validate import SHORT, head, only, rejections


def test_tiles_that_wait_for_reduction_slots_behind_a_late_residual_are_a_deadlock() -> None:
    def program(slots: int, tiles: int) -> Program:
        b = Builder(replace(SHORT, reduction_slots=slots))
        token = b.value("token", "u32", 1)
        x, r, y, z = (b.value(name, "f32", 16) for name in "xryz")
        b.add(0, Embed(token_buf=token.buffer, token_tag=token.tag, out_buf=x.buffer, out_tag=x.tag, col0=0, cols=16))
        b.product(Gemv, b.matrix("w0", 16, 16), x, y, 1, lambda _: 0, res_buf=r.buffer, res_tag=r.tag)
        normed = b.value("normed", "narrow", 8)
        norm = {"x_buf": x.buffer, "x_tag": x.tag, "out_buf": normed.buffer, "out_tag": normed.tag, "cols": 16, "col0": 0, "count": 16}
        q = b.value("q", "f32", 16 * tiles)
        b.product(Gemv, b.matrix("w1", 16 * tiles, 16), x, q, tiles, lambda _: 0)
        b.add(0, instructions()["rmsnorm"](gain=b.constant("gain", 16), **norm))
        b.product(Gemv, b.matrix("w2", 16, 16), normed, r, 1, lambda _: 1, flags=X_NARROW)
        b.product(Gemv, b.matrix("w3", 16, 16 * tiles), q, z, 1, lambda _: 1, res_buf=y.buffer, res_tag=y.tag)
        head(b, z, token)
        return b.program()

    assert rejections(program(2, tiles=1)) == () and rejections(program(3, tiles=2)) == ()
    for slots, tiles in ((1, 1), (2, 2), (1, 2)):
        assert only(program(slots, tiles), "deadlock").tasks


def test_a_storer_that_waits_for_a_residual_keeps_later_tiles_from_being_published() -> None:
    """On SM 0 w0 adds r and w1 makes q, of which SM 1 makes r. There are slots for both."""
    b = Builder(replace(SHORT, reduction_slots=4))
    token = b.value("token", "u32", 1)
    x, r, y, q = (b.value(name, "f32", 16) for name in "xryq")
    b.add(0, Embed(token_buf=token.buffer, token_tag=token.tag, out_buf=x.buffer, out_tag=x.tag, col0=0, cols=16))
    late = b.product(Gemv, b.matrix("w0", 16, 16), x, y, 1, lambda _: 0, res_buf=r.buffer, res_tag=r.tag)[0]
    b.product(Gemv, b.matrix("w1", 16, 16), x, q, 1, lambda _: 0)
    b.product(Gemv, b.matrix("w2", 16, 16), q, r, 1, lambda _: 1)
    head(b, y, token)
    crossed = b.program()
    assert rejections(moved(crossed, late, late[1] + 1)) == ()
    found = only(crossed, "deadlock")
    assert "gemv w0" in found.message and "gemv w1" in found.message


def test_a_watcher_that_waits_for_an_idle_task_releases_no_later_one() -> None:
    """No position has rows for the last split, which waits all the same: for the candidates, or for what the tail waits for."""
    program = decoder(Sizes(splits=3, machine=replace(MACHINE, context=32)))
    idle, tail = (find(program, Attention, layer=0, kv_head=0, split=split)[0] for split in (2, 0))
    end, before = program.task(find(program, Sample)[0]), program.task(tail)
    assert rejections(changed(program, idle, wait_counter=before.wait_counter, wait_count=before.wait_count)) == ()
    assert idle in only(changed(program, idle, wait_counter=end.wait_counter, wait_count=1), "deadlock").tasks
