"""Measures the published latencies on the live card, by model and position. Writes results/bench-CARD.json.

    python amk_bootstrap.py amk.dev.bench_gpu [--models A,B] [--positions P,Q] [--processes N] [--baselines [NAMES]] [--chain] [--out FILE]

Every program is judged by the oracle and run again for the same bits before it is timed; a row has what was found, the digests and the raw
samples. Measuring happens in fresh processes, one after the other, each of which holds the card's lock; with --processes N the latencies
are medians over N of them, and the file is written after each. Their outputs must be the same bits: for these the first one's judgement
stands. --chain measures the chain of
dependent steps alone instead: a build that moves no weights. torch.compile takes minutes for each model and position the first time; later
runs find what it built in its own cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from amk.dev.asked import at_least, chosen, numbers, writable
from amk.dev.fresh import Unlike, combined
from amk.dev.judged import JudgedMachine, judged
from amk.dev.on_card import on_card, require_card
from amk.dev.provenance import write_results
from amk.dev.version import code_digest
from amk.eval.baselines import BUILDERS, Contest, Rival
from amk.eval.bench import interleaved, launch_start, launch_us, measured, read_bandwidth_gbs, refuse_company, take
from amk.eval.card import choose
from amk.eval.card_lock import live_card_lock
from amk.eval.errors import RunVoid
from amk.eval.latency_table import baseline_rows
from amk.eval.session import Session
from amk.flywheel.origin import commit
from amk.schedule.proven import ValidProgram
from amk.vm.build import compile_kernel
from amk.vm.cuda import CudaVM
from amk.vm.source import kernel_source

ROOT = Path(__file__).resolve().parents[1]
ONE_B, SMOL = "llama-3.2-1b-shape", "smollm2-135m-shape"
POSITIONS = {
    ONE_B: (16, 128, 1024, 8000), SMOL: (16, 128, 1024), "llama-3.1-8b-shape": (128,),
    f"{ONE_B}@int8": (128,), f"{ONE_B}@fp8": (128,), f"{ONE_B}@int4-g128": (128,),
}  # fmt: skip
ALL_POSITIONS = sorted({position for positions in POSITIONS.values() for position in positions})
CONTEXT = {ONE_B: 9216}
OTHER_CONTEXT = 4096
DRY = {"DRY_FEED": 1}
NO_RESULT = "a build that moves no weights and computes nothing: the time of the chain of dependent steps alone, no latency of the model"
Row = dict[str, Any]


def context(model: str) -> int:
    """KV rows of the programs that are measured."""
    return CONTEXT.get(model, OTHER_CONTEXT)


def latency_rows(session: Session, positions: tuple[int, ...], baselines: tuple[str, ...], before: Sequence[Row]) -> list[Row]:
    """One measured line a position of the default config, printed as it is made. NotCorrect if the program may not be timed.

    `before` are the lines of an earlier process: outputs of the same bits are not judged once more.
    """
    name = session.model.spec.name
    known = next((row for row in before if row["model"] == name), None)
    entry = judged(session, session.prepare({}, context(name)), "default", known)
    try:
        spans = [launch_start(position, entry.machine.context) for position in positions]
        # Baselines would run the weights in 16 bits: what is quantised has none.
        rivals = baselines and not session.model.spec.quantised
        contest = Contest(session.model, spans, partial(print, flush=True), baselines) if rivals else None
        return [told(entry.facts | timed(session, entry, position, contest)) for position in positions]
    finally:
        entry.machine.close()


def timed(session: Session, entry: JudgedMachine, position: int, contest: Contest | None) -> Row:
    """The measured part of a line. A latency under the floor is an error of the measurement: RunVoid."""
    machine, span = entry.machine, launch_start(position, entry.machine.context)
    entrants = contest.enter(span) if contest else []
    timing = take(machine, position, [partial(rival.sample_us, span) for rival in entrants if isinstance(rival, Rival)])
    latency = measured(machine, session.place.target, position, session.bandwidth(), entry.digests, timing)
    if latency.under_floor:
        raise RunVoid(f"a latency must not be under its floor of {latency.bound_us:.1f} us, but is {latency.latency_us:.1f} us")
    return {
        "position": position, "context": machine.context, "latency_us": latency.latency_us, "floor_us": latency.bound_us,
        "pct_of_roofline": 100 * latency.bound_us / latency.latency_us, "streamed_bytes": latency.streamed_bytes,
        "samples_us": timing.samples_us, "single_launch_samples_us": timing.single_us,
        "baselines": baseline_rows(entrants, timing.others_us, latency, session.model.spec.dtype),
    }  # fmt: skip


def told(row: Row) -> Row:
    """The line, printed."""
    ours = f"{row['latency_us']:7.1f} us, {row['pct_of_roofline']:5.1f} % of the plain read"
    others = (f"{b['name']} {b['status']}" + (f" {b['ratio']:.2f}x" if b["ratio"] else f": {b['reason']}") for b in row["baselines"])
    print(f"{row['model']:28} position {row['position']:5}: {', '.join([ours, *others])}", flush=True)
    return row


def chain_rows(session: Session, positions: tuple[int, ...]) -> list[Row]:
    """One line a position of the build without memory traffic. It is no latency of the model and is not called one."""
    candidate = session.prepare({}, context(session.model.spec.name))
    assert candidate.program is not None, candidate.rejections
    machine = dry_machine(session, candidate.program)
    try:
        code = code_digest(candidate.program.program)
        return [{"code_sha256": code} | chain_row(session, machine, position) for position in positions]
    finally:
        machine.close()


def dry_machine(session: Session, program: ValidProgram) -> CudaVM:
    arch = session.place.target.arch
    return CudaVM(program, session.model.weights, arch=arch, binary=compile_kernel(kernel_source(program.program, **DRY), arch))


def chain_row(session: Session, machine: CudaVM, position: int) -> Row:
    refuse_company()
    (samples,) = interleaved([partial(launch_us, machine, *launch_start(position, machine.context))])
    refuse_company()
    row = {
        "model": session.model.spec.name, "position": position, "context": machine.context, "chain_us": float(np.median(samples)),
        "samples_us": samples, "is": NO_RESULT, "macros": DRY, "binary_digest": machine.kernel.binary.digest,
    }  # fmt: skip
    print(f"{row['model']:28} position {position:5}: {row['chain_us']:7.1f} us, the chain alone: no result", flush=True)
    return row


def wanted(asked: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """The positions that were asked for of each model that was; a model without any of them is left out."""
    positions = set(map(int, asked.positions.split(",")))
    found = {name: tuple(p for p in POSITIONS[name] if p in positions) for name in asked.models.split(",")}
    return {name: some for name, some in found.items() if some}


def measure_part(asked: argparse.Namespace) -> dict[str, Any]:
    """What one process measures: lines of latency or of the chain, its plain reads, and on what."""
    place, rows, reads = choose(None, "cuda"), [], []
    refuse_company(context=False)
    began, before = commit(), json.loads(asked.before.read_text(encoding="utf-8"))["rows"] if asked.before else []
    for name, positions in wanted(asked).items():
        session = Session(name, place)
        rows += chain_rows(session, positions) if asked.chain else latency_rows(session, positions, asked.baselines, before)
        reads.append(session.bandwidth())
    reads.append(read_bandwidth_gbs(place.target))
    return {"target": place.target.name, "device_name": place.device_name, "commit": began, "plain_read_gbs": reads, "rows": rows}


def in_fresh_process(asked: argparse.Namespace, first: dict[str, Any] | None) -> dict[str, Any]:
    """`measure_part` in a process of its own, which is told what the first one found; if that fails, this one ends with its exit code."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, str(ROOT / "amk_bootstrap.py"), "amk.dev.bench_gpu", "--part", "--out", str(out)]
        choice = ["--models", asked.models, "--positions", asked.positions, *(["--chain"] if asked.chain else [])]
        baselines = ["--baselines", ",".join(asked.baselines)] if asked.baselines else []
        before = Path(folder) / "before.json"
        before.write_text(json.dumps(first or {"rows": []}), encoding="utf-8")
        code = subprocess.run([*command, *choice, *baselines, "--before", str(before)]).returncode
        if code:
            sys.exit(code)
        measured_part: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return measured_part


def results(runs: list[dict[str, Any]], chain: bool) -> dict[str, Any]:
    """The results file's content from what the processes found. RunVoid where the code or the card was another in one of them."""
    for what in ("commit", "device_name"):
        if len({run[what] for run in runs}) != 1:
            raise RunVoid(f"{what}: must be the same in every process, but is {sorted({run[what] for run in runs})}")
    rows = [row for run in runs for row in run["rows"]] if chain else combined([run["rows"] for run in runs])
    return {
        "device_name": runs[0]["device_name"],
        "plain_read_gbs": [read for run in runs for read in run["plain_read_gbs"]],
        "processes": len(runs),
        "latency": [] if chain else rows,
        "chain": rows if chain else [],
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ",".join(BUILDERS)
    parser.add_argument("--models", default=",".join(POSITIONS), help="some of the models, with commas between them")
    parser.add_argument("--positions", default=",".join(map(str, ALL_POSITIONS)), help="some of the positions, with commas between them")
    parser.add_argument("--processes", type=int, default=1, help="fresh processes that measure the latencies")
    parser.add_argument("--baselines", nargs="?", const=every, default="", help=f"beside every latency; some of {every}, or all of them")
    parser.add_argument("--chain", action="store_true", help="the chain of dependent steps alone, without memory traffic; no latencies")
    parser.add_argument("--out", type=Path, help="the results file; results/bench-CARD.json where none is named")
    parser.add_argument("--part", action="store_true", help=argparse.SUPPRESS)  # this is a fresh process: its part into --out
    parser.add_argument("--before", type=Path, help=argparse.SUPPRESS)  # the first process's part
    asked = parser.parse_args()
    at_least(parser, "processes", asked.processes, 1)
    writable(parser, asked.out)
    asked.baselines = tuple(filter(None, asked.baselines.split(",")))
    models = chosen(parser, "models", asked.models, list(POSITIONS))
    numbers(parser, "positions", asked.positions, ALL_POSITIONS)
    if asked.baselines:
        chosen(parser, "baselines", ",".join(asked.baselines), list(BUILDERS))
    if not wanted(asked):
        some = sorted({position for name in models for position in POSITIONS[name]})
        parser.error(f"--positions: must be some of {', '.join(map(str, some))} for {asked.models}")
    if asked.chain and (asked.baselines or asked.processes > 1):
        parser.error("--chain: must stand without --baselines and --processes")
    return asked


def run(asked: argparse.Namespace) -> None:
    """This process's part, or all of them into the results file, which is written after each."""
    if asked.part:
        with live_card_lock(partial(print, flush=True)):
            asked.out.write_text(json.dumps(measure_part(asked)), encoding="utf-8")
        return
    runs: list[dict[str, Any]] = []
    while len(runs) < asked.processes:
        runs.append(in_fresh_process(asked, runs[0] if runs else None))
        write_results(asked.out or Path("results") / f"bench-{runs[0]['target']}.json", results(runs, asked.chain))


def main() -> None:
    asked = arguments()
    require_card("bench_gpu")
    with on_card("bench_gpu", lock=False, also=(Unlike,)):
        run(asked)


if __name__ == "__main__":
    main()
