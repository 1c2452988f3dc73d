"""The oracle's small operations run in one thread, and what comes after them has torch's threads again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amk.eval import kv_rows, oracle
from amk.eval.kv_rows import Rows
from amk.eval.one_thread import one_thread


@pytest.fixture(autouse=True)
def three_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    assert torch.get_num_threads() == 3
    torch.set_num_threads(before)


def test_the_threads_come_back_after_an_error_too() -> None:
    with pytest.raises(ValueError), one_thread():
        assert torch.get_num_threads() == 1
        raise ValueError


def test_a_judged_step_is_compared_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(oracle, "change_chance", lambda *_: seen.append(torch.get_num_threads()) or 0.0)
    logits = torch.randn(200_000)
    step = oracle.compare(0, int(logits.argmax()), logits, logits, 0.01)
    assert step.agrees and seen == [1]


def test_kv_rows_are_compared_in_one_thread() -> None:
    seen = []

    def rows(layer: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(torch.get_num_threads())
        return torch.ones(2, stop, 4), torch.ones(2, stop, 4)

    assert float(kv_rows.relative_errors(rows, rows, 1, Rows(0, 3)).max()) == 0 and seen == [1, 1]
