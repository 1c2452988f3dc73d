"""Measures batch decode on the live card: time of a step by batch, in turns with the program of one token. Writes results/batch-CARD.json.

    python amk_bootstrap.py amk.dev.bench_batch [--model NAME] [--batches 8,16] [--position P] [--no-judging] [--out FILE]

Every program is judged by the oracle, row by row, before it is timed; all run from one copy of the weights.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from amk.dev.asked import at_least, numbers, writable
from amk.dev.provenance import write_results
from amk.dev.version import code_digest
from amk.eval.batch_oracle import judge_batch
from amk.eval.bench import interleaved, launch_start, quantiles, read_bandwidth_gbs
from amk.eval.card import choose, live_card
from amk.eval.card_lock import live_card_lock
from amk.eval.oracle import default_plan, judge, make_reference, rounding_points
from amk.models.model import Model
from amk.models.registry import resolve
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.settings import BATCHES
from amk.schedule.targets import Target
from amk.schedule.validate import ValidProgram, validate
from amk.vm.cuda import CudaVM, DeviceWeights

CONTEXT = 4096


def machines(model: Model, target: Target, batches: list[int]) -> list[CudaVM]:
    """The proven machines of each batch, with the same weights."""
    programs: list[Program] = [lower(model.spec, Config(), target, context=CONTEXT, batch=batch) for batch in batches]
    proofs = [validate(program) for program in programs]
    refused = [proof for proof in proofs if not isinstance(proof, ValidProgram)]
    assert not refused, refused
    weights = DeviceWeights(programs[0], model.weights)
    return [CudaVM(proof, model.weights, arch=target.arch, weights=weights) for proof in proofs if isinstance(proof, ValidProgram)]


def tolerance_used(model: Model, machine: CudaVM) -> float:
    """What the oracle found; AssertionError if the machine is wrong."""
    points, plan = rounding_points(machine.program), default_plan(model.spec, CONTEXT, "cuda")
    reference = make_reference(model.spec, model.eager("fp32", "cuda"), plan, points)
    finding = judge(machine, reference) if machine.batch == 1 else judge_batch(machine, reference)
    assert finding.correct, (machine.batch, finding.failures)
    return finding.tolerance_used


def step_us(machine: CudaVM, start: int, steps: int) -> float:
    """Microseconds a step of one launch with every row at work."""
    rows = machine.batch
    elapsed = machine.decode_batch([[1]] * rows, [start] * rows, steps=steps).elapsed_us
    assert elapsed is not None
    return elapsed / steps


def measure(name: str, batches: list[int], position: int, judging: bool) -> dict[str, Any]:
    model, target = resolve(name), choose(None, "cuda").target
    found = machines(model, target, batches)
    used = [tolerance_used(model, machine) if judging else None for machine in found]
    span = launch_start(position, CONTEXT)
    samples = interleaved([partial(step_us, machine, *span) for machine in found])
    one = quantiles(samples[0]).p50
    rows = [
        {
            "model": name, "batch": machine.batch, "position": position, "context": CONTEXT,
            "code_sha256": code_digest(machine.program), "step_us": quantiles(taken).p50,
            "over_first": quantiles(taken).p50 / one, "tokens_per_second": 1e6 * machine.batch / quantiles(taken).p50,
            "tolerance_used": share, "registers": machine.kernel.binary.registers, "spill_bytes": machine.kernel.binary.spill_store_bytes,
            "binary_digest": machine.kernel.binary.digest, "samples_us": taken,
        }
        for machine, taken, share in zip(found, samples, used, strict=True)
    ]  # fmt: skip
    for row in rows:
        print(f"{name} batch {row['batch']:2}: {row['step_us']:.1f} us a step, {row['over_first']:.3f} of the first", flush=True)
    return {"target": target.name, "plain_read_gbs": [read_bandwidth_gbs(target)], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b-shape")
    parser.add_argument("--batches", default="8,16", help="batches to measure beside one token, with commas between them")
    parser.add_argument("--position", type=int, default=128)
    parser.add_argument("--no-judging", action="store_true", help="time without the oracle; nothing is written")
    parser.add_argument("--out", type=Path, help="the results file; results/batch-CARD.json where none is named")
    asked = parser.parse_args()
    batches = [1, *numbers(parser, "batches", asked.batches, [batch for batch in BATCHES if batch > 1])]
    at_least(parser, "position", asked.position, 0)
    writable(parser, asked.out)
    if live_card() is None:
        print("bench_batch: needs an NVIDIA card and its driver, but none was found", file=sys.stderr)
        sys.exit(3)
    with live_card_lock(partial(print, flush=True)):
        results = measure(asked.model, batches, asked.position, not asked.no_judging)
    if not asked.no_judging:
        write_results(asked.out or Path("results") / f"batch-{results['target']}.json", results)


if __name__ == "__main__":
    main()
