"""What goes wrong on the card ends a measuring command with a sentence; what is a mistake of ours stays a traceback."""

from __future__ import annotations

import pytest

from amk.dev.judged import NotCorrect
from amk.dev.on_card import on_card
from amk.eval.errors import RunVoid
from amk.vm.interface import LaunchFailed


@pytest.mark.parametrize(
    ("problem", "code"),
    [
        (RunVoid("the card is shared"), 3),
        (NotCorrect("logits differ"), 1),
        (LaunchFailed("timeout", "gave up"), 1),
        (OSError("no room"), 1),
    ],
)
def test_a_problem_is_one_sentence_and_an_exit_code(problem: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, on_card("bench", lock=False, also=(OSError,)):
        raise problem
    assert ended.value.code == code and capsys.readouterr().err == f"bench: {problem}\n"


def test_other_errors_are_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), on_card("bench", lock=False):
        raise ZeroDivisionError
    with pytest.raises(OSError), on_card("bench", lock=False):
        raise OSError("not expected here")


def test_the_lock_is_held_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    held = []

    @contextmanager
    def lock(told: object):  # type: ignore[no-untyped-def]
        held.append("taken")
        yield
        held.append("free")

    monkeypatch.setattr("amk.dev.on_card.live_card_lock", lock)
    with on_card("bench"):
        held.append("work")
    with on_card("bench", lock=False):
        held.append("more")
    assert held == ["taken", "work", "free", "more"]
