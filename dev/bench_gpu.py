"""Measures the published figures on the live card: latency by position, and what each knob does. Writes results/bench-CARD.json.

    python amk_bootstrap.py amk.dev.bench_gpu [--baselines] [--processes N] [--models A,B] [--positions P,Q] [--no-knobs] [--out FILE]

Every program is judged by the oracle before it is timed; a row has what the oracle found, the digests and the raw samples. Measuring
happens in fresh processes, one after the other, each of which holds the card's lock; with --processes N the latencies are medians over N
of them. torch.compile takes minutes for each model and position the first time; later runs find what it built in its own cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from amk.dev.fresh import combined
from amk.dev.provenance import write_results
from amk.eval.baselines import Contest, Rival
from amk.eval.bench import launch_start, measured, read_bandwidth_gbs, take
from amk.eval.card import choose, live_card
from amk.eval.card_lock import live_card_lock
from amk.eval.errors import EvalError
from amk.eval.latency_table import baseline_rows
from amk.eval.oracle import judge
from amk.eval.session import Session
from amk.vm.cuda import UnprovenCudaVM

ROOT = Path(__file__).resolve().parents[1]
ONE_B, SMOL = "llama-3.2-1b-shape", "smollm2-135m-shape"
KNOB_MODELS = (ONE_B, SMOL)
POSITIONS = {
    ONE_B: (16, 128, 1024, 8000), SMOL: (16, 128, 1024), "llama-3.1-8b-shape": (128,),
    f"{ONE_B}@int8": (128,), f"{ONE_B}@int4-g128": (128,),
}  # fmt: skip
ALL_POSITIONS = sorted({position for positions in POSITIONS.values() for position in positions})
CONTEXT = {ONE_B: 9216}
OTHER_CONTEXT = 4096
VARIANTS: dict[str, dict[str, Any]] = {
    "sm_assignment=load_balance": {"sm_assignment": "load_balance"},
    "sm_assignment=round_robin": {"sm_assignment": "round_robin"},
    "fusion_grouping=[]": {"fusion_grouping": []},
    "N_tile=128": {"tiling": {"gemv": {"N_tile": 128}}},
    "kv_block=16": {"tiling": {"attention": {"kv_block": 16}}},
    "kv_block=64": {"tiling": {"attention": {"kv_block": 64}}},
    "kv_block=256": {"tiling": {"attention": {"kv_block": 256}}},
    "pipelining_depth=2": {"pipelining_depth": 2},
    "pipelining_depth=4": {"pipelining_depth": 4},
    "pipelining_depth=8": {"pipelining_depth": 8},
    "page_allocation=linear": {"page_allocation": "linear"},
    "threads_per_block=128": {"threads_per_block": 128},
    "smem_bytes_per_block=98304": {"smem_bytes_per_block": 98304},
    "stage_bytes=8192, depth 8": {"kernel_knobs": {"stage_bytes": 8192}, "pipelining_depth": 8},
    "stage_bytes=32768, depth 2": {"kernel_knobs": {"stage_bytes": 32768}, "pipelining_depth": 2},
    "cache_hint=none": {"kernel_knobs": {"cache_hint": "none"}},
    "sync=tags": {"kernel_knobs": {"sync": "tags"}},
    "poll_sleep_ns=100": {"kernel_knobs": {"poll_sleep_ns": 100}},
    "release_early=0": {"kernel_knobs": {"release_early": 0}},
    "release_early=8": {"kernel_knobs": {"release_early": 8}},
    "reduction_slots=8": {"kernel_knobs": {"reduction_slots": 8}},
    "kv_splits=1": {"kernel_knobs": {"kv_splits": 1}},
}


def judged_rows(session: Session, label: str, config: dict[str, Any], positions: tuple[int, ...], baselines: bool) -> list[dict[str, Any]]:
    """One measured line a position, printed as it is made; AssertionError if the program is refused or wrong."""
    candidate = session.prepare(config, CONTEXT.get(session.model.spec.name, OTHER_CONTEXT))
    assert candidate.program is not None, candidate.rejections
    program = candidate.program.program
    facts, machine = session.load(candidate)
    assert isinstance(machine, UnprovenCudaVM) and facts.program_digest and facts.binary_digest
    try:
        finding = judge(machine, session.reference(program))
        assert finding.correct, finding.failures
        head: dict[str, Any] = {
            "model": session.model.spec.name, "config": label, "effective": candidate.effective, "correct": finding.correct,
            "tolerance_used": finding.tolerance_used, "schedule_id": facts.schedule_id, "program_digest": facts.program_digest,
            "binary_digest": facts.binary_digest, "arena_bytes": 8 * program.arena_packets, "registers": machine.kernel.binary.registers,
        }  # fmt: skip
        spans = [launch_start(position, machine.context) for position in positions]
        # Baselines would run the weights in 16 bits: what is quantised has none.
        rivals = baselines and not session.model.spec.quantised
        contest = Contest(session.model, spans, partial(print, flush=True)) if rivals else None
        digests = (facts.program_digest, facts.binary_digest)
        return [told(head | timed(session, machine, digests, position, contest)) for position in positions]
    finally:
        machine.close()


def timed(session: Session, machine: UnprovenCudaVM, digests: tuple[str, str], position: int, contest: Contest | None) -> dict[str, Any]:
    """The measured part of a line. A latency under the floor is an error of the measurement: AssertionError."""
    span = launch_start(position, machine.context)
    entrants = contest.enter(span) if contest else []
    timing = take(machine, position, [partial(rival.sample_us, span) for rival in entrants if isinstance(rival, Rival)])
    latency = measured(machine, session.place.target, position, session.bandwidth(), digests, timing)
    assert not latency.under_floor, latency
    return {
        "position": position, "latency_us": latency.latency_us, "floor_us": latency.bound_us,
        "pct_of_roofline": 100 * latency.bound_us / latency.latency_us, "streamed_bytes": latency.streamed_bytes,
        "samples_us": timing.samples_us, "single_launch_samples_us": timing.single_us,
        "baselines": baseline_rows(entrants, timing.others_us, latency, session.model.spec.dtype),
    }  # fmt: skip


def told(row: dict[str, Any]) -> dict[str, Any]:
    """The line, printed."""
    ours = f"{row['latency_us']:7.1f} us, {row['pct_of_roofline']:5.1f} % of the plain read"
    others = (f"{b['name']} {b['status']}" + (f" {b['ratio']:.2f}x" if b["ratio"] else f": {b['reason']}") for b in row["baselines"])
    print(f"{row['model']:20} {row['config']:28} position {row['position']:5}: {', '.join([ours, *others])}", flush=True)
    return row


def wanted(asked: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """The positions that were asked for of each model that was; a model without any of them is left out."""
    positions = set(map(int, asked.positions.split(",")))
    found = {name: tuple(p for p in POSITIONS[name] if p in positions) for name in asked.models.split(",")}
    return {name: chosen for name, chosen in found.items() if chosen}


def measure_part(part: str, positions: dict[str, tuple[int, ...]], baselines: bool) -> dict[str, Any]:
    """What one process measures: the "latency" lines of the default config, or the "knobs" lines, and its plain reads."""
    sessions = {name: Session(name, choose(None, "cuda")) for name in positions}
    if part == "latency":
        rows = [row for name, session in sessions.items() for row in judged_rows(session, "default", {}, positions[name], baselines)]
    else:
        cases = [
            (session, label, config) for name, session in sessions.items() if name in KNOB_MODELS for label, config in VARIANTS.items()
        ]
        rows = [row for session, label, config in cases for row in judged_rows(session, label, config, (128,), False)]
    target = choose(None, "cuda").target
    reads = [session.bandwidth() for session in sessions.values()] + [read_bandwidth_gbs(target)]
    return {"target": target.name, "plain_read_gbs": reads, "rows": rows}


def in_fresh_process(part: str, asked: argparse.Namespace) -> dict[str, Any]:
    """`measure_part` in a process of its own; if that fails, this one ends with its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        flags = ["--baselines"] if asked.baselines else []
        command = [sys.executable, str(ROOT / "amk_bootstrap.py"), "amk.dev.bench_gpu", "--part", part, *flags]
        choice = ["--models", asked.models, "--positions", asked.positions]
        code = subprocess.run([*command, *choice, "--out", str(out)]).returncode
        if code:
            sys.exit(code)
        measured_part: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return measured_part


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baselines", action="store_true", help="CUDA-graphed transformers and torch.compile beside every latency")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes that measure the latencies")
    parser.add_argument("--models", default=",".join(POSITIONS), help="some of the models, with commas between them")
    parser.add_argument("--positions", default=",".join(map(str, ALL_POSITIONS)), help="some of the positions, with commas between them")
    parser.add_argument("--no-knobs", action="store_true", help="leave out what each knob does")
    parser.add_argument("--out", type=Path, help="the results file; results/bench-CARD.json where none is named")
    parser.add_argument("--part", choices=("latency", "knobs"), help=argparse.SUPPRESS)  # what a fresh process is asked for
    asked = parser.parse_args()
    if asked.processes < 1:
        parser.error(f"--processes: must be at least 1, but got {asked.processes}")
    for option, allowed in (("models", list(POSITIONS)), ("positions", list(map(str, ALL_POSITIONS)))):
        if unknown := sorted(set(getattr(asked, option).split(",")) - set(allowed)):
            parser.error(f"--{option}: must be some of {', '.join(allowed)}, but got {unknown[0]!r}")
    if not wanted(asked):
        parser.error(f"--positions: must be some of {', '.join(map(str, POSITIONS[asked.models]))} for {asked.models}")
    return asked


def main() -> None:
    asked = arguments()
    if live_card() is None:
        print("bench_gpu: needs an NVIDIA card and its driver, but none was found", file=sys.stderr)
        sys.exit(3)
    if asked.part:
        try:
            with live_card_lock(partial(print, flush=True)):
                found = measure_part(asked.part, wanted(asked), asked.baselines)
        except EvalError as problem:
            print(f"bench_gpu: {problem}", file=sys.stderr)
            sys.exit(problem.exit_code)
        asked.out.write_text(json.dumps(found), encoding="utf-8")
        return
    runs = [in_fresh_process("latency", asked) for _ in range(asked.processes)]
    parts = runs if asked.no_knobs else [*runs, in_fresh_process("knobs", asked)]
    results = {
        "plain_read_gbs": [read for part in parts for read in part["plain_read_gbs"]],
        "processes": asked.processes,
        "latency": combined([run["rows"] for run in runs]),
        "knobs": [row for part in parts[len(runs) :] for row in part["rows"]],
    }
    write_results(asked.out or Path("results") / f"bench-{runs[0]['target']}.json", results)


if __name__ == "__main__":
    main()
