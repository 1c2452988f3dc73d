"""Where a measured point comes from: versions, commit, driver and clocks."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from amk.flywheel.origin import cards, commit
from amk.isa.abi import text_hash
from amk.isa.machine import Machine
from amk.isa.registry import headers, instructions
from amk.schedule import program

EVAL_VERSION = "1"  # rises when the oracle or the bench judges or times differently
CLOCK_FIELDS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")


def point_provenance(effective: Any, schedule: Any, shape: dict[str, Any], regime: str, ts: str) -> dict[str, Any]:
    """The fields of a corpus record that a verdict has not."""
    card = next(iter(cards()), {})
    return {
        "shape": shape,
        "regime": regime,
        "schedule": schedule,
        "effective": effective,
        "ir_version": ir_version(),
        "abi_version": abi_version(),
        "eval_version": EVAL_VERSION,
        "commit": commit(),
        "driver": card.get("driver_version", "unknown"),
        "clocks": {name: card[name] for name in CLOCK_FIELDS if name in card},
        "ts": ts,
    }


def abi_version() -> str:
    """Of the records that host and device share."""
    return f"{text_hash(headers()):08x}"


def ir_version() -> str:
    """Of what a program consists of: the records of `schedule.program`, the machine, and every instruction, by field and type."""
    own = [value for value in vars(program).values() if isinstance(value, type) and value.__module__ == program.__name__]
    records = {cls.__name__: cls for cls in (*filter(is_dataclass, own), Machine, *instructions().values())}
    return f"{text_hash(*(f'{name}.{f.name}: {f.type}' for name, cls in sorted(records.items()) for f in fields(cls))):08x}"
