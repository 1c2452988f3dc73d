"""What quantising costs: perplexity of SmolLM2-135M and its divergence from bf16, through the machine. Writes results/quality.json.

    python amk_bootstrap.py amk.dev.quality                                     every format, all of the text, on the live card
    python amk_bootstrap.py amk.dev.quality --device cpu --tokens 64 int4-g128  a look without a card; give --out to keep it

The text is dev/data/quality.txt, written for this purpose (CC0). It is read from left to right in one sequence. Every program is
judged by the oracle before it is measured.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from amk.dev.provenance import write_results
from amk.eval.card import choose
from amk.eval.oracle import judge
from amk.eval.session import Session
from amk.isa.weight_format import FORMATS
from amk.schedule.cost import streamed_bytes
from amk.vm.interface import DecodeMachine

if TYPE_CHECKING:
    import torch

MODEL = "smollm2-135m"
TEXT = Path(__file__).parent / "data" / "quality.txt"
STEPS = 256  # tokens a launch
NOTE = (
    "This checkpoint was published as 4-bit weights (GGUF) and dequantised to bf16: bf16 stands for those values, which lie on grids of "
    "their own. What a format costs here is not what it would cost on weights that were never quantised."
)


def text_tokens(session: Session, count: int | None) -> list[int]:
    """The text in the model's tokens, or the first `count` of them."""
    tokens: list[int] = session.model.tokenizer()(TEXT.read_text(encoding="utf-8"))["input_ids"]
    return tokens if count is None else tokens[:count]


def log_probabilities(machine: DecodeMachine, tokens: list[int]) -> torch.Tensor:
    """fp32 [tokens - 1, vocab]: of each token but the first, given those before it."""
    import torch

    parts = []
    for at in range(0, len(tokens) - 1, STEPS):
        logits = machine.decode(tokens[at : min(at + STEPS, len(tokens) - 1)], at, logits=True).logits
        assert logits is not None
        parts.append(logits.float().log_softmax(-1))
    return torch.cat(parts)


def perplexity(found: torch.Tensor, tokens: list[int]) -> float:
    """exp of the mean negative log probability of tokens[1:]."""
    import torch

    chosen = found[torch.arange(len(found)), torch.tensor(tokens[1:])]
    return float((-chosen.double()).mean().exp())


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


def measured(name: str, device: str, count: int | None) -> tuple[dict[str, Any], torch.Tensor]:
    """The figures of one model and its log probabilities; AssertionError if its program is refused or wrong."""
    session = Session(name, choose(None, device), lambda text: print(f"{name}: {text}", file=sys.stderr, flush=True))
    candidate = session.prepare({})
    assert candidate.program is not None, candidate.rejections
    program, tokens = candidate.program.program, text_tokens(session, count)
    facts, machine = session.load(candidate)
    try:
        finding = judge(machine, session.reference(program))
        assert finding.correct, finding.failures
        session.progress("reading the text")
        found = log_probabilities(machine, tokens)
    finally:
        machine.close()
    spec = session.model.spec
    row = {
        "model": name,
        "layers": spec.layer_weights.name if spec.layer_weights else spec.dtype,
        "head": spec.head_weights.name if spec.head_weights else spec.dtype,
        "embedding": spec.dtype,
        "perplexity": perplexity(found, tokens),
        "correct": finding.correct,
        "tolerance_used": finding.tolerance_used,
        "weights_bytes": streamed_bytes(program, 0),
        "model_digest": session.model.digest,
        "program_digest": facts.program_digest,
        "binary_digest": facts.binary_digest,
    }
    return row, found


def measure(formats: list[str], device: str, count: int | None) -> dict[str, Any]:
    """Every figure: bf16 first, then each format beside it."""
    baseline, reference = measured(MODEL, device, count)
    rows = []
    for form in formats:
        row, found = measured(f"{MODEL}@{form}", device, count)
        rows.append(row | {"perplexity_ratio": row["perplexity"] / baseline["perplexity"]} | divergence(reference, found))
        held = f"perplexity {row['perplexity']:8.3f} (bf16 {baseline['perplexity']:.3f})"
        print(f"{form:16} {held}, KL {rows[-1]['kl_mean']:.4f}, same top-1 {rows[-1]['same_top1']:.3f}", flush=True)
    text = {"path": "dev/data/quality.txt", "sha256": hashlib.sha256(TEXT.read_bytes()).hexdigest(), "tokens": len(reference) + 1}
    return {"note": NOTE, "text": text, "device": device, "baseline": baseline, "formats": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("formats", nargs="*", default=list(FORMATS), help="weight formats; all of them by default")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tokens", type=int, default=None, help="how much of the text; all of it by default")
    parser.add_argument("--out", type=Path, default=None, help="file to write; results/quality.json for the whole measurement on a card")
    chosen = parser.parse_args()
    unknown = sorted(set(chosen.formats) - set(FORMATS))
    if unknown or (chosen.tokens is not None and chosen.tokens < 2):
        parser.error(f"formats must be among {', '.join(FORMATS)} and tokens at least 2, but got {unknown or chosen.tokens}")
    results = measure(chosen.formats, chosen.device, chosen.tokens)
    whole = chosen.device == "cuda" and chosen.tokens is None and set(chosen.formats) == set(FORMATS)
    out = chosen.out or (Path("results/quality.json") if whole else None)
    if out:
        write_results(out, results)


if __name__ == "__main__":
    main()
