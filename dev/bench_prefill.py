"""Measures prefill on the live card: time of a prompt by stretch, in turns with transformers. Writes results/prefill-CARD.json.

    python amk_bootstrap.py amk.dev.bench_prefill [--model NAME] [--stretches 32,64,128] [--tokens N] [--no-judging] [--out FILE]

Kernels are built ahead, side by side. Every program is judged by the oracle before it is timed; all run from one copy of the weights. What
transformers does is one forward pass over the same tokens in the checkpoint's dtype, KV rows kept, logits of the last token alone.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from amk.dev.asked import at_least, known_model, numbers, writable
from amk.dev.judged import NotCorrect
from amk.dev.on_card import on_card, require_card
from amk.dev.prebuild import Build, ahead
from amk.dev.provenance import write_results
from amk.dev.version import code_digest
from amk.eval.bench import interleaved, quantiles, read_bandwidth_gbs, refuse_company
from amk.eval.candidate import require_program
from amk.eval.card import Place, choose
from amk.eval.oracle import Plan, make_reference, rounding_points
from amk.eval.prefill_oracle import judge_prefill
from amk.models.model import Model
from amk.models.registry import resolve
from amk.schedule.settings import STRETCHES
from amk.vm.cuda import CudaVM

ATTENTIONS = ("sdpa", "eager")


def context(tokens: int) -> int:
    """KV rows for a prompt of so many tokens."""
    return max(1024, tokens + 16)


def builds(name: str, stretches: Sequence[int], rows: int) -> list[Build]:
    """What `machines` needs."""
    return [Build(name, {}, rows, batch=batch, prefill=batch > 1) for batch in (1, *stretches)]


def machines(name: str, model: Model, place: Place, stretches: Sequence[int], rows: int) -> list[CudaVM]:
    """The machine that decodes, and beside it one for prefill for each size of a stretch. Rejected if the model has no program for one."""
    found: list[CudaVM] = []
    with ahead(builds(name, stretches, rows), place) as futures:
        for future, batch in zip(futures, (1, *stretches), strict=True):
            program = require_program(future.result(), f"stretch {batch}")
            found.append(CudaVM(program, model.weights, arch=place.target.arch, beside=found[0] if found else None))
    return found


def tolerance_used(model: Model, prefill: CudaVM, decoder: CudaVM) -> float:
    """What the oracle found; NotCorrect if the machine is wrong."""
    plan = Plan(prompt=200, steps=208, late=(700,), late_steps=72)
    reference = make_reference(model.spec, model.eager("fp32", "cuda"), plan, rounding_points(prefill.program))
    finding = judge_prefill(prefill, decoder, reference)
    if not finding.correct:
        raise NotCorrect(f"stretch {prefill.batch}: {'; '.join(finding.failures)}")
    return finding.tolerance_used


def eager_pass(model: Model, tokens: list[int], attention: str) -> Callable[[], float]:
    """Microseconds of one forward pass of transformers over the tokens, between CUDA events."""
    import torch
    from transformers import DynamicCache

    eager = model.eager(model.spec.dtype, "cuda")
    eager.set_attn_implementation(attention)
    ids = torch.tensor([tokens], device="cuda")

    def sample() -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        with torch.inference_mode():
            torch.cuda.synchronize()
            begin.record()
            eager(input_ids=ids, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3

    return sample


def whole_prompt(prefill: CudaVM, decoder: CudaVM, tokens: list[int]) -> float:
    """Microseconds to the logits of the last token: stretches for those before it, then it alone."""
    stretches_us = prefill.prefill(tokens[:-1], 0)
    last = decoder.decode(tokens[-1:], len(tokens) - 1).elapsed_us
    assert last is not None
    return stretches_us + last


def measure(name: str, stretches: list[int], count: int, judging: bool) -> dict[str, Any]:
    place = choose(None, "cuda")
    refuse_company(context=False)
    model = resolve(name)
    decoder, *prefills = machines(name, model, place, stretches, context(count))
    used = [tolerance_used(model, prefill, decoder) if judging else None for prefill in prefills]
    tokens = random.Random(0).choices(range(model.spec.vocab), k=count)
    entrants: dict[str, Callable[[], float]] = {
        f"stretches of {prefill.batch}": partial(whole_prompt, prefill, decoder, tokens) for prefill in prefills
    }
    entrants |= {f"transformers, {attention}": eager_pass(model, tokens, attention) for attention in ATTENTIONS}
    refuse_company()
    samples = interleaved(list(entrants.values()))
    refuse_company()
    rows: list[dict[str, Any]] = [
        {"model": name, "entrant": entrant, "tokens": count, "prompt_us": quantiles(taken).p50, "samples_us": taken}
        for entrant, taken in zip(entrants, samples, strict=True)
    ]
    for row, prefill, share in zip(rows, prefills, used, strict=False):
        whole = -(-(count - 1) // prefill.batch)
        row |= {
            "stretch": prefill.batch, "batch": prefill.batch, "prefill": True, "context": prefill.context,
            "code_sha256": code_digest(prefill.program), "launches": whole, "us_a_launch": row["prompt_us"] / whole,
            "tolerance_used": share,
            "registers": prefill.kernel.binary.registers, "spill_bytes": prefill.kernel.binary.spill_store_bytes,
            "binary_digest": prefill.kernel.binary.digest,
        }  # fmt: skip
    for row in rows:
        launch = f", {row['us_a_launch']:.0f} us a launch" if "us_a_launch" in row else ""
        print(f"{name} {row['entrant']}: {row['prompt_us'] / 1e3:.2f} ms for {count} tokens{launch}", flush=True)
    return {"target": place.target.name, "plain_read_gbs": [read_bandwidth_gbs(place.target)], "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-3.2-1b-shape")
    parser.add_argument("--stretches", default="32,64,128", help="seats of a stretch, with commas between them")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of the prompt, at least 2")
    parser.add_argument("--no-judging", action="store_true", help="time without the oracle; nothing is written")
    parser.add_argument("--out", type=Path, help="the results file; results/prefill-CARD.json where none is named")
    asked = parser.parse_args()
    stretches = numbers(parser, "stretches", asked.stretches, STRETCHES)
    at_least(parser, "tokens", asked.tokens, 2)
    known_model(parser, "model", asked.model)
    writable(parser, asked.out)
    require_card("bench_prefill")
    with on_card("bench_prefill"):
        results = measure(asked.model, stretches, asked.tokens, not asked.no_judging)
    if not asked.no_judging:
        write_results(asked.out or Path("results") / f"prefill-{results['target']}.json", results)


if __name__ == "__main__":
    main()
