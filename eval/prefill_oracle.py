"""The oracle for prefill: KV rows of stretches, and the tokens that are decoded from them, against the source model.

From each of the reference's places most tokens go through the machine for prefill and the last few through the one that decodes; rows
before the place are the source's. Statistics and limits are those of one token (eval/oracle.py).
"""

from __future__ import annotations

from typing import Any

from amk.eval.kv_rows import Rows, relative_errors, typical_ratios
from amk.eval.oracle import Finding, Reference, Segment, Step, find

DECODED = 4  # tokens of a late segment that are decoded after its stretches


def judge_prefill(prefill: Any, decoder: Any, reference: Reference) -> Finding:
    """The finding on a PrefillMachine and the DecodeMachine that it is beside, both of the reference's model.

    LaunchFailed if a launch does not finish.
    """
    shares: dict[str, float] = {}
    steps: list[list[Step]] = []
    for segment in (reference.early, *reference.late):
        for layer in range(reference.layers) if segment.start else ():
            decoder.seed_kv(layer, *reference.kv(layer, segment.start))
        first = reference.plan.prompt - 1 if segment is reference.early else len(segment.tokens) - DECODED
        prefill.prefill(segment.tokens[:first], segment.start)
        errors = relative_errors(decoder.read_kv, reference.kv, reference.layers, Rows(segment.start, segment.start + first))
        for name, ratio in typical_ratios(errors, segment.rows_expected[:, :, :first]).items():
            shares[name] = max(shares.get(name, 0.0), ratio)
        steps.append(_decoded(decoder, segment, first))
    return find(steps[0], [step for late in steps[1:] for step in late], shares, reference.dtype)


def _decoded(decoder: Any, segment: Segment, first: int) -> list[Step]:
    """The segment's tokens from number `first` on, decoded on the source's track."""
    out = decoder.decode(segment.tokens[first:], segment.start + first, logits=True)
    places = range(first, len(segment.tokens))
    return [segment.step(i, token, logits) for i, token, logits in zip(places, out.tokens, out.logits, strict=True)]
