"""The cards that programs are compiled for: facts that placement, resources and the cost model read."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

GB = 10**9
FEED_CAPABILITY = {"bulk": 90, "cp_async": 80, "plain": 0}  # compute capability from which a card has each weight feed, the fastest first


@dataclass(frozen=True)
class Target:
    """One card. `shared_bytes` is what a block may have after opting in; `bandwidth_gbs` is the data sheet's (GB/s, 10^9)."""

    name: str
    arch: str
    sms: int
    shared_bytes: int
    bandwidth_gbs: float
    memory_bytes: int
    clock_mhz: int

    @property
    def capability(self) -> int:
        """Its compute capability: 90 for 9.0."""
        return int(self.arch.removeprefix("sm_").rstrip("af"))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Element types that its tensor cores (or, for fp32, its FMA units) take; before Ampere there is no bf16."""
        return ("fp16", "fp32") if self.capability < 80 else ("bf16", "fp16", "fp32")

    @property
    def feeds(self) -> tuple[str, ...]:
        """The weight feeds that it has, the fastest first."""
        return tuple(feed for feed, least in FEED_CAPABILITY.items() if self.capability >= least)


def _card(name: str, arch: str, sms: int, shared_bytes: int, bandwidth_gbs: float, memory_gb: int, clock_mhz: int) -> Target:
    return Target(name, arch, sms, shared_bytes, bandwidth_gbs, memory_gb * GB, clock_mhz)


TARGETS: dict[str, Target] = {
    card.name: card
    for card in (
        _card("rtx5090", "sm_120a", 170, 101376, 1792, 32, 2407),
        _card("b200", "sm_100a", 148, 232448, 8000, 180, 1965),
        _card("h200", "sm_90a", 132, 232448, 4800, 141, 1980),
        _card("h100", "sm_90a", 132, 232448, 3350, 80, 1980),
        _card("a100", "sm_80", 108, 166912, 2039, 80, 1410),
        _card("l40s", "sm_89", 142, 101376, 864, 48, 2520),
        _card("l4", "sm_89", 58, 101376, 300, 24, 2040),
        _card("a10g", "sm_86", 80, 101376, 600, 24, 1710),
        _card("t4", "sm_75", 40, 65536, 320, 16, 1590),
    )
}


def card_of(device_name: str) -> str | None:
    """The target that a driver's device name ("NVIDIA H200", "Tesla T4") means, None if it is none of ours."""
    words = re.sub(r"rtx\s+", "rtx", device_name.lower())
    return next((word for word in re.findall(r"[a-z0-9]+", words) if word in TARGETS), None)


def live_target(
    device_name: str,
    *,
    arch: str,
    sms: int,
    shared_bytes: int,
    memory_bytes: int,
    clock_mhz: int,
    bandwidth_gbs: float | None = None,
) -> Target:
    """`auto`: the live card's own facts, as the driver reports them.

    Without `bandwidth_gbs` the data sheet's figure of the known card is taken; ValueError if the card is not known either.
    """
    known = card_of(device_name)
    if bandwidth_gbs is None:
        if known is None:
            raise ValueError(f"bandwidth_gbs: must be given for a card that is not in the table, but {device_name!r} came without it")
        bandwidth_gbs = TARGETS[known].bandwidth_gbs
    return Target(known or "auto", arch, sms, shared_bytes, bandwidth_gbs, memory_bytes, clock_mhz)


def small_target(sms: int = 4, shared_bytes: int = 232448) -> Target:
    """An h200 cut down to a few SMs, for tests and for the CPU."""
    return replace(TARGETS["h200"], name=f"small{sms}", sms=sms, shared_bytes=shared_bytes)
