"""Measures batch decode on the live card: time of a step by batch, in turns with the program of one token. Writes results/batch-CARD.json.

    python amk_bootstrap.py amk.dev.bench_batch [--model NAME] [--batches 8,16] [--position P] [--no-judging] [--out FILE]

Kernels are built ahead, side by side. Every program is judged by the oracle, row by row, before it is timed; all run from one copy of the
weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from amk.dev.asked import below, known_model, numbers, writable
from amk.dev.judged import NotCorrect
from amk.dev.on_card import on_card, require_card
from amk.dev.prebuild import Build, ahead
from amk.dev.provenance import write_results
from amk.dev.version import code_digest
from amk.eval.batch_oracle import judge_any
from amk.eval.bench import interleaved, launch_start, launch_us, quantiles, read_bandwidth_gbs, refuse_company
from amk.eval.candidate import require_program
from amk.eval.card import Place, choose
from amk.eval.oracle import default_plan, make_reference, rounding_points
from amk.models.model import Model
from amk.models.registry import resolve
from amk.schedule.settings import BATCHES
from amk.vm.cuda import CudaVM, DeviceWeights

CONTEXT = 4096


def builds(name: str, batches: Sequence[int]) -> list[Build]:
    """What `machines` needs."""
    return [Build(name, {}, CONTEXT, batch=batch) for batch in batches]


def machines(name: str, model: Model, place: Place, batches: list[int]) -> list[CudaVM]:
    """The proven machines of each batch, with the same weights. Rejected if the model has no program for one."""
    with ahead(builds(name, batches), place) as futures:
        programs = [require_program(future.result(), f"batch {batch}") for future, batch in zip(futures, batches, strict=True)]
    weights = DeviceWeights(programs[0].program, model.weights)
    return [CudaVM(program, model.weights, arch=place.target.arch, weights=weights) for program in programs]


def tolerance_used(model: Model, machine: CudaVM) -> float:
    """What the oracle found; NotCorrect if the machine is wrong."""
    points, plan = rounding_points(machine.program), default_plan(model.spec, CONTEXT, "cuda")
    reference = make_reference(model.spec, model.eager("fp32", "cuda"), plan, points)
    finding = judge_any(machine, reference)
    if not finding.correct:
        raise NotCorrect(f"batch {machine.batch}: {'; '.join(finding.failures)}")
    return finding.tolerance_used


def measure(name: str, batches: list[int], position: int, judging: bool) -> dict[str, Any]:
    place = choose(None, "cuda")
    refuse_company(context=False)
    model = resolve(name)
    found = machines(name, model, place, batches)
    used = [tolerance_used(model, machine) if judging else None for machine in found]
    span = launch_start(position, CONTEXT)
    refuse_company()
    samples = interleaved([partial(launch_us, machine, *span) for machine in found])
    refuse_company()
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
    return {"target": place.target.name, "plain_read_gbs": [read_bandwidth_gbs(place.target)], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b-shape")
    parser.add_argument("--batches", default="8,16", help="batches to measure beside one token, with commas between them")
    parser.add_argument("--position", type=int, default=128)
    parser.add_argument("--no-judging", action="store_true", help="time without the oracle; nothing is written")
    parser.add_argument("--out", type=Path, help="the results file; results/batch-CARD.json where none is named")
    asked = parser.parse_args()
    batches = [1, *numbers(parser, "batches", asked.batches, [batch for batch in BATCHES if batch > 1])]
    below(parser, "position", asked.position, 0, CONTEXT, "the programs' KV rows")
    known_model(parser, "model", asked.model)
    writable(parser, asked.out)
    require_card("bench_batch")
    with on_card("bench_batch"):
        results = measure(asked.model, batches, asked.position, not asked.no_judging)
    if not asked.no_judging:
        write_results(asked.out or Path("results") / f"batch-{results['target']}.json", results)


if __name__ == "__main__":
    main()
