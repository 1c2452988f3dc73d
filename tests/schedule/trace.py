"""The arena as docs/machine.md rules it, packet by packet: runs a small program's accesses and says what breaks a rule.

It knows tasks, tags and ancestors only; nothing of the compiler's ops, values or lifetimes. Ancestors are bit sets of events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from amk.isa.instruction import Access, Instruction
from amk.schedule.program import Program


@dataclass
class Packet:
    """What a packet holds, the event of its publish with that publish's ancestors, and the events that have read it."""

    epoch: int
    tag: int
    kind: str
    event: int
    before: int
    readers: int = 0


@dataclass
class Trace:
    program: Program
    packets: dict[int, Packet] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    events: int = 0

    def event(self) -> int:
        self.events += 1
        return 1 << self.events

    def addresses(self, access: Access) -> range:
        buffer = self.program.buffers[access.buffer]
        if not 0 <= access.start <= access.stop <= buffer.packets:
            self.problems.append(f"bounds: {access} in {buffer}")
        return range(buffer.offset + access.start, buffer.offset + access.stop)

    def ready(self, access: Access, epoch: int) -> bool:
        """Whether every packet carries the tag (and a carried read of the first token waits for nothing)."""
        wanted = epoch - access.carried
        found = (self.packets.get(a) for a in self.addresses(access))
        return wanted == 0 or all(p is not None and (p.epoch, p.tag) == (wanted, access.tag) for p in found)

    def read(self, access: Access, event: int, epoch: int) -> int:
        """Marks the packets as read; what comes before the read."""
        before = event
        for address in self.addresses(access) if epoch > access.carried else ():
            packet = self.packets[address]
            if packet.kind != access.kind:
                self.problems.append(f"kind: {access} finds {packet.kind}")
            packet.readers |= event
            before |= packet.event | packet.before
        return before

    def publish(self, access: Access, before: int, epoch: int) -> None:
        event = self.event()
        for address in self.addresses(access):
            old = self.packets.get(address)
            if old is not None and ((old.readers or old.event) & ~before):
                self.problems.append(f"overwrite: {access} of token {epoch} takes packet {address} from tag {old.tag} of token {old.epoch}")
            self.packets[address] = Packet(epoch, access.tag, access.kind, event, before)


def trace(program: Program, positions: Sequence[int]) -> list[str]:
    """What goes wrong when the program runs one token at each position, every SM in queue order."""
    state, machine = Trace(program), program.machine
    for epoch, position in enumerate(positions, start=1):
        at = [0] * machine.sms
        while any(a < len(queue) for a, queue in zip(at, program.queues, strict=True)):
            moved = False
            for sm, queue in enumerate(program.queues):
                while at[sm] < len(queue) and all(state.ready(a, epoch) for a in queue[at[sm]].reads(machine, position)):
                    _run(state, queue[at[sm]], position, epoch)
                    at[sm] += 1
                    moved = True
            if not moved:
                return [*state.problems, f"deadlock at {at} of token {epoch}"]
    return state.problems


def _run(state: Trace, task: Instruction, position: int, epoch: int) -> None:
    machine = state.program.machine
    reads, before, consumer = task.reads(machine, position), 0, state.event()
    for access in reads:
        if access.actor == "consumer":
            before |= state.read(access, consumer, epoch)
    for tile, write in enumerate(task.writes(machine, position)):
        for access in reads:
            if access.actor == "storer" and access.tile == tile:
                before |= state.read(access, state.event(), epoch)
        state.publish(write, before | consumer, epoch)
