"""Runs small programs on the card under compute-sanitizer. Writes results/sanitizer-CARD.json and a log a tool beside it.

    python amk_bootstrap.py amk.dev.sanitize [--tools memcheck,racecheck] [--cases bf16,unfused,int8,fp32] [--sms 4] [--out FILE]

Exit code 1 if a program was wrong, a tool did not come to its end, or a tool reported anything that is not expected. Expected are a race
between accesses of load_shared_acquire, store_shared_release and add_shared_release only, and driver calls by which a library asks what
there is. Racecheck follows __syncthreads, __syncwarp, mbarriers and (from 2024.4 on) bulk copies into shared memory, but not release and
acquire on words in shared memory, which is what these three are; it does not look at global memory. Every report is in the results with
its lines of source, the expected ones too.
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
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from amk.dev.knob_effects import chosen
from amk.dev.provenance import write_results
from amk.dev.sanitizer_report import reports, summary
from amk.eval.card import choose, live_card
from amk.eval.card_lock import live_card_lock
from amk.eval.errors import EnvironmentProblem, EvalError
from amk.eval.oracle import Plan, judge, make_reference, rounding_points
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
TOOLS = ("memcheck", "racecheck", "synccheck")
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 160, "vocab_size": 131, "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
# dtype, weight format, config
CASES: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    "bf16": ("bfloat16", None, {}),
    "unfused": ("bfloat16", None, {"fusion_grouping": [], "threads_per_block": 128, "kernel_knobs": {"sync": "tags"}}),
    "int8": ("bfloat16", "int8-g32-asym", {}),
    "fp32": ("float32", None, {}),
}
CONTEXT = 64
PLAN = Plan(prompt=4, steps=6, late=(40,), late_steps=2)
SPIN_LIMIT = 1 << 26  # polls: instrumented code is a hundred times slower, and a hang must still end
LIMIT_S = 240.0
BARRIERS = 256  # mbarriers of a block that the tools make room for; they count too few of a ring by themselves


def model(case: str) -> Model:
    dtype, form, _ = CASES[case]
    made = random_model("tiny", TINY | {"dtype": dtype})
    return quantised_model(made, FORMATS[form]) if form else made


def program(case: str, target: Target) -> Program:
    """The case's program for `target`."""
    config = parse_config(CASES[case][2])
    assert isinstance(config, Config), config
    return lower(model(case).spec, config, target, context=CONTEXT)


def file_name(case: str) -> str:
    """What the tool calls the case's source in its reports."""
    return f"megakernel-{case}.cu"


def binary(case: str, lowered: Program, target: Target) -> Binary:
    """The kernel as it is measured, but for line numbers."""
    return compile_kernel(kernel_source(lowered), target.arch, file_name(case), lines=True)


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


def run_cases(cases: Sequence[str], target: Target) -> dict[str, dict[str, Any]]:
    """What happens under the tool: each case decodes a few tokens at early and late positions, judged by the source model."""
    found = {}
    for case in cases:
        lowered, made = program(case, target), model(case)
        proven = validate(lowered)
        assert isinstance(proven, ValidProgram), proven
        built = binary(case, lowered, target)
        machine = CudaVM(proven, made.weights, arch=target.arch, binary=built, spin_limit=SPIN_LIMIT, max_steps=8)
        began = time.monotonic()
        finding = judge(machine, make_reference(made.spec, made.eager("fp32", "cpu"), PLAN, rounding_points(lowered)))
        machine.close()
        found[case] = {"correct": finding.correct, "failures": finding.failures, "launches": machine.launches}
        print(f"{case}: correct is {finding.correct} after {time.monotonic() - began:.1f} s", flush=True)
    return found


def run_tool(sanitizer: Path, tool: str, cases: Sequence[str], sms: int, log: Path) -> tuple[int, dict[str, Any]]:
    """The tool's exit code (124: it took too long and was ended) and what the cases found; all that was printed goes to `log`."""
    found = log.with_suffix(".found")
    found.unlink(missing_ok=True)
    options = ["--tool", tool, "--kernel-name", "kernel_substring=megakernel", "--print-limit", "1000"]
    options += [] if tool == "memcheck" else ["--num-cuda-barriers", str(BARRIERS)]
    child = [sys.executable, str(ROOT / "amk_bootstrap.py"), "amk.dev.sanitize", "--child", "--cases", ",".join(cases), "--sms", str(sms)]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # each tensor is an allocation of its own, and its end is one
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            [str(sanitizer), *options, *child, "--out", str(found)],
            stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = 124
    cases_found = json.loads(found.read_text(encoding="utf-8")) if found.exists() else {}
    found.unlink(missing_ok=True)
    return code, cases_found


def examined(tool: str, code: int, found: dict[str, Any], text: str, sources: dict[str, str]) -> dict[str, Any]:
    """The tool's part of the results. Clean: it came to its end, every case is correct, and it reported nothing that is not expected."""
    said, count = summary(text) or (None, 0)
    listed = reports(text, {file_name(case): source for case, source in sources.items()})
    unexpected = [report for report in listed if not report["expected"]]
    unread = max(0, count - sum(report["times"] for report in listed))  # counted by the tool, but not printed or not understood
    correct = set(found) == set(sources) and all(case["correct"] for case in found.values())
    return {
        "tool": tool, "exit_code": code, "summary": said, "cases": found, "reports": listed, "unexpected": len(unexpected),
        "unread": unread, "clean": said is not None and code == 0 and correct and not unexpected and not unread,
    }  # fmt: skip


def tell(part: dict[str, Any]) -> None:
    """The tool's part, printed: every report, expected or not, with its lines."""
    for report in part["reports"]:
        print(f"  {'expected' if report['expected'] else 'REPORT'} ({report['times']} times): {report['text'][0]}")
        for line in [*report["text"][1:6], *report["source"]]:
            print(f"      {line}")
    state = "clean" if part["clean"] else "NOT CLEAN"
    print(
        f"{part['tool']}: {state}; {part['summary'] or 'no summary: it did not come to its end'}; exit code {part['exit_code']}", flush=True
    )


def small(target: Target, sms: int) -> Target:
    """The live card cut down to a few SMs: blocks take their queues by index then."""
    return replace(target, sms=min(sms, target.sms))


def sanitize(asked: argparse.Namespace) -> bool:
    """Runs every tool; True if all are clean."""
    sanitizer, target = find_sanitizer(), choose(None, "cuda").target
    version = subprocess.run([str(sanitizer), "--version"], capture_output=True, text=True).stdout.split("\n")
    cut = small(target, asked.sms)
    lowered = {case: program(case, cut) for case in asked.cases}
    sources = {case: kernel_source(entry) for case, entry in lowered.items()}
    for case, entry in lowered.items():
        print(f"building {case}", flush=True)
        binary(case, entry, cut)
    out = asked.out or Path("results") / f"sanitizer-{target.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for tool in asked.tools:
        log = out.with_name(f"{out.stem}-{tool}.log")
        print(f"{tool}: running {', '.join(asked.cases)} on {cut.sms} SMs; its output goes to {log}", flush=True)
        began = time.monotonic()
        code, found = run_tool(sanitizer, tool, asked.cases, asked.sms, log)
        parts.append(examined(tool, code, found, log.read_text(encoding="utf-8", errors="replace"), sources))
        parts[-1]["seconds"] = round(time.monotonic() - began, 1)
        tell(parts[-1])
        known = [line for line in version if re.search(r"\d", line)]
        write_results(out, {"sanitizer": known, "sms": cut.sms, "context": CONTEXT, "tools": parts})
    return all(part["clean"] for part in parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default="memcheck,racecheck", help=f"some of {', '.join(TOOLS)}, with commas between them")
    parser.add_argument("--cases", default=",".join(CASES), help="some of the cases, with commas between them")
    parser.add_argument("--sms", type=int, default=4, help="SMs of the programs")
    parser.add_argument("--out", type=Path, help="the results file; results/sanitizer-CARD.json where none is named")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # this process runs under the tool
    asked = parser.parse_args()
    asked.tools, asked.cases = chosen(parser, "tools", asked.tools, TOOLS), chosen(parser, "cases", asked.cases, list(CASES))
    if asked.sms < 1:
        parser.error(f"--sms: must be at least 1, but got {asked.sms}")
    if live_card() is None:
        print("sanitize: needs an NVIDIA card and its driver, but none was found", file=sys.stderr)
        sys.exit(3)
    if asked.child:
        asked.out.write_text(json.dumps(run_cases(asked.cases, small(choose(None, "cuda").target, asked.sms))), encoding="utf-8")
        return
    try:
        with live_card_lock(partial(print, flush=True)):
            clean = sanitize(asked)
    except EvalError as problem:
        print(f"sanitize: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    sys.exit(0 if clean else 1)


if __name__ == "__main__":
    main()
