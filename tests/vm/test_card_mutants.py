"""The card's mutants are edits of the device code. Each must find what it changes, which needs no card to check."""

from __future__ import annotations

import pytest

from amk.models.registry import describe
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.targets import TARGETS
from amk.tests.gpu.test_gate import EDITS, WIDER_WINDOW
from amk.vm.source import kernel_source


@pytest.mark.parametrize("model", ["toy", "small", "smollm2-135m-shape"])
@pytest.mark.parametrize("edit", [*EDITS.values(), WIDER_WINDOW], ids=[*EDITS, "wider window"])
def test_a_card_mutant_changes_the_device_code(model: str, edit: tuple[str, str]) -> None:
    source = kernel_source(lower(describe(model), Config(), TARGETS["h200"]))
    assert source.count(edit[0]) >= 1 and edit[0] != edit[1]
