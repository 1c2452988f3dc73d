"""README's performance table, rendered from the results files that `dev/bench_gpu.py` wrote; every figure in it is in one of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- performance: rendered by dev/readme_table.py -->", "<!-- end of performance -->"
NOTHING = "*Nothing is measured yet: there is no `results/bench-CARD.json`.*"
BASELINES = {"cuda-graph": "transformers, CUDA graph", "torch-compile": "torch.compile"}
HEAD = ("model", "position", "us/token", "share of the floor", *(f"{title}: us (ratio)" for title in BASELINES.values()))


def render() -> str:
    """The whole of README.md with the table that results/ gives."""
    return with_table((ROOT / "README.md").read_text(encoding="utf-8"), table(ROOT / "results"))


def with_table(readme: str, text: str) -> str:
    """`readme` with `text` between the two markers; ValueError if they are not there, once each and in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise ValueError(f"README.md must have {BEGIN!r} and then {END!r}, each once")
    return f"{before}{begin}\n{text}\n{end}{after}"


def table(results: Path) -> str:
    """One table for each bench-*.json in `results`, under a line that says where its figures come from."""
    files = sorted(results.glob("bench-*.json"))
    return "\n\n".join(_file_table(path) for path in files) or NOTHING


def _file_table(path: Path) -> str:
    data = json.loads(path.read_text(encoding="utf-8"))
    lines = [_line(HEAD), _line(["---"] * len(HEAD)), *(_line(_cells(row)) for row in data["latency"] if row["config"] == "default")]
    return "\n".join([_origin(path.name, data), "", *lines])


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(name: str, data: dict[str, Any]) -> str:
    """Results file, card, driver, clocks, plain read, commit and how many processes."""
    came = data["provenance"]
    commit, _, changes = came["commit"].partition("+")
    reads, processes = data["plain_read_gbs"], data.get("processes", 1)
    facts = [
        f"[`results/{name}`](results/{name})",
        *(_card(card) for card in came["cards"]),
        f"plain read {min(reads):.0f} to {max(reads):.0f} GB/s",
        f"commit `{commit[:12]}`" + (f" with {changes}" if changes else ""),
        came["time_utc"][:10],
        "one process" if processes == 1 else f"medians over {processes} fresh processes",
    ]
    return "; ".join(facts) + ":"


def _card(card: dict[str, str]) -> str:
    clocks = f"SM clock {card['clocks.sm']} of {card['clocks.max.sm']}, memory clock {card['clocks.mem']} of {card['clocks.max.mem']}"
    return f"{card['name']}, driver {card['driver_version']}, {clocks}"


def _cells(row: dict[str, Any]) -> Iterator[str]:
    """The cells of one line."""
    found = {baseline["name"]: baseline for baseline in row.get("baselines", ())}
    spread = row.get("spread_pct", 0)
    yield row["model"]
    yield str(row["position"])
    yield f"{row['latency_us']:.1f}" + (f" (spread {spread:.1f} %)" if spread else "")
    yield f"{row['pct_of_roofline']:.1f} %"
    for name in BASELINES:
        yield _baseline(found.get(name))


def _baseline(baseline: dict[str, Any] | None) -> str:
    if baseline is None:
        return "not measured"
    if baseline["latency_us"] is None or baseline["ratio"] is None:
        return str(baseline["status"])
    return f"{baseline['latency_us']:.1f} ({baseline['ratio']:.2f}x)"
