"""Outputs are the same bits from launch to launch and from process to process, wherever the memory happens to lie."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from amk.dev.judged import same_bits
from amk.tests.gpu.machines import machine, named

pytestmark = pytest.mark.cuda
# Each process takes some memory first: its buffers lie elsewhere than the others'.
CODE = """
import sys, torch
from amk.dev.judged import same_bits
from amk.tests.gpu.machines import machine, named
held = torch.empty(int(sys.argv[2]) * 1_000_003, dtype=torch.uint8, device="cuda")
model = named(sys.argv[1])
print(same_bits(machine(model), model.spec.vocab))
"""


@pytest.mark.parametrize("name", ["small", "llama-3.2-1b-shape", "llama-3.2-1b-shape@int4-g128"])
def test_fresh_processes_give_the_same_bits(name: str, record_property: Any) -> None:
    model = named(name)
    here = same_bits(machine(model), model.spec.vocab, runs=10)
    record_property("outputs_sha256", here)
    for number in ("1", "50"):
        ran = subprocess.run([sys.executable, "-c", CODE, name, number], capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        assert ran.stdout.split()[-1] == here
