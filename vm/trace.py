"""Records what a traced build writes down: when each warp of each SM begins a task, and how long it waits (isa/device/trace.cuh)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from amk.schedule.resources import SERVICE_WARPS
from amk.vm.cuda import UnprovenCudaVM, check

TASK_BEGINS = 255  # a kind of event; the others are those of waits (vm.abort.WaitKind), and 0 is no event
EVENT_DTYPE = np.dtype([("clock", "<u8"), ("value", "<u4"), ("task", "<u2"), ("kind", "u1"), ("token", "u1")])
MOST_STEPS = 255  # the token of an event is a byte


@dataclass(frozen=True, eq=False)
class Recording:
    """`events` [SMs, warps, room] of EVENT_DTYPE in the order in which each warp wrote them; `lost` are those that found no room.

    `clock` is the SM's own cycles. `value` is the low word of the card's nanoseconds where a task begins, and a wait's cycles elsewhere.
    `tokens` are the tokens that the launch chose.
    """

    events: np.ndarray[Any, Any]
    lost: int
    tokens: tuple[int, ...]


def record(machine: UnprovenCudaVM, room: int, position: int, steps: int) -> Recording:
    """One launch of a machine that was loaded with `traced_source(program, room)`, after one that warms up."""
    import torch

    if steps > MOST_STEPS:
        raise ValueError(f"steps: must be at most {MOST_STEPS} in a traced launch, but got {steps}")
    shape = (machine.program.machine.sms, machine.program.machine.consumer_warps + SERVICE_WARPS)
    events = torch.zeros((*shape, room, EVENT_DTYPE.itemsize), dtype=torch.uint8, device="cuda")
    counts = torch.zeros(shape, dtype=torch.int32, device="cuda")
    _point(machine, b"amk_trace_events", events.data_ptr())
    _point(machine, b"amk_trace_counts", counts.data_ptr())
    machine.decode([1], position, steps=steps)
    for tensor in (events, counts):
        tensor.zero_()
    tokens = machine.decode([1], position, steps=steps).tokens
    written = events.cpu().numpy().view(EVENT_DTYPE)[..., 0]
    return Recording(written, int((counts - room).clamp(min=0).sum()), tokens)


def _point(machine: UnprovenCudaVM, name: bytes, address: int) -> None:
    """Sets a pointer of the loaded binary."""
    from cuda.bindings import driver

    where, _ = check(driver.cuModuleGetGlobal(machine.kernel.module, name))
    value = np.array([address], dtype=np.uint64)
    check((*driver.cuMemcpyHtoD(where, value.ctypes.data, value.nbytes), None))
