"""What compute-sanitizer printed, as data: its summary, and every report with the lines of source that it names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MARK = "========="
SUMMARY = re.compile(r"(ERROR SUMMARY|RACECHECK SUMMARY): (\d+ .*)")
PLACE = re.compile(r"\bin (?:\S*/)?(\S+\.cu):(\d+)")
VARYING = re.compile(r"0x[0-9a-f]+|\(\d+,\d+,\d+\)|\d+ hazards?")  # of one report from thread to thread
# The tool's own lines, which report nothing.
CHATTER = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target application")
FUNCTION = re.compile(r"^__device__ .*?\b(\w+)\(")
# Words in shared memory that are themselves the synchronisation: accessed by release and acquire alone, in the PTX memory model no race.
SYNC_WORDS = ("load_shared_acquire", "store_shared_release", "add_shared_release")
Report = dict[str, Any]


def summary(text: str) -> tuple[str, int] | None:
    """The tool's summary line and how many reports it counts; None if it printed none: then it did not come to its end."""
    found = [line for line in SUMMARY.findall(text) if "not printed" not in line[1]]
    return (f"{found[-1][0]}: {found[-1][1].strip()}", int(found[-1][1].split()[0])) if found else None


def reports(text: str, sources: Mapping[str, str]) -> list[Report]:
    """Every report of the tool with its text and the lines of `sources` (by file name) that it names; equal ones once, with how many there
    were. `expected` is a race with nothing but accesses in the functions SYNC_WORDS, and a CUDA call of the host that failed: a library
    asked what the driver can do, for whatever our own calls fail at ends the program.
    """
    files = {name: source.splitlines() for name, source in sources.items()}
    sync = {name: [range(*span) for word in SYNC_WORDS for span in function_lines(lines, word)] for name, lines in files.items()}
    found: dict[str, Report] = {}
    for block in _blocks(text):
        where = [(name, int(number)) for name, number in PLACE.findall(" ".join(block))]
        key = "\n".join([VARYING.sub("*", block[0]), *map(str, where)])
        if key in found:
            found[key]["times"] += 1
            continue
        race = "Race reported" in block[0] or "hazard" in block[0]
        words = race and bool(where) and all(any(number in span for span in sync.get(name, ())) for name, number in where)
        found[key] = {
            "text": block, "times": 1, "expected": words or block[0].startswith("Program hit"),
            "source": [f"{name}:{number}: {_line(files, name, number)}" for name, number in dict.fromkeys(where)],
        }  # fmt: skip
    return list(found.values())


def _line(files: Mapping[str, Sequence[str]], name: str, number: int) -> str:
    lines = files.get(name, ())
    return lines[number - 1].strip() if number <= len(lines) else ""


def _blocks(text: str) -> Iterator[list[str]]:
    """The tool's reports: runs of marked lines that begin with a sentence and end with an empty one."""
    block: list[str] = []
    for line in text.splitlines():
        marked, _, rest = line.partition(MARK)
        said = rest.strip()
        if marked.strip() or MARK not in line:
            continue  # the program's own output
        starts = rest.startswith(" ") and not rest.startswith("  ") and not said.startswith(("and ", "at ", "by "))
        if (starts or not said) and block:
            yield block
            block = []
        if said and not said.startswith(CHATTER):
            block.append(said)
    if block:
        yield block


def function_lines(lines: Sequence[str], name: str) -> Iterator[tuple[int, int]]:
    """First line and the line after the last, from 1, of each definition of a device function at the left margin."""
    for at, line in enumerate(lines):
        match = FUNCTION.match(line)
        if match and match[1] == name:
            end = next((i for i in range(at, len(lines)) if lines[i].startswith("}") or (i == at and line.endswith("}"))), at)
            yield at + 1, end + 2
