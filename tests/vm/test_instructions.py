"""What single instructions mean, at the points that a whole model seldom reaches."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from amk.isa.embed import Embed
from amk.isa.gemv_head import GemvHead, comparable
from amk.isa.rounding import round_to
from amk.isa.sample import Sample
from amk.vm.packets import decode_packets, encode_packets
from amk.vm.reference import SequentialMemory, UnprovenVM

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@pytest.fixture
def vm(make_spec: Any, make_program: Any, make_source: Any) -> UnprovenVM:
    spec = make_spec("bf16")
    return UnprovenVM(make_program(spec), make_source(spec))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_torchs(dtype: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 20_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([1 + 2**-8, 1 + 3 * 2**-8, 65519, 65520, 1e-8, -0.0], dtype=np.float32)])
    expected = torch.from_numpy(values).to(DTYPES[dtype]).float().numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(round_to(values, dtype), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_narrow_packets_hold_what_the_dtype_can(dtype: str, count: int) -> None:
    values = round_to(np.random.default_rng(count).standard_normal(count), dtype)
    packets = encode_packets(values, "narrow", dtype)
    assert len(packets) == (count if dtype == "fp32" else (count + 1) // 2)
    np.testing.assert_array_equal(decode_packets(packets, "narrow", dtype)[:count], values)


def test_a_16_bit_packet_has_its_first_element_in_the_low_half() -> None:
    assert encode_packets(np.array([1.0, -2.0], dtype=np.float32), "narrow", "bf16").tolist() == [0xC0003F80]


class Memory(SequentialMemory):
    """A memory whose reads are given."""

    def __init__(self, vm: UnprovenVM, values: Any, forced: int | None = None) -> None:
        super().__init__(vm.program, vm._weights, vm._kv, vm._inputs([0], 0, 1, True), 0, vm._arena, 1)
        self.values, self.forced, self.sampled = values, forced, -1

    def read(self, access: Any) -> Any:
        return np.asarray(self.values)

    def forced_token(self) -> int | None:
        return self.forced

    def emit_token(self, token: int, seat: int = 0) -> bool:
        self.sampled = token
        return False


def test_sampling_takes_the_lowest_token_of_equal_logits(vm: UnprovenVM) -> None:
    logits = np.array([0.5, 2.0, 2.0, -3.0], dtype=np.float32)
    pairs = np.stack([logits.view(np.uint32).astype(np.int64), [4, 90, 17, 1]], 1).ravel()
    memory = Memory(vm, pairs)
    ((_, token),) = Sample(in_buf=0, in_tag=1, out_buf=1, out_tag=2, count=4).run(memory, 0)
    assert memory.sampled == token == 17


def test_a_head_task_names_the_lowest_row_of_equal_logits(vm: UnprovenVM) -> None:
    head = next(task for queue in vm.program.queues for task in queue if isinstance(task, GemvHead))
    publishes = head.run(Memory(vm, np.zeros(head.cols, dtype=np.float32)), 0)
    assert [len(values) for _, values in publishes] == [0] * (head.tiles - 1) + [2]
    assert publishes[-1][1].tolist() == [0, 16 * head.tile0]


def test_logits_that_are_no_numbers_are_less_than_all_others_and_the_first_row_is_a_token_still() -> None:
    """As on the device, which never finds them greater: the next step looks the token up. Of one sequence, and of each seat of a batch."""
    y = np.full((64, 2), np.nan, dtype=np.float32)
    y[40, 1] = -7.0
    assert [int(comparable(y[:, seat]).argmax()) for seat in (0, 1)] == comparable(y).argmax(axis=0).tolist() == [0, 40]


def test_a_token_is_chosen_where_every_logit_is_no_number(vm: UnprovenVM) -> None:
    head = next(task for queue in vm.program.queues for task in queue if isinstance(task, GemvHead))
    publishes = head.run(Memory(vm, np.full(head.cols, np.nan, dtype=np.float32)), 0)
    memory = Memory(vm, publishes[-1][1])
    ((_, token),) = Sample(in_buf=0, in_tag=1, out_buf=1, out_tag=2, count=1).run(memory, 0)
    assert memory.sampled == token == 16 * head.tile0


@pytest.mark.parametrize(("forced", "sampled", "taken"), [(5, 9, 5), (None, 9, 9)])
def test_embed_prefers_the_hosts_token(
    forced: int | None, sampled: int, taken: int, vm: UnprovenVM, make_source: Any, make_spec: Any
) -> None:
    task = Embed(token_buf=0, token_tag=1, out_buf=1, out_tag=2, col0=16, cols=32)
    ((_, row),) = task.run(Memory(vm, [sampled], forced), 0)
    assert row.tolist() == make_source(make_spec("bf16")).tensor("embed")[taken, 16:48].float().tolist()
