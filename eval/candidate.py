"""A config on its way to a verdict: parsed, lowered, proven; every refusal is a reason, not an exception."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from amk.eval.card import Place
from amk.eval.errors import Rejected
from amk.eval.verdict import Facts
from amk.schedule.compile import compile_program, effective_config, notes
from amk.schedule.config import parse_config
from amk.schedule.cost import streamed_bytes
from amk.schedule.digest import program_digest, schedule_id
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec
from amk.schedule.program import Program
from amk.schedule.settings import Chooser
from amk.schedule.targets import Target
from amk.schedule.validate import Limits, ValidProgram, validate

QUALITY = "results/quality.json"


@dataclass(frozen=True)
class Candidate:
    """What became of the config `asked` (JSON data) for the model `spec`.

    `program` is None exactly where there are `rejections`; `effective` is the config as the program realises it.
    """

    spec: ModelSpec
    asked: Any
    facts: Facts
    program: ValidProgram | None = None
    rejections: tuple[str, ...] = ()
    effective: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    chooser: Chooser = "greedy"


def prepare(
    spec: ModelSpec,
    place: Place,
    config: Any,
    context: int | None = None,
    chooser: Chooser = "greedy",
    batch: int = 1,
    prefill: bool = False,
) -> Candidate:
    """Takes JSON data as a config through the compiler and the proof. Never raises for a bad config.

    `batch` tokens are computed side by side, of a row each, or for `prefill` of one sequence.
    """
    facts = Facts(model=spec.name, gpu=place.target.name, device=place.device, dtype=spec.dtype, device_name=place.device_name, batch=batch)
    parsed = parse_config(config)
    if not isinstance(parsed, Config):
        return Candidate(spec, config, facts, rejections=tuple(map(str, parsed)))
    program = compile_program(spec, parsed, place.target, context=context, chooser=chooser, batch=batch, prefill=prefill)
    if not isinstance(program, Program):
        return Candidate(spec, config, facts, rejections=tuple(map(str, program)))
    facts = program_facts(facts, program)
    proof = validate(program, limits(place.target))
    if not isinstance(proof, ValidProgram):
        return Candidate(spec, config, facts, rejections=tuple(map(str, proof)))
    said = (*weight_notes(spec), *notes(parsed, program))
    return Candidate(spec, config, facts, proof, (), effective_config(parsed, program), said, chooser)


def require_program(candidate: Candidate, what: str = "config") -> ValidProgram:
    """The candidate's program. Rejected, with every reason against `what`, if it has none."""
    if candidate.program is None:
        raise Rejected(f"{what}: " + "; ".join(candidate.rejections))
    return candidate.program


def weight_notes(spec: ModelSpec) -> tuple[str, ...]:
    """What the weights are streamed in, where it is not the model's own dtype."""
    if not (spec.layer_weights or spec.head_weights):
        return ()
    layers, head = (weights.name if weights else spec.dtype for weights in (spec.layer_weights, spec.head_weights))
    held = f"weights are {layers} in the layers, {head} in the head and {spec.dtype} in the embedding"
    return (f"{held}; correct means like the source model with the same weights dequantised ({QUALITY} has what quantising costs)",)


def limits(target: Target) -> Limits:
    """What a program may use on the target."""
    return Limits(sms=target.sms, shared_bytes=target.shared_bytes)


def program_facts(facts: Facts, program: Program) -> Facts:
    return replace(
        facts,
        schedule_id=schedule_id(program),
        program_digest=program_digest(program),
        tasks=program.task_count,
        n_buffers=len(program.buffers),
        n_counters=len(program.counters),
        weight_mb=round(streamed_bytes(program, 0) / 1e6, 3),
    )
