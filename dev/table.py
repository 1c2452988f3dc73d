"""What every table of measured figures has: its lines, where its figures come from, and which of them are about the present code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from amk.dev.results_check import card_name
from amk.dev.version import present_digest
from amk.schedule.targets import TARGETS

EARLIER = "\\* measured at an earlier version of the program or its kernel."


def is_present(row: Mapping[str, Any], card: str) -> bool:
    """Whether the line's program and kernel are what the code at hand compiles; what does not say so, or has no name, is not."""
    if "code_sha256" not in row or not row["model"] or card not in TARGETS:
        return False
    kind = {"batch": row.get("batch", 1), "prefill": bool(row.get("prefill", False))}
    return bool(row["code_sha256"] == present_digest(row["model"], card, row["context"], **kind))


def line(cells: Iterable[str]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def table_of(head: Sequence[str], lines: Iterable[Iterable[str]]) -> str:
    """A Markdown table of `lines` under `head`."""
    return "\n".join([line(head), line(["---"] * len(head)), *map(line, lines)])


def origin(name: str, data: Mapping[str, Any], folder: str) -> str:
    """Results file, card, driver, clocks, plain read, commit and how many processes; `folder` leads to results/."""
    came = data["provenance"]
    commit, _, changes = came["commit"].partition("+")
    reads, processes = data["plain_read_gbs"], data.get("processes", 1)
    facts = [
        f"[`results/{name}`]({folder}/{name})",
        *dict.fromkeys(_card(card) for card in came["cards"]),
        f"plain read {min(reads):.0f} to {max(reads):.0f} GB/s" + _data_sheet(came["cards"][0]["name"]),
        f"commit `{commit[:12]}`" + (f" with {changes}" if changes else ""),
        came["time_utc"][:10],
        "one process" if processes == 1 else f"medians over {processes} fresh processes",
    ]
    return "; ".join(facts) + "."


def _data_sheet(device_name: str) -> str:
    target = TARGETS.get(card_name(device_name))
    return f" (data sheet: {target.bandwidth_gbs:.0f})" if target else ""


def _card(card: Mapping[str, str]) -> str:
    clocks = f"SM clock {card['clocks.sm']} of {card['clocks.max.sm']}, memory clock {card['clocks.mem']} of {card['clocks.max.mem']}"
    return f"{card['name']}, driver {card['driver_version']}, {clocks}"
