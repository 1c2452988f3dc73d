"""The collector is as it was before, whatever happens."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from amk.schedule.collector import collector_paused


@pytest.fixture(autouse=True)
def enabled() -> Iterator[None]:
    yield
    gc.enable()


@pytest.mark.parametrize("before", [True, False])
def test_it_is_off_meanwhile_and_then_as_it_was(before: bool) -> None:
    (gc.enable if before else gc.disable)()
    with collector_paused():
        assert not gc.isenabled()
        with collector_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled() is before


def test_it_is_as_it_was_after_an_error() -> None:
    with pytest.raises(KeyError), collector_paused():
        raise KeyError
    assert gc.isenabled()
