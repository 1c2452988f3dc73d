"""What every instruction states about itself: its words, what it touches, what it streams and what it computes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt

from amk.isa.abi import NONE, U16
from amk.isa.machine import Machine
from amk.isa.sampling import Sampling

F32 = npt.NDArray[np.float32]
Kind = Literal["f32", "narrow", "u32"]
Order = Literal["", "sums", "q", "kv", "x by seat", "x by column", "x by head"]


@dataclass(frozen=True)
class Access:
    """Packets [start, stop) of an arena buffer, read or published with `tag` by one kind of actor.

    `kind` is what the packets must hold: f32 (one fp32), narrow (two 16-bit elements, or one fp32 on an fp32 machine) or u32.
    `carried` reads expect the value of the previous token; on the first token of a launch they read nothing. A read with tag 0
    is not checked by the device. Reads by "storer" belong to one publish: `tile` says which (the publish of the same index). Consumers read
    before all publishes, but where `tile` is not 0: then what was read before is read again, up to that tile's publish.
    `interleaved` packets hold elements of a batch's seats side by side (isa/batch.py), others those of one vector. `paired` ones the device
    takes two at a time, so `start` must be an even packet of the arena.
    `gated` packets carry no tag on the device (isa/stretch.py): a read of them waits for nothing but its task's counter, whose arrivals
    release what was published before; `tag` says which value is meant, and `order` which element is where in it.
    """

    buffer: int
    start: int
    stop: int
    tag: int
    kind: Kind
    actor: Literal["consumer", "storer"] = "consumer"
    carried: bool = False
    tile: int = 0
    interleaved: bool = False
    paired: bool = False
    gated: bool = False
    order: Order = ""


class Memory(Protocol):
    """What an instruction's meaning may touch; the reference machine implements it."""

    machine: Machine
    sampling: Sampling

    def read(self, access: Access) -> F32:
        """Values of a read: elements as fp32 (a narrow packet gives Machine.narrow elements); u32 packets as their bits in int64."""
        ...

    def matrix(self, weight: int) -> F32:
        """The packed matrix as [rows, columns] fp32, its rows in tile order (see schedule.program.Matrix)."""
        ...

    def constant(self, start: int, count: int) -> F32: ...

    def rope(self, position: int) -> F32:
        """[head_dim / 2, 2] of (cos, sin)."""
        ...

    def embedding(self, token: int) -> F32: ...

    def kv_rows(self, layer: int, head: int, start: int, stop: int) -> tuple[F32, F32]:
        """K and V rows [start, stop) of a head, each [rows, head_dim], as the cache holds them."""
        ...

    def active(self) -> int:
        """How many seats of a stretch hold tokens: the first ones."""
        ...

    def reduced_sums(self) -> tuple[F32, Any] | None:
        """Row sums that the consumer warps have made for the running matrix-vector task, and the sum of squares of its x (of each seat's).

        None where nobody has: the task then makes them in one go.
        """
        ...

    def write_kv(self, layer: int, head: int, row: int, k: F32, v: F32) -> None: ...

    def write_logits(self, start: int, values: F32, seat: int = 0) -> None: ...

    def emit_token(self, token: int, seat: int = 0) -> bool:
        """Hands the step's token to the host; True if it is a stop token, which ends the launch."""
        ...

    def forced_token(self, seat: int = 0) -> int | None:
        """The host's token for this step, or None where the device's own choice is the input."""
        ...


Publishes = list[tuple[Access, npt.NDArray[Any]]]


@dataclass(frozen=True, kw_only=True)
class Instruction(ABC):
    """One task of a queue. Integer fields annotated U16 or I32 are its words on the device, in this order.

    The watcher lets the task begin once counter `wait_counter` has had `wait_count` arrivals in this token (of the previous token when
    the instruction is `carried`): a hint, tags make it correct. When done it arrives `arrivals` times at `done_counter`.
    """

    wait_counter: U16 = NONE
    wait_count: U16 = 0
    done_counter: U16 = NONE

    stem: ClassVar[str] = ""
    carried: ClassVar[bool] = False
    polls: ClassVar[bool] = (
        False  # has so few tasks, or so few packets to read, that they look at the tags themselves: quicker than counter and watcher
    )
    streamed: ClassVar[bool] = False  # has chunks in the weight stream
    stored: ClassVar[bool] = False  # publishes through the storer, tile by tile; else the consumers publish
    draws: ClassVar[bool] = False  # takes isa.sampling.Sampling from the launch
    gated: ClassVar[bool] = False  # its counters order: it reads after all arrivals that it waits for, and arrives when it has published
    batched: ClassVar[bool] = False  # belongs to machines that compute a batch of tokens side by side
    by_rows: ClassVar[bool] = False  # a stored product whose consumers multiply whole tiles and publish them in the storer's place

    def arrivals(self, machine: Machine) -> int:
        """Arrivals at the done counter: one by the storer or, where counters order, by all consumers together; else one by each of them."""
        return 1 if self.stored or self.gated else machine.consumer_warps

    @abstractmethod
    def reads(self, machine: Machine, position: int) -> list[Access]: ...

    @abstractmethod
    def writes(self, machine: Machine, position: int) -> list[Access]:
        """Publishes in the order in which they happen; a stored instruction has one for each tile."""

    def chunk_bytes(self, machine: Machine, position: int) -> list[int]:
        """Bytes of each ring chunk that the task consumes, in order."""
        return []

    @abstractmethod
    def run(self, memory: Memory, position: int) -> Publishes:
        """The meaning: values of every publish, in the order of `writes`."""

    def shared_bytes(self, machine: Machine) -> int:
        """Shared memory for scratch, beyond ring, program and reduction slots."""
        return 0
