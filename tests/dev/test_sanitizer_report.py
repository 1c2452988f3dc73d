"""What compute-sanitizer prints is read whole: no report is lost, and only accesses to the synchronisation itself are expected."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from amk.dev.sanitize import CASES, OPTIONS, STRETCH, TOOLS, beside, examined, file_name, model, plan, program, programs, run_tool, small
from amk.dev.sanitize import proven as validated
from amk.dev.sanitizer_report import SYNC_WORDS, function_lines, reports, summary
from amk.eval.batch_oracle import judge_any
from amk.eval.oracle import make_reference, rounding_points
from amk.eval.prefill_oracle import judge_prefill
from amk.schedule.targets import TARGETS
from amk.vm.reference import ReferenceVM
from amk.vm.source import kernel_source

SOURCE = """\
__device__ __forceinline__ uint32_t load_shared_acquire(const uint32_t* p) {
  uint32_t v;
  return v;
}
__device__ __forceinline__ void store_shared_release(uint32_t* p, uint32_t v) { asm(""); }
__device__ void other() {
  shared[0] = 1;
}
"""
FILE = file_name("bf16")
HEAD = "========= COMPUTE-SANITIZER\nbf16: correct is True after 1.0 s\n"
CLEAN = HEAD + "========= ERROR SUMMARY: 0 errors\n"


def race(one: int, two: int, hazards: int = 4) -> str:
    return (
        f"========= Error: Race reported between Write access at megakernel+0x{one:x}0 in {FILE}:{one}\n"
        f"=========     and Read access at megakernel+0x{two:x}0 in {FILE}:{two} [{hazards} hazards]\n=========\n"
    )


def racecheck(*races: str) -> str:
    return f"{HEAD}{''.join(races)}========= RACECHECK SUMMARY: {len(races)} hazards displayed ({len(races)} errors, 0 warnings)\n"


def out_of_bounds(thread: int, line: int = 7) -> str:
    return (
        "========= Invalid __global__ write of size 4 bytes\n"
        f"=========     at megakernel+0x150 in /tmp/x/{FILE}:{line}\n=========     by thread ({thread},0,0) in block (0,0,0)\n"
        "=========     Access to 0x7f00 is out of bounds\n=========     Saved host backtrace up to driver entry point at kernel launch\n"
        "=========         Host Frame: cuLaunchKernel [0x1234] in libcuda.so\n=========\n"
    )


def outcome(text: str, found: dict[str, Any] | None = None, code: int = 0) -> dict[str, Any]:
    cases = {"bf16": {"correct": True, "failures": [], "launches": 3}} if found is None else found
    return examined("a tool", "bf16", code, cases, text, {FILE: SOURCE})


def test_a_run_without_reports_is_clean() -> None:
    assert outcome(CLEAN)["clean"] and outcome(racecheck())["clean"]
    assert outcome(CLEAN)["summary"] == "ERROR SUMMARY: 0 errors"


@pytest.mark.parametrize(
    ("text", "found", "code"),
    [
        (HEAD, None, 0),
        (CLEAN, {}, 0),
        (CLEAN, {"bf16": {"correct": False, "failures": ["wrong"], "launches": 3}}, 0),
        (CLEAN, None, 124),
        (HEAD + "========= ERROR SUMMARY: 1 error\n", None, 0),
        (HEAD + out_of_bounds(0) + "========= ERROR SUMMARY: 769 errors\n========= ERROR SUMMARY: 768 errors were not printed.\n", None, 0),
        (HEAD + out_of_bounds(0) + "========= ERROR SUMMARY: 1 error\n", None, 0),
        (racecheck(race(7, 2)), None, 0),
        (racecheck(race(7, 7)), None, 0),
        (racecheck(race(99, 2)), None, 0),
        (racecheck("========= Error: Race reported between Write access at megakernel+0x10\n=========\n"), None, 0),
        (racecheck(race(5, 2).replace(FILE, "another.cu")), None, 0),
    ],
    ids=[
        "no end", "no cases", "a wrong case", "too long", "a report not read", "reports not printed", "out of bounds", "half a word",
        "a race", "a line that is not there", "no line", "another file",
    ],
)  # fmt: skip
def test_what_is_not_clean_is_never_called_so(text: str, found: dict[str, Any] | None, code: int) -> None:
    assert not outcome(text, found, code)["clean"]


def test_words_that_are_the_synchronisation_are_expected_but_reported() -> None:
    part = outcome(racecheck(race(5, 2), race(5, 3)))
    assert part["clean"] and len(part["reports"]) == 2
    assert part["reports"][0]["source"][0] == f"{FILE}:5: {SOURCE.splitlines()[4]}"


def test_one_fault_of_many_threads_is_one_report_with_their_number() -> None:
    text = HEAD + "".join(map(out_of_bounds, range(5))) + out_of_bounds(0, line=2) + "========= ERROR SUMMARY: 6 errors\n"
    assert [report["times"] for report in reports(text, {FILE: SOURCE})] == [5, 1]
    assert summary(text) == ("ERROR SUMMARY: 6 errors", 6)


def test_the_words_are_functions_of_the_kernel() -> None:
    lines = kernel_source(program("bf16", small(TARGETS["h200"], 4))).splitlines()
    for word in SYNC_WORDS:
        ((start, stop),) = function_lines(lines, word)
        assert f" {word}(" in lines[start - 1] and lines[stop - 2].endswith("}")
        assert any("asm volatile" in line for line in lines[start - 1 : stop - 1])


def test_a_report_has_the_lines_of_the_kernel_that_it_is_of() -> None:
    """Beside the program for prefill runs the one that decodes: the same functions are at other lines of it."""
    sources = {file: kernel_source(entry) for file, entry in programs("prefill", small(TARGETS["h200"], 4)).items()}
    assert len(sources) == 2
    spots = {file: [next(function_lines(text.splitlines(), word))[0] for word in SYNC_WORDS[:2]] for file, text in sources.items()}
    own, decoder = spots
    assert spots[own] != spots[decoder]
    for file, at in ((own, own), (decoder, decoder), (decoder, own), (own, decoder)):
        (report,) = reports(racecheck(race(*spots[at]).replace(FILE, file)), sources)
        assert report["expected"] == (file == at)
        assert all((f" {word}(" in line) == (file == at) for word, line in zip(SYNC_WORDS, report["source"], strict=False))


FAKE = """\
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.write_text(json.dumps({"bf16": {"correct": True}}))
print("bf16: correct is True", flush=True)
time.sleep(float(sys.argv[1]))
print("========= ERROR SUMMARY: 0 errors")
"""


@pytest.mark.parametrize(("seconds", "code"), [("0", 0), ("60", 124)])
def test_a_tool_that_is_cut_keeps_the_cases_that_ended(seconds: str, code: int, tmp_path: Path) -> None:
    """The tool is played by a process that finds a case right, and then ends or hangs."""
    log = tmp_path / "x.log"
    found = run_tool([sys.executable, "-c", FAKE, seconds], "memcheck", ["bf16"], 4, log, 5.0)
    assert found == (code, {"bf16": {"correct": True}})
    part = examined("memcheck", "bf16", *found, log.read_text(), {FILE: SOURCE})
    assert part["clean"] == (code == 0) and "bf16: correct" in log.read_text()
    assert list(tmp_path.iterdir()) == [log]


def test_every_tool_is_asked_for_by_its_name_and_looks_at_the_megakernel_alone() -> None:
    for name, options in TOOLS.items():
        assert options[:2] == ("--tool", name.partition("-")[0])
    assert OPTIONS[:2] == ("--kernel-name", "kernel_substring=megakernel")


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_a_correct_program_of_few_sms(case: str) -> None:
    lowered, made = program(case, small(TARGETS["h200"], 4)), model(case)
    proven = validated(lowered)
    assert len(lowered.queues) == 4
    reference = make_reference(made.spec, made.eager("fp32", "cpu"), plan(case), rounding_points(lowered))
    if case in STRETCH:
        decoder = ReferenceVM(validated(beside(case, small(TARGETS["h200"], 4))), made.weights)
        assert judge_prefill(ReferenceVM(proven, made.weights, beside=decoder), decoder, reference).correct
    else:
        assert judge_any(ReferenceVM(proven, made.weights), reference).correct
