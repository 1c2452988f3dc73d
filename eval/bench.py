"""Latency of a program on the live card: CUDA events, warm-up, quantiles, beside the card's plain-read bandwidth of the same run."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from amk.eval.card import foreign_processes, listed_processes
from amk.eval.errors import RunVoid
from amk.eval.verdict import Latency, Samples
from amk.schedule.cost import streamed_bytes
from amk.schedule.targets import Target
from amk.vm.build import compile_kernel
from amk.vm.cuda import UnprovenCudaVM, check

LAUNCH_TOKENS = 64  # tokens of the launch that is timed; a position is its middle
READ_BLOCKS_PER_SM = (1, 2, 4, 8, 16, 32)
READ_LOADS = (2, 4, 8)
# A card that reads slower is shared, hot or not the card the floor speaks of: some twenty undisturbed H200s read 4,501 to 4,666 GB/s,
# and half of the reads in results/ are below 4,550.
LEAST_READ_GBS = {"h200": 4500.0}
WARM_UP, SAMPLES = 4, 15
READ_BYTES = 4 << 30
READ_ROUNDS, READ_PAUSE_S = 3, 1.0  # of a card that reads slower than it must


def read_bandwidth_gbs(target: Target, repeats: int = 5) -> float:
    """The best plain read of 4 GiB over several grids, GB/s (10^9). RunVoid if the card reads slower than a card of its name must."""
    import torch

    data = torch.randint(-(2**62), 2**62, (READ_BYTES // 8,), dtype=torch.int64, device="cuda")
    out = torch.zeros(4, dtype=torch.int32, device="cuda")

    def one_round() -> float:
        return READ_BYTES / min(_best_read_ms(target, loads, data, out, repeats) for loads in READ_LOADS) / 1e6

    return best_read_gbs(target.name, one_round)


def best_read_gbs(card: str, one_round: Callable[[], float], pause: Callable[[float], None] = time.sleep) -> float:
    """The best of the rounds, GB/s: one, and after a pause another while all fell short of what a card of this name must reach.

    A card whose clocks were low, or that had a moment's other traffic, is not refused for it. RunVoid if READ_ROUNDS rounds fell short.
    """
    least = LEAST_READ_GBS.get(card, 0.0)
    best = one_round()
    for _ in range(READ_ROUNDS - 1):
        if best >= least:
            break
        pause(READ_PAUSE_S)
        best = max(best, one_round())
    if best < least:
        must = f"the card's plain read must reach {least:.0f} GB/s for a measurement"
        raise RunVoid(f"{must}, but the best reached {best:.0f} in {READ_ROUNDS} rounds; is it shared or hot?")
    return best


def _best_read_ms(target: Target, loads: int, data: Any, out: Any, repeats: int) -> float:
    """The quickest read of `data` over the grids, with `loads` loads in flight a thread."""
    from cuda.bindings import driver

    source = f"#define LOADS {loads}\n" + (Path(__file__).parent / "plain_read.cuh").read_text()
    module = check(driver.cuModuleLoadData(compile_kernel(source, target.arch, "plain_read").cubin))
    function = check(driver.cuModuleGetFunction(module, b"plain_read"))
    best = min(_read_ms(driver, function, data, out, target.sms * n) for n in READ_BLOCKS_PER_SM for _ in range(repeats))
    driver.cuModuleUnload(module)
    return best


def _read_ms(driver: Any, function: Any, data: Any, out: Any, blocks: int) -> float:
    import torch

    values = (ctypes.c_void_p(data.data_ptr()), ctypes.c_ulonglong(data.numel() // 2), ctypes.c_void_p(out.data_ptr()))
    arguments = (ctypes.c_void_p * 3)(*(ctypes.addressof(value) for value in values))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    stream = torch.cuda.current_stream().cuda_stream
    check((*driver.cuLaunchKernel(function, blocks, 1, 1, 1024, 1, 1, 0, stream, ctypes.addressof(arguments), 0), None))
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def launch_start(position: int, context: int) -> tuple[int, int]:
    """First position and tokens of the launch that measures `position`: 64 tokens centred on it, from it below 32, cut at the context."""
    start = position if position < LAUNCH_TOKENS // 2 else position - LAUNCH_TOKENS // 2
    return start, min(LAUNCH_TOKENS, context - start)


def interleaved(samplers: Sequence[Callable[[], float]], count: int = SAMPLES) -> list[list[float]]:
    """`count` samples of each sampler after warm-up, taken in turns: what happens to the card's clocks meanwhile happens to all alike."""
    rounds = [[sample() for sample in samplers] for _ in range(WARM_UP + count)]
    return [list(column) for column in zip(*rounds[WARM_UP:], strict=True)]


def launch_us(machine: UnprovenCudaVM, start: int, steps: int) -> float:
    """Microseconds a step of one launch, every row of a batch at work."""
    if machine.batch == 1:
        elapsed = machine.decode([1], start, steps=steps).elapsed_us
    else:
        elapsed = machine.decode_batch([[1]] * machine.batch, [start] * machine.batch, steps=steps).elapsed_us
    assert elapsed is not None
    return elapsed / steps


def quantiles(samples: list[float]) -> Samples:
    p10, p50, p90 = (float(q) for q in np.quantile(samples, [0.1, 0.5, 0.9]))
    return Samples(p10, p50, p90, len(samples))


@dataclass(frozen=True)
class Timing:
    """Microseconds a token: of the launches that measure a position, of launches of one token there, and of each other sampler."""

    samples_us: list[float]
    single_us: list[float]
    others_us: list[list[float]]


def take(machine: UnprovenCudaVM, position: int, others: Sequence[Callable[[], float]] = ()) -> Timing:
    """Samples of the machine at `position`, in turns with `others`. RunVoid if another process is on the card before or after."""
    refuse_company()
    start, steps = launch_start(position, machine.context)
    many, *rest = interleaved([lambda: launch_us(machine, start, steps), *others])
    (single,) = interleaved([lambda: launch_us(machine, position, 1)])
    refuse_company()
    return Timing(many, single, rest)


def measured(
    machine: UnprovenCudaVM, target: Target, position: int, bandwidth_gbs: float, digests: tuple[str, str], timing: Timing
) -> Latency:
    """The latency that a timing at `position` shows, beside the floor at the bandwidth of the same run."""
    return Latency(
        program_digest=digests[0],
        binary_digest=digests[1],
        kind="measured-gpu",
        position=position,
        latency_us=quantiles(timing.samples_us).p50,
        streamed_bytes=streamed_bytes(machine.program, position),
        bandwidth_gbs=bandwidth_gbs,
        bandwidth_kind="measured",
        spec_bandwidth_gbs=target.bandwidth_gbs,
        samples=quantiles(timing.samples_us),
        single_launch_us=quantiles(timing.single_us).p50,
    )


def refuse_company(context: bool = True) -> None:
    """RunVoid if another process has a context on the card. `context`: whether this process has one yet, which is listed too."""
    others = foreign_processes() if context else [pid for pid in listed_processes() if pid != os.getpid()]
    if others:
        raise RunVoid(f"the card must be free of other processes to be measured, but process {others[0]} is on it; measure again later")
