"""KV rows go into a machine and come out of it; the blocks that the device streams lose nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from amk.isa.machine import Machine
from amk.models.registry import resolve
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.targets import small_target
from amk.vm.kv_blocks import pack_rows, unpack_rows
from amk.vm.reference import UnprovenVM

MODEL = resolve("toy-2L")
PROGRAM = lower(MODEL.spec, Config(), small_target(4))


def rows_of(dtype: torch.dtype, n: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.randn(2, 3, n, head_dim, generator=torch.Generator().manual_seed(n)).to(dtype)
    return made[0], made[1]


@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize("n", [1, 16, 37])
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_unpacking_gives_what_was_packed(name: str, dtype: torch.dtype, n: int, head_dim: int) -> None:
    machine: Machine = replace(PROGRAM.machine, dtype=name, head_dim=head_dim)
    keys, values = rows_of(dtype, n, head_dim)
    packed = pack_rows(machine, keys, values)
    assert packed.shape == (3, -(-n // 16), machine.kv_block_bytes)
    got = unpack_rows(machine, packed, n)
    assert torch.equal(got[0], keys) and torch.equal(got[1], values)


def test_the_reference_machine_gives_back_the_rows_it_was_seeded_with() -> None:
    vm = UnprovenVM(PROGRAM, MODEL.weights)
    spec = MODEL.spec
    keys = torch.randn(spec.kv_heads, 20, spec.head_dim).bfloat16()
    vm.seed_kv(1, keys, -keys)
    got = vm.read_kv(1, 7)
    assert torch.equal(got[0], keys[:, :7].float()) and torch.equal(got[1], -keys[:, :7].float())
    with pytest.raises(ValueError, match="layer: must be from 0 to 1, but got 2"):
        vm.read_kv(spec.layers, 1)
    with pytest.raises(ValueError, match="rows: must be at most"):
        vm.read_kv(0, vm.context + 1)
