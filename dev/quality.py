"""What quantising costs: perplexity of SmolLM2-135M and its divergence from bf16, through the machine. Writes results/quality.json.

    python amk_bootstrap.py amk.dev.quality                                     some of the formats, all of the text, on the live card
    python amk_bootstrap.py amk.dev.quality int8 int4 --model FILE.gguf         these formats; the checkpoint from a file
    python amk_bootstrap.py amk.dev.quality --device cpu --tokens 64 int4-g128  a look without a card; give --out to keep it

The text is dev/data/quality.txt, written for this purpose (CC0). It is read from left to right in one sequence. Kernels are built ahead.
Every program is judged by the oracle before it is measured. The file is written anew after each format.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amk.dev.asked import writable
from amk.dev.judged import NotCorrect
from amk.dev.prebuild import Build, ahead
from amk.dev.provenance import write_results
from amk.dev.version import code_digest
from amk.eval.candidate import Candidate
from amk.eval.card import Place, choose
from amk.eval.card_lock import live_card_lock
from amk.eval.errors import EvalError, UsageError
from amk.eval.oracle import judge
from amk.eval.session import Session
from amk.isa.weight_format import FORMATS
from amk.models.builtin import NAMES
from amk.models.errors import ModelError
from amk.models.registry import describe
from amk.schedule.cost import streamed_bytes
from amk.schedule.model import ModelSpec
from amk.vm.build import BuildFailed
from amk.vm.interface import DecodeMachine, LaunchFailed

if TYPE_CHECKING:
    import torch

MODEL = "smollm2-135m"
TEXT = Path(__file__).parent / "data" / "quality.txt"
STEPS = 256  # tokens a launch
USUAL = ("int8", "fp8", "int8-g128", "int4-g128", "int4-g32", "int4-g128-asym")
NOTE = (
    "This checkpoint was published as 4-bit weights (GGUF) and dequantised to bf16: bf16 stands for those values, which lie on grids of "
    "their own. What a format costs here is not what it would cost on weights that were never quantised."
)


def text_tokens(session: Session, count: int | None) -> list[int]:
    """The text in the model's tokens, or the first `count` of them."""
    tokenizer = session.model.tokenizer()
    if tokenizer is None:
        raise UsageError(f"model: must have a tokenizer, but {session.model.spec.name} has none")
    tokens: list[int] = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return tokens if count is None else tokens[:count]


def log_probabilities(machine: DecodeMachine, tokens: list[int], device: str = "cpu") -> torch.Tensor:
    """fp32 [tokens - 1, vocab] on `device`: of each token but the first, given those before it."""
    import torch

    parts = []
    for at in range(0, len(tokens) - 1, STEPS):
        logits = machine.decode(tokens[at : min(at + STEPS, len(tokens) - 1)], at, logits=True).logits
        assert logits is not None
        parts.append(logits.to(device).float().log_softmax(-1))
    return torch.cat(parts)


def chosen_nll(found: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """fp64 [tokens - 1] on the CPU: the negative log probability of each of tokens[1:]."""
    import torch

    rows = torch.arange(len(found), device=found.device)
    return -found[rows, torch.tensor(tokens[1:], device=found.device)].double().cpu()


def perplexity(found: torch.Tensor, tokens: list[int]) -> float:
    """exp of the mean negative log probability of tokens[1:]."""
    return float(chosen_nll(found, tokens).mean().exp())


def perplexity_ratio(reference: torch.Tensor, found: torch.Tensor, tokens: list[int]) -> tuple[float, float]:
    """Perplexity of `found` over that of `reference`, and its standard error, as far as the tokens of one text are independent."""
    more = chosen_nll(found, tokens) - chosen_nll(reference, tokens)
    ratio = float(more.mean().exp())
    return ratio, ratio * float(more.std(unbiased=False)) / len(more) ** 0.5


def divergence(reference: torch.Tensor, found: torch.Tensor) -> dict[str, float]:
    """KL(reference || found) in nats over positions, and the share of positions with the same most likely token."""
    import torch

    pairs = ((reference[at : at + STEPS].double(), found[at : at + STEPS].double()) for at in range(0, len(reference), STEPS))
    kl = torch.cat([(r.exp() * (r - f)).sum(-1) for r, f in pairs])
    return {
        "kl_mean": float(kl.mean()),
        "kl_p99": float(kl.quantile(0.99)),
        "kl_max": float(kl.max()),
        "same_top1": float((reference.argmax(-1) == found.argmax(-1)).double().mean()),
    }


def known_as(spec: ModelSpec) -> str | None:
    """The built-in model of exactly this description, in the same format (NAME@FORMAT); None if there is none.

    Such a model is compiled again, without the checkpoint, to see whether a figure is about the code at hand.
    """
    held, form = spec.layer_weights, spec.name.rpartition("@")[2]
    bare = replace(spec, name="", layer_weights=None, head_weights=None)
    known = next((name for name in NAMES if replace(describe(name), name="") == bare), None)
    if known is None or held is None:
        return known
    return f"{known}@{form}" if replace(describe(f"{known}@{form}"), name=spec.name) == spec else None


def measured(session: Session, candidate: Candidate, count: int | None) -> tuple[dict[str, Any], torch.Tensor]:
    """The figures of one model and its log probabilities on its device; NotCorrect if its program is refused or wrong."""
    if candidate.program is None:
        raise NotCorrect("; ".join(candidate.rejections))
    program, tokens = candidate.program.program, text_tokens(session, count)
    if len(tokens) > program.machine.context:
        raise UsageError(f"the text must fit the context of {program.machine.context} tokens, but has {len(tokens)}")
    facts, machine = session.load(candidate)
    try:
        finding = judge(machine, session.reference(program))
        if not finding.correct:
            raise NotCorrect("; ".join(finding.failures))
        session.progress(f"reading {len(tokens)} tokens of text")
        found = log_probabilities(machine, tokens, session.place.device)
    finally:
        machine.close()
    spec = session.model.spec
    row = {
        "model": spec.name,
        "layers": spec.layer_weights.name if spec.layer_weights else spec.dtype,
        "head": spec.head_weights.name if spec.head_weights else spec.dtype,
        "embedding": spec.dtype,
        "described_as": known_as(spec),
        "context": program.machine.context,
        "code_sha256": code_digest(program),
        "perplexity": perplexity(found, tokens),
        "correct": finding.correct,
        "tolerance_used": finding.tolerance_used,
        "weights_bytes": streamed_bytes(program, 0),
        "model_digest": session.model.digest,
        "program_digest": facts.program_digest,
        "binary_digest": facts.binary_digest,
    }
    return row, found


def measure(model: str, formats: list[str], place: Place, count: int | None) -> Iterator[dict[str, Any]]:
    """The figures so far: bf16 alone first, then once more with each format beside it."""
    names = [model, *(f"{model}@{form}" for form in formats)]
    builds = [Build(name, {}, None) for name in names] if place.device == "cuda" else []
    text = {"path": "dev/data/quality.txt", "sha256": hashlib.sha256(TEXT.read_bytes()).hexdigest(), "tokens": 0}
    found_so_far: dict[str, Any] = {"note": NOTE, "text": text, "device": place.device, "formats": []}
    with ahead(builds, place) as futures:
        reference, tokens = None, []
        for at, name in enumerate(names):
            session = Session(name, place, partial(say, name))
            candidate = session.adopt(futures[at].result()) if futures else session.prepare({})
            row, found = measured(session, candidate, count)
            if reference is None:
                reference, tokens = found, text_tokens(session, count)
                text["tokens"] = len(tokens)
                found_so_far["baseline"] = row
            else:
                ratio, error = perplexity_ratio(reference, found, tokens)
                row |= {"perplexity_ratio": ratio, "perplexity_ratio_error": error} | divergence(reference, found)
                found_so_far["formats"].append(row)
                print(line(row, found_so_far["baseline"]), flush=True)
            yield found_so_far


def say(model: str, text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {model}: {text}", file=sys.stderr, flush=True)


def line(row: dict[str, Any], baseline: dict[str, Any]) -> str:
    against = (
        f"{baseline['layers']} {baseline['perplexity']:.3f}, ratio {row['perplexity_ratio']:.4f} ± {row['perplexity_ratio_error']:.4f}"
    )
    held = f"perplexity {row['perplexity']:8.3f} ({against})"
    return f"{row['layers']:16} {held}, KL {row['kl_mean']:.4f}, same top-1 {row['same_top1']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("formats", nargs="*", default=list(USUAL), help=f"of {', '.join(FORMATS)}; by default {', '.join(USUAL)}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", default=MODEL, help="a trained model with a tokenizer: a name, a checkpoint folder or a GGUF file")
    parser.add_argument("--tokens", type=int, default=None, help="how much of the text; all of it by default")
    parser.add_argument("--out", type=Path, default=None, help="file to write; results/quality.json for all of the text on a card")
    asked = parser.parse_args()
    unknown = sorted(set(asked.formats) - set(FORMATS))
    if unknown or (asked.tokens is not None and asked.tokens < 2):
        parser.error(f"formats must be among {', '.join(FORMATS)} and tokens at least 2, but got {unknown or asked.tokens}")
    writable(parser, asked.out)
    out = asked.out or (Path("results/quality.json") if asked.device == "cuda" and asked.tokens is None else None)
    try:
        place = choose(None, asked.device)
        with live_card_lock(print) if place.device == "cuda" else nullcontext():
            for results in measure(asked.model, list(dict.fromkeys(asked.formats)), place, asked.tokens):
                if out:
                    write_results(out, results)
    except (EvalError, ModelError, NotCorrect, LaunchFailed, BuildFailed) as problem:
        print(f"quality: {problem}", file=sys.stderr)
        sys.exit(getattr(problem, "exit_code", 1))


if __name__ == "__main__":
    main()
