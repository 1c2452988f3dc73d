"""The arena: 8-byte packets {value, tag}, and the epochs that make every token's tags new."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from amk.isa.instruction import Access
from amk.schedule.program import Program
from amk.vm.interface import LaunchFailed
from amk.vm.packets import decode_packets, encode_packets

WORD = 1 << 32  # tags and counters are 32-bit words


class Arena:
    """Packets of every buffer of a program. `epoch` is that of the next token to begin: 1 for the first one after the arena was zeroed."""

    def __init__(self, program: Program, first_epoch: int = 1) -> None:
        self.program = program
        self.tags_per_token = program.machine.tags
        self.dtype = program.machine.dtype
        self.offsets = [buffer.offset for buffer in program.buffers]
        self.values = np.zeros(program.arena_packets, dtype=np.uint32)
        self.tags = np.zeros(program.arena_packets, dtype=np.uint32)
        self.epoch = first_epoch

    def zero(self) -> None:
        """No packet is published, and epochs start again."""
        self.values[:] = 0
        self.tags[:] = 0
        self.epoch = 1

    def begin(self, steps: int) -> int:
        """Takes the epochs of a launch of `steps` tokens and returns the first; zeroes the arena where their tags would not fit 32 bits."""
        if (self.epoch + steps) * self.tags_per_token >= WORD:
            self.zero()
        first = self.epoch
        self.epoch += steps
        return first

    def packets(self, access: Access) -> slice:
        offset = self.offsets[access.buffer]
        return slice(offset + access.start, offset + access.stop)

    def tag(self, access: Access, epoch: int) -> int:
        """The tag word that a read or publish of `access` in `epoch` uses."""
        return (epoch - access.carried) * self.tags_per_token + access.tag

    def holds(self, access: Access, epoch: int) -> bool:
        """Whether a read of `access` would find its tag in every packet (always, where it does not check)."""
        return access.tag == 0 or bool((self.tags[self.packets(access)] == self.tag(access, epoch)).all())

    def load(self, access: Access) -> npt.NDArray[Any]:
        """The elements that the packets hold now, whatever their tags; LaunchFailed if an unchecked read finds one never published."""
        if access.tag == 0 and not self.tags[self.packets(access)].all():
            name = self.program.buffers[access.buffer].name
            raise LaunchFailed("crash", f"{name}[{access.start}:{access.stop}] must be published before its unchecked read, but never was")
        return decode_packets(self.values[self.packets(access)], access.kind, self.dtype)

    def store(self, access: Access, values: npt.NDArray[Any], epoch: int) -> None:
        packets = self.packets(access)
        self.values[packets] = encode_packets(values, access.kind, self.dtype)
        self.tags[packets] = self.tag(access, epoch)

    def describe(self, access: Access, epoch: int) -> str:
        """What a read waits for, and the tag words that it finds instead, for messages."""
        found = sorted(set(self.tags[self.packets(access)].tolist()) - {self.tag(access, epoch)})
        name = self.program.buffers[access.buffer].name
        words = ", ".join(map(str, found[:3]))
        return f"{name}[{access.start}:{access.stop}] to carry tag {access.tag} (word {self.tag(access, epoch)}; it finds {words})"
