"""Runs small programs on the card under compute-sanitizer. Writes results/sanitizer-CARD.json and a log a case beside it.

    python amk_bootstrap.py amk.dev.sanitize [--tools memcheck,racecheck] [--cases bf16,unfused,cp_async,int8,int4,fp8,fp32,batch,prefill]
                                             [--sms 4] [--limit SECONDS] [--sanitizer FILE] [--out FILE]

Exit code 1 if a program was wrong, a tool did not come to its end, or a tool reported anything that is not expected. Expected are a race
between accesses of load_shared_acquire, store_shared_release and add_shared_release only, and driver calls by which a library asks what
there is. Racecheck follows __syncthreads, __syncwarp and mbarriers, but not release and acquire on words in shared memory, which is what
these three are; it does not look at global memory. Every report is in the results with its lines of source, the expected ones too.

What racecheck is known to report of code that is right, and is not taken for expected here: bulk copies that an mbarrier orders against
another warp's reads (the case cp_async has the same ring with copies that it does follow; racecheck-no-bulk leaves bulk copies out and
checks all else), and reads that a vote or shuffle of their values orders before one lane's arrival (Consumer.release_chunk, Storer.reduce).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from amk.dev.asked import at_least, chosen, writable
from amk.dev.on_card import on_card, require_card
from amk.dev.provenance import write_json, write_results
from amk.dev.sanitizer_report import reports, summary
from amk.dev.version import code_digest
from amk.eval.batch_oracle import judge_any
from amk.eval.card import choose
from amk.eval.errors import EnvironmentProblem
from amk.eval.oracle import Finding, Plan, make_reference, rounding_points
from amk.eval.prefill_oracle import judge_prefill
from amk.isa.weight_format import FORMATS
from amk.models.model import Model, quantised_model, random_model
from amk.schedule.compile import lower
from amk.schedule.config import parse_config
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.targets import Target
from amk.schedule.validate import ValidProgram, validate
from amk.vm.build import Binary, compile_kernel
from amk.vm.cuda import CudaVM
from amk.vm.source import kernel_source

ROOT = Path(__file__).resolve().parents[1]
BARRIERS = 256  # mbarriers of a block that the tools make room for; they count too few of a ring by themselves
ON_BARRIERS = ("--num-cuda-barriers", str(BARRIERS))
RACECHECK = ("--tool", "racecheck", "--show-backtrace", "no", *ON_BARRIERS)  # a report has the places of the accesses alone then
TOOLS: dict[str, tuple[str, ...]] = {  # and how each is asked for
    "memcheck": ("--tool", "memcheck"),
    "racecheck": RACECHECK,
    "racecheck-no-bulk": (*RACECHECK, "--check-bulk-copy", "no"),
    "synccheck": ("--tool", "synccheck", *ON_BARRIERS),
}
EVERY_LANE = {"EVERY_LANE_ARRIVES": 1}  # the build for racecheck, which does not follow that a warp's lanes are together when one arrives
OPTIONS = ("--kernel-name", "kernel_substring=megakernel", "--print-limit", "1000")
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 160, "vocab_size": 131, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
# dtype, weight format, config
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "bf16": ("bfloat16", None, {}),
    "unfused": ("bfloat16", None, {"fusion_grouping": [], "threads_per_block": 128, "kernel_knobs": {"sync": "tags"}}),
    "cp_async": ("bfloat16", None, {"kernel_knobs": {"weight_feed": "cp_async"}}),
    "int8": ("bfloat16", "int8-g32-asym", {}),
    "int4": ("bfloat16", "int4-g32-asym", {"threads_per_block": 128}),
    "fp8": ("bfloat16", "fp8", {}),
    "fp32": ("float32", None, {}),
    "batch": ("bfloat16", None, {}),
    "prefill": ("bfloat16", None, {}),
}
SHAPES = {"int4": {"hidden_size": 256}}  # where it is not TINY's: here warps share out the tiles of gate and up whole
BATCH = {"batch": 8}  # sequences side by side
STRETCH = {"prefill": 32}  # positions a launch, of the cases whose program makes KV rows for another that decodes
CONTEXT = 64
PLAN = Plan(prompt=4, steps=6, late=(40,), late_steps=2)
STRETCH_PLAN = Plan(prompt=40, steps=42, late=(45,), late_steps=8)  # a whole stretch and parts of two
SPIN_LIMIT = 1 << 24  # polls: instrumented ones take 0.1 to 10 us, and a hang must end before the tool is ended
LIMIT_S = 240.0  # of a tool, all cases together
LAST_LINES = 12  # of the log of a tool that did not come to its end


def model(case: str) -> Model:
    dtype, form, _ = CASES[case]
    made = random_model("tiny", TINY | SHAPES.get(case, {}) | {"dtype": dtype})
    return quantised_model(made, FORMATS[form]) if form else made


def program(case: str, target: Target) -> Program:
    """The case's program for `target`."""
    config = parse_config(CASES[case][2])
    assert isinstance(config, Config), config
    batch = STRETCH.get(case) or BATCH.get(case, 1)
    return lower(model(case).spec, config, target, context=CONTEXT, batch=batch, prefill=case in STRETCH)


def beside(case: str, target: Target) -> Program:
    """The program that decodes beside a case's program for prefill."""
    return lower(model(case).spec, Config(), target, context=CONTEXT)


def programs(case: str, target: Target) -> dict[str, Program]:
    """Every program that a case runs, by what the tool calls its source in its reports."""
    decoder = {file_name(f"{case}-decoder"): beside(case, target)} if case in STRETCH else {}
    return {file_name(case): program(case, target)} | decoder


def plan(case: str) -> Plan:
    return STRETCH_PLAN if case in STRETCH else PLAN


def file_name(kernel: str) -> str:
    """What the tool calls a kernel's source in its reports: each has its own, for a line says nothing without it."""
    return f"megakernel-{kernel}.cu"


def macros(tool: str) -> dict[str, int]:
    """Those of the build that a tool looks at."""
    return EVERY_LANE if tool.startswith("racecheck") else {}


def build(case: str, tool: str, target: Target) -> None:
    """The case's kernels are in the cache of cubins then. BuildFailed if one does not compile."""
    for file, lowered in programs(case, target).items():
        binary(file, tool, lowered, target)


def binary(file: str, tool: str, lowered: Program, target: Target) -> Binary:
    """The kernel as it is measured, but for line numbers and what the tool needs to follow it."""
    return compile_kernel(kernel_source(lowered, **macros(tool)), target.arch, file, lines=True)


def find_sanitizer() -> Path:
    """The newest compute-sanitizer of this machine. EnvironmentProblem if there is none."""
    on_path = shutil.which("compute-sanitizer")
    folders = [
        path for pattern in ("cuda*/bin", "cuda*/compute-sanitizer") for path in sorted(Path("/usr/local").glob(pattern), reverse=True)
    ]
    places = [*([Path(on_path)] if on_path else []), *(folder / "compute-sanitizer" for folder in folders)]
    found = next((place for place in places if place.is_file() and os.access(place, os.X_OK)), None)
    if found is None:
        raise EnvironmentProblem("sanitize: compute-sanitizer must be on PATH or under /usr/local/cuda*, but was not found")
    return found


def judged(case: str, tool: str, target: Target) -> tuple[Finding, int]:
    """What the oracle finds of the case's program, and how often it was launched."""
    made, kernels = model(case), programs(case, target)
    (lowered, built), *decoders = [(entry, binary(file, tool, entry, target)) for file, entry in kernels.items()]
    options: dict[str, Any] = {"arch": target.arch, "spin_limit": SPIN_LIMIT, "max_steps": 8}
    reference = make_reference(made.spec, made.eager("fp32", "cpu"), plan(case), rounding_points(lowered))
    if not decoders:
        machine = CudaVM(proven(lowered), made.weights, binary=built, **options)
        finding = judge_any(machine, reference)
    else:
        decoder = CudaVM(proven(decoders[0][0]), made.weights, binary=decoders[0][1], **options)
        machine = CudaVM(proven(lowered), made.weights, binary=built, beside=decoder, **options)
        finding = judge_prefill(machine, decoder, reference)
        decoder.close()
    machine.close()
    return finding, machine.launches


def proven(lowered: Program) -> ValidProgram:
    proof = validate(lowered)
    assert isinstance(proof, ValidProgram), proof
    return proof


def run_cases(cases: Sequence[str], tool: str, target: Target, out: Path) -> None:
    """What happens under the tool: each case decodes a few tokens at early and late positions, judged by the source model.

    What is found goes to `out`, written anew after each case: a run that is cut keeps it.
    """
    found: dict[str, object] = {}
    for case in cases:
        began = time.monotonic()
        finding, launches = judged(case, tool, target)
        seconds = round(time.monotonic() - began, 1)
        found[case] = {"correct": finding.correct, "failures": finding.failures, "launches": launches, "seconds": seconds}
        write_json(out, found)
        print(f"{case}: correct is {finding.correct} after {seconds} s", flush=True)


def run_tool(command: Sequence[str], tool: str, cases: Sequence[str], sms: int, log: Path, limit_s: float) -> tuple[int, dict[str, Any]]:
    """The exit code of the tool (124: it took too long and was ended) and what the cases found; all that was printed goes to `log`."""
    found = log.with_suffix(".found")
    found.unlink(missing_ok=True)
    child = [sys.executable, str(ROOT / "amk_bootstrap.py"), "amk.dev.sanitize", "--child", "--tools", tool]
    child += ["--cases", ",".join(cases), "--sms", str(sms)]
    # Each tensor is an allocation of its own, and its end is one. What a case says is in the log before a later one hangs.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [*command, *child, "--out", str(found)], stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = 124
    cases_found = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}
    found.unlink(missing_ok=True)
    return code, cases_found


def examined(tool: str, case: str, code: int, found: dict[str, Any], text: str, sources: Mapping[str, str]) -> dict[str, Any]:
    """A case's part of the tool's results. Clean: the tool came to its end, the case is correct, and every report is expected.

    `sources` are those of the case's kernels by file name.
    """
    said, count = summary(text) or (None, 0)
    listed = reports(text, sources)
    unexpected = [report for report in listed if not report["expected"]]
    unread = max(0, count - sum(report["times"] for report in listed))  # counted by the tool, but not printed or not understood
    correct = set(found) == {case} and found[case]["correct"]
    return {
        "tool": tool, "case": case, "exit_code": code, "summary": said, "cases": found, "reports": listed, "unexpected": len(unexpected),
        "unread": unread, "clean": said is not None and code == 0 and correct and not unexpected and not unread,
    }  # fmt: skip


def tell(part: dict[str, Any], log: str) -> None:
    """The tool's part, printed: every report, expected or not, with its lines; of a tool that did not come to its end, how its log ends."""
    for report in part["reports"]:
        print(f"  {'expected' if report['expected'] else 'REPORT'} ({report['times']} times): {report['text'][0]}")
        for line in [*report["text"][1:6], *report["source"]]:
            print(f"      {line}")
    if part["summary"] is None or part["exit_code"]:
        print(*log.splitlines()[-LAST_LINES:], sep="\n")
    state, end = "clean" if part["clean"] else "NOT CLEAN", part["summary"] or "no summary: it did not come to its end"
    print(f"{part['tool']} of {part['case']}: {state}; {end}; exit code {part['exit_code']}", flush=True)


def small(target: Target, sms: int) -> Target:
    """The live card cut down to a few SMs: blocks take their queues by index then."""
    return replace(target, sms=min(sms, target.sms))


def sanitize(asked: argparse.Namespace) -> bool:
    """Runs every tool; True if all are clean."""
    sanitizer, target = asked.sanitizer or find_sanitizer(), choose(None, "cuda").target
    version = subprocess.run([str(sanitizer), "--version"], capture_output=True, text=True).stdout.split("\n")
    cut = small(target, asked.sms)
    lowered = {case: programs(case, cut) for case in asked.cases}
    sources = {case: {file: kernel_source(entry) for file, entry in kernels.items()} for case, kernels in lowered.items()}
    print(f"building {', '.join(asked.cases)}", flush=True)
    builds = [(case, tool) for case in asked.cases for tool in asked.tools]
    with ProcessPoolExecutor(min(len(builds), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        list(pool.map(build, *zip(*builds, strict=True), [cut] * len(builds)))
    out = asked.out or Path("results") / f"sanitizer-{target.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    head = {
        "sanitizer": [line for line in version if re.search(r"\d", line)], "sms": cut.sms, "context": CONTEXT,
        "code_sha256": {case: code_digest(kernels[file_name(case)]) for case, kernels in lowered.items()},
    }  # fmt: skip
    parts: list[dict[str, Any]] = []
    for tool in asked.tools:
        print(f"{tool}: running {', '.join(asked.cases)} on {cut.sms} SMs, each in a process of its own", flush=True)
        began = time.monotonic()

        def run(case: str, tool: str = tool) -> tuple[int, dict[str, Any], str]:
            log = out.with_name(f"{out.stem}-{tool}-{case}.log")
            code, found = run_tool([str(sanitizer), *TOOLS[tool], *OPTIONS], tool, [case], asked.sms, log, asked.limit)
            return code, found, log.read_text(encoding="utf-8", errors="replace")

        with ThreadPoolExecutor(len(asked.cases)) as threads:
            ended = list(threads.map(run, asked.cases))
        took = {"seconds": round(time.monotonic() - began, 1), "options": [*TOOLS[tool], *OPTIONS], "macros": macros(tool)}
        for case, (code, found, text) in zip(asked.cases, ended, strict=True):
            parts.append(examined(tool, case, code, found, text, sources[case]) | took)
            tell(parts[-1], text)
        write_results(out, {**head, "tools": parts})
    return all(part["clean"] for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="memcheck,racecheck", help=f"some of {', '.join(TOOLS)}, with commas between them")
    parser.add_argument("--cases", default=",".join(CASES), help="some of the cases, with commas between them")
    parser.add_argument("--sms", type=int, default=4, help="SMs of the programs")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds after which a tool is ended")
    parser.add_argument("--sanitizer", type=Path, help="the compute-sanitizer to run; else that on PATH or under /usr/local/cuda*")
    parser.add_argument("--out", type=Path, help="the results file; results/sanitizer-CARD.json where none is named")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # this process runs under the tool
    asked = parser.parse_args()
    asked.tools, asked.cases = chosen(parser, "tools", asked.tools, list(TOOLS)), chosen(parser, "cases", asked.cases, list(CASES))
    at_least(parser, "sms", asked.sms, 1)
    at_least(parser, "limit", asked.limit, 1)
    writable(parser, asked.out)
    require_card("sanitize")
    if asked.child:
        return run_cases(asked.cases, asked.tools[0], small(choose(None, "cuda").target, asked.sms), asked.out)
    with on_card("sanitize", also=(OSError,)):
        clean = sanitize(asked)
    sys.exit(0 if clean else 1)


if __name__ == "__main__":
    main()
