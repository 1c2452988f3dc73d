"""What must hold of a results file before a figure of it is shown: the rules of honesty, checked on the file itself."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from amk.dev.noise import noise_us, usual_us
from amk.eval.bench import LEAST_READ_GBS
from amk.schedule.targets import card_of

Row = dict[str, Any]
NEEDED = ("model", "position", "correct", "tolerance_used", "floor_us", "streamed_bytes", "samples_us", "program_digest", "binary_digest")
LEAST_SAMPLES = 5
CLOSE = 1e-6  # relative: a figure that is computed from others in the file


def honest_rows(name: str, data: Mapping[str, Any], key: str) -> list[Row]:
    """The lines of `data[key]`, those without a latency too; ValueError with every broken rule of the file `name`."""
    problems = [*_origin_problems(name, data), *(p for i, row in enumerate(data[key]) for p in row_problems(f"{key} {i}", row, data))]
    _refuse(name, problems)
    return list(data[key])


def honest_chains(name: str, data: Mapping[str, Any]) -> list[Row]:
    """The lines of `data["chain"]`: times of builds that compute nothing; ValueError where one could be taken for a latency."""
    rows = list(data.get("chain", ()))
    for row in rows:
        if "latency_us" in row or "pct_of_roofline" in row or not row.get("is") or not row.get("macros"):
            raise ValueError(f"results/{name}: the chain alone must say what it is and have no latency, but {row['model']} does not")
        if not _same(row["chain_us"], float(np.median(row["samples_us"]))):
            raise ValueError(f"results/{name}: the chain's time must be the median of its samples, but is {row['chain_us']}")
    return rows


def honest_batches(name: str, data: Mapping[str, Any]) -> list[Row]:
    """The lines of a file of batches, one sequence first; ValueError with every broken rule of the file `name`."""
    rows = list(data["rows"])
    first = rows[0]
    problems = list(_origin_problems(name, data))
    if first["batch"] != 1:
        problems.append(f"the first line must be one sequence, but has {first['batch']}")
    for row in rows:
        problems += _timed_problems(f"batch {row['batch']}", row, "step_us")
        if not _same(row["over_first"], row["step_us"] / first["step_us"]):
            problems.append(f"batch {row['batch']}: over_first must be over the first line, but is {row['over_first']}")
        if not _same(row["tokens_per_second"], 1e6 * row["batch"] / row["step_us"]):
            problems.append(f"batch {row['batch']}: tokens_per_second must follow from the step, but is {row['tokens_per_second']}")
    _refuse(name, problems)
    return rows


def honest_prompts(name: str, data: Mapping[str, Any]) -> list[Row]:
    """The lines of a file of prompts, transformers' among them; ValueError with every broken rule of the file `name`."""
    rows = list(data["rows"])
    problems = list(_origin_problems(name, data))
    for row in rows:
        problems += _timed_problems(row["entrant"], row, "prompt_us", judged="stretch" in row)
        if "stretch" in row and not _same(row["us_a_launch"], row["prompt_us"] / row["launches"]):
            problems.append(f"{row['entrant']}: us_a_launch must be the prompt's time over its launches, but is {row['us_a_launch']}")
    if not any("stretch" in row for row in rows) or all("stretch" in row for row in rows):
        problems.append("there must be a prompt by AMK and one by transformers")
    _refuse(name, problems)
    return rows


def _refuse(name: str, problems: Sequence[str]) -> None:
    """ValueError with every broken rule of the file `name`, if there is one."""
    if problems:
        raise ValueError(f"results/{name}: " + "; ".join(problems))


def _timed_problems(where: str, row: Mapping[str, Any], key: str, judged: bool = True) -> Iterator[str]:
    """A time is the median of enough samples, of a program that was found correct where it is ours."""
    if len(row["samples_us"]) < LEAST_SAMPLES:
        yield f"{where}: a time needs at least {LEAST_SAMPLES} samples, but has {len(row['samples_us'])}"
    elif not _same(row[key], float(np.median(row["samples_us"]))):
        yield f"{where}: {key} must be the median of its samples ({float(np.median(row['samples_us']))}), but is {row[key]}"
    if judged and not (row["tolerance_used"] is not None and row["tolerance_used"] < 1):
        yield f"{where}: a time needs a correctness pass, but {row['tolerance_used']} of the tolerance was used"


def card_name(device_name: str) -> str:
    """What a results file of the card is named after: its target, or "auto" where it is none of the table."""
    return card_of(device_name) or "auto"


def _origin_problems(name: str, data: Mapping[str, Any]) -> Iterator[str]:
    """A figure says which commit, which card and which plain read it came from, and the file is named after that card."""
    came = data["provenance"]
    if came["commit"].partition("+")[0] in ("", "unknown"):
        yield "provenance must name the commit, but it is unknown"
    if not came["cards"]:
        yield "provenance must name the card, but no card was seen"
    if not data["plain_read_gbs"]:
        yield "plain_read_gbs must hold the plain reads of the run, but is empty"
    wanted = {card_name(card["name"]) for card in came["cards"]}
    if came["cards"] and not wanted & set(re.split("[-.]", name)):
        yield f"a file of {came['cards'][0]['name']} must be named after it"
    if came["cards"] and data.get("device_name", came["cards"][0]["name"]) not in [card["name"] for card in came["cards"]]:
        yield f"it must be measured on the card of its provenance, but was measured on {data['device_name']}"
    least = min((LEAST_READ_GBS.get(card, 0.0) for card in wanted), default=0.0)
    if data["plain_read_gbs"] and min(data["plain_read_gbs"]) < least:
        yield f"every plain read must reach {least:.0f} GB/s, but one is {min(data['plain_read_gbs']):.0f}"
    if len(wanted) > 1:
        yield f"one kind of card must be in the machine for the file to say which was measured, but there are {len(wanted)}"


def row_problems(where: str, row: Mapping[str, Any], data: Mapping[str, Any]) -> Iterator[str]:
    """One sentence for each rule that a line breaks. A line without a latency claims nothing."""
    latency = row.get("latency_us")
    if latency is None:
        return
    missing = [field for field in NEEDED if row.get(field) in (None, "", [])]
    if missing:
        yield f"{where}: a latency needs {', '.join(missing)}"
        return
    if row["correct"] is not True or not row["tolerance_used"] < 1:
        yield f"{where}: a latency needs a correctness pass, but correct is {row['correct']} with {row['tolerance_used']} of the tolerance"
    if not latency >= row["floor_us"]:
        yield f"{where}: {latency} us are under the floor of {row['floor_us']} us"
    yield from _floor_problems(where, row, data["plain_read_gbs"]) if data["plain_read_gbs"] else ()
    yield from _sample_problems(where, row)
    yield from _effect_problems(where, row) if "default_us" in row else ()
    if len(row.get("process_medians_us", ())) not in (0, data.get("processes", 1)):
        yield f"{where}: there must be a median of each of {data['processes']} processes, but there are {len(row['process_medians_us'])}"
    if "pct_of_roofline" in row and not _same(row["pct_of_roofline"], 100 * row["floor_us"] / latency):
        yield f"{where}: pct_of_roofline must be floor over latency, but is {row['pct_of_roofline']}"
    if row.get("baselines") and "@" in row["model"]:
        yield f"{where}: quantised weights must have no baselines, which would run in 16 bits"
    for baseline in row.get("baselines", ()):
        yield from _baseline_problems(f"{where}, {baseline['name']}", baseline, row)


def _floor_problems(where: str, row: Mapping[str, Any], reads: Sequence[float]) -> Iterator[str]:
    """The floor is a plain read of the bytes at a bandwidth that this run measured."""
    low, high = (row["streamed_bytes"] / read * 1e-3 for read in (max(reads), min(reads)))
    if not low * (1 - CLOSE) <= row["floor_us"] <= high * (1 + CLOSE):
        yield f"{where}: the floor must be the bytes over a plain read of the run ({low} to {high} us), but is {row['floor_us']}"


def _sample_problems(where: str, row: Mapping[str, Any]) -> Iterator[str]:
    """The latency is the median of what was measured."""
    medians = row.get("process_medians_us") or [float(np.median(row["samples_us"]))]
    if not _same(row["latency_us"], float(np.median(medians))):
        yield f"{where}: the latency must be the median of its samples ({float(np.median(medians))} us), but is {row['latency_us']}"
    if len(row["samples_us"]) < LEAST_SAMPLES:
        yield f"{where}: a latency needs at least {LEAST_SAMPLES} samples, but has {len(row['samples_us'])}"
    if not min(row["samples_us"]) <= row["latency_us"] <= max(row["samples_us"]):
        yield f"{where}: the latency must lie among its samples, but is {row['latency_us']}"


def _effect_problems(where: str, row: Mapping[str, Any]) -> Iterator[str]:
    """An effect is what the medians differ by, and is called one only beyond the noise of its own samples."""
    samples, copies = row["samples_us"], row["copies_samples_us"]
    if not _same(row["default_us"], usual_us(copies)):
        yield f"{where}: the default's time must be the median of its copies' medians, but is {row['default_us']}"
    if not math.isclose(row["effect_pct"], 100 * (row["latency_us"] / row["default_us"] - 1), abs_tol=CLOSE):
        yield f"{where}: the effect must be what the medians differ by, but is {row['effect_pct']} %"
    if row["beyond_noise"] != (abs(row["latency_us"] - row["default_us"]) > noise_us(copies, samples)):
        yield f"{where}: an effect must be beyond the noise of its samples to be one, but beyond_noise is {row['beyond_noise']}"


def _baseline_problems(where: str, baseline: Mapping[str, Any], row: Mapping[str, Any]) -> Iterator[str]:
    """A baseline has a time only if it was measured, above the floor, and then its ratio is over the latency beside it."""
    if baseline["status"] != "measured":
        if baseline["latency_us"] is not None or baseline["ratio"] is not None:
            yield f"{where}: what is {baseline['status']} has no time, but has {baseline['latency_us']} us"
    elif not baseline["latency_us"] >= row["floor_us"]:
        yield f"{where}: {baseline['latency_us']} us are under the floor of {row['floor_us']} us"
    elif not _same(baseline["ratio"], baseline["latency_us"] / row["latency_us"]):
        yield f"{where}: the ratio must be its time over ours, but is {baseline['ratio']}"


def _same(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=CLOSE)
