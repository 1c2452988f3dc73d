"""Outputs are the same bits from launch to launch and from process to process, wherever the memory happens to lie."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from amk.dev.judged import same_bits
from amk.isa.machine import KV_BLOCK_ROWS
from amk.schedule.compile import lower
from amk.schedule.settings import STRETCHES
from amk.tests.gpu.machines import card, config_of, machine, named, proven
from amk.vm.cuda import CudaVM

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


@pytest.mark.parametrize("stretch", STRETCHES)
def test_many_launches_of_a_stretch_write_the_same_rows(stretch: int) -> None:
    """A chunk that is overwritten while it is read shows as other bits now and then: rows of the last layer depend on every product."""
    model = named("llama-3.2-1b-shape")
    decoder = machine(model)
    program = lower(model.spec, config_of({}), card(), context=1024, batch=stretch, prefill=True)
    prefill = CudaVM(proven(program), model.weights, arch=card().arch, beside=decoder)
    tokens, expected = list(range(100, 100 + stretch)), None
    for launch in range(200):
        prefill.kv.zero_()
        prefill.prefill(tokens, 0)
        rows = prefill.kv[:, :, : -(-stretch // KV_BLOCK_ROWS)].clone()
        expected = rows if expected is None else expected
        assert torch.equal(rows, expected), f"launch {launch} wrote other rows than the first"
    prefill.close()
    decoder.close()
