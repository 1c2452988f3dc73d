"""What a program may use of the card, and how large a program the proof takes on."""

from __future__ import annotations

from dataclasses import dataclass, field

from amk.isa.registry import instructions


@dataclass(frozen=True)
class Limits:
    """`sms` of the card, on each of which one block runs; `shared_bytes` and `threads` of a block; `tags` and
    `counters` a token may use; `handlers` are the stems with device code.

    `context` (rows), `tiles` (of all matrices) and `pieces` (packet intervals between the edges of accesses, summed over accesses) bound
    the work of the proof; `reports` is how many rejections of one kind are told in full.
    """

    sms: int = 1024
    shared_bytes: int = 232448
    threads: int = 1024
    tags: int = 0xFFFF
    counters: int = 0xFFFF
    handlers: frozenset[str] = field(default_factory=lambda: frozenset(instructions()))
    context: int = 1 << 20
    tiles: int = 1 << 22
    pieces: int = 1 << 25
    reports: int = 16
