"""Orders of overwrites that the validator must tell apart however it ranks nodes and whichever checks it shares between packets."""

from __future__ import annotations

from dataclasses import replace

import pytest

from amk.isa.embed import Embed
from amk.isa.gemv import Gemv
from amk.schedule.program import Program
from amk.tests.schedule.builder import MACHINE, Builder, Value
from amk.tests.schedule.test_validate import SHORT, head, only, rejections


def embedded(b: Builder, token: Value, name: str) -> Value:
    """All columns of the token's embedding row."""
    x = b.value(name, "f32", b.machine.hidden)
    words = {"token_buf": token.buffer, "token_tag": token.tag, "out_buf": x.buffer, "out_tag": x.tag}
    b.add(0, Embed(col0=0, cols=b.machine.hidden, **words))
    return x


def product(b: Builder, name: str, x: Value, out: Value, rows: int = 16, cols: int = 16, **words: int) -> None:
    """One task, on SM 1."""
    b.product(Gemv, b.matrix(name, rows, cols), x, out, -(-rows // 16), lambda _: 1, **words)


@pytest.mark.parametrize("ordered", [True, False])
def test_of_two_overwrites_of_one_value_each_must_come_after_its_reader(ordered: bool) -> None:
    """w2 and w3 overwrite a half of r each. A longer chain from another embed task is ranked before all that they come after."""
    b = Builder(SHORT)
    token = b.value("token", "u32", 1)
    x, last = embedded(b, token, "x"), embedded(b, token, "other")
    for i in range(6):
        last, before = b.value(f"c{i}", "f32", 16), last
        product(b, f"chain{i}", before, last)
    r, y, c = b.value("r", "f32", 32), b.value("y", "f32", 16), b.value("c", "f32", 32)
    again = b.version(r.buffer)
    product(b, "w0", x, r, rows=32)
    product(b, "w1", r, y, cols=32)
    product(b, "w2", y, again)
    product(b, "w3", y if ordered else x, again, out_start=16)
    product(b, "w4", again, c, cols=32)
    product(b, "w5", last, c, out_start=16)
    head(b, c, token)
    if ordered:
        assert rejections(b.program()) == ()
        return
    found = only(b.program(), "race")
    assert found.regions[0] == ("r", 16, 32) and "gemv w1" in found.message and "gemv w3" in found.message


@pytest.mark.parametrize("start", [0, 8])
def test_a_publish_over_one_value_of_this_token_and_one_of_the_last_is_checked_for_both(start: int) -> None:
    """w2 publishes over tile 0 of r, which w4 makes after it, or over half of that and half of tile 1, which w0 has made before."""
    b = Builder(SHORT)
    token = b.value("token", "u32", 1)
    x, r = embedded(b, token, "x"), b.value("r", "f32", 32)
    u, v, y = (b.value(name, "f32", 16) for name in "uvy")
    over = b.version(r.buffer)
    product(b, "w0", x, r, out_start=16)
    product(b, "w1", r, u, x_start=16)
    product(b, "w2", u, over, out_start=start)
    product(b, "w3", over, v, x_start=start)
    product(b, "w4", v, r)
    product(b, "w5", r, y, cols=32)
    head(b, y, token)
    if start == 0:
        assert rejections(b.program()) == ()
        return
    found = only(b.program(), "race")
    assert found.regions[0] == ("r", 16, 24) and "gemv w5" in found.message and "gemv w2" in found.message


@pytest.mark.parametrize("start", [0, 16])
def test_a_reader_ranked_after_the_task_that_overwrites_its_packets_is_a_race(start: int) -> None:
    """w1 reads one tile of x, of which w0 overwrites tile 1. What follows w0 is the longer way, so its rank comes before that of w1."""
    b = Builder(MACHINE)
    token = b.value("token", "u32", 1)
    x, y, z = embedded(b, token, "x"), b.value("y", "f32", 16), b.value("z", "f32", 32)
    again = b.version(x.buffer)
    product(b, "w0", x, again, cols=32, out_start=16)
    product(b, "w1", x, z, x_start=start)
    product(b, "w2", again, y, x_start=16)
    product(b, "w3", y, z, out_start=16)
    head(b, z, token)
    if start == 0:
        assert rejections(b.program()) == ()
        return
    found = only(b.program(), "race")
    assert found.regions[0] == ("x", 16, 32) and "gemv w1" in found.message and "gemv w0" in found.message


def test_an_unread_packet_is_overwritten_in_the_next_token_by_its_own_publish_alone() -> None:
    """Nobody reads tile 1 of q. y lies there too, or behind it, and is read before q is made."""

    def program(overlap: int, context: int = 96) -> Program:
        b = Builder(replace(SHORT, context=context))
        token = b.value("token", "u32", 1)
        x, z, q = embedded(b, token, "x"), b.value("z", "f32", 16), b.value("q", "f32", 32)
        y = b.value("y", "f32", 16, offset=b.buffers[q.buffer].offset + 32 - overlap)
        c = b.value("c", "f32", 16)
        product(b, "w0", x, y)
        product(b, "w1", y, z)
        product(b, "w2", z, q, rows=32)
        product(b, "w3", q, c)
        head(b, c, token)
        return b.program()

    assert rejections(program(0)) == ()
    assert rejections(program(16, context=1)) == ()
    found = only(program(16), "race")
    assert "gemv w0" in found.message and "of the next token both publish q[16:32]" in found.message
