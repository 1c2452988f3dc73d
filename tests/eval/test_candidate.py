"""Configs on their way to a verdict."""

from __future__ import annotations

from dataclasses import replace

from amk.eval.candidate import prepare
from amk.eval.card import choose
from amk.models.registry import describe


def test_more_rows_than_a_card_is_trusted_with_are_refused_there_alone() -> None:
    spec = describe("small")
    card = replace(choose("h200", "cpu"), device="cuda")
    for batch in (1, 8):
        assert prepare(spec, card, {}, batch=batch).program is not None
    refused = prepare(spec, card, {}, batch=16)
    assert refused.program is None and "at most 8 on a card" in refused.rejections[0]
    assert prepare(spec, choose("h200", "cpu"), {}, batch=16).program is not None
