"""The verdict: what one program is worth. Rules of honesty hold by construction; breaking one is a ValueError."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

Status: TypeAlias = Literal["correct", "incorrect", "rejected", "timeout", "crash"]
LatencyKind: TypeAlias = Literal["measured-gpu", "predicted"]


@dataclass(frozen=True)
class Samples:
    """Quantiles of the latency samples, microseconds a token."""

    p10: float
    p50: float
    p90: float
    n: int


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of a program before it runs. `gpu` is the target's name, `device` where it was judged; `batch` rows run side by side.

    `binary_digest` is None where no binary was built: on the CPU.
    """

    model: str
    gpu: str
    device: str
    dtype: str
    device_name: str | None = None
    batch: int = 1
    schedule_id: str | None = None
    program_digest: str | None = None
    binary_digest: str | None = None
    tasks: int | None = None
    n_buffers: int | None = None
    n_counters: int | None = None
    weight_mb: float | None = None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What the oracle found about the program with `program_digest`.

    `tolerance_used` is the largest share of a tolerance that was used (1 and more fails); `near_ties` counts tokens that
    differ at a near tie of the source model. `failures` says in sentences what failed.
    """

    program_digest: str
    binary_digest: str | None
    correct: bool
    rel_err: float
    max_abs_err: float
    top1_agreement: float
    tolerance_used: float
    near_ties: int
    positions: tuple[int, ...]
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Time of one step (a token of every row) of the program with `program_digest` at `position`, beside the floor of its bytes.

    `bandwidth_kind` says whether `bandwidth_gbs` was measured on the live card or is the specification's.
    """

    program_digest: str
    binary_digest: str | None
    kind: LatencyKind
    position: int
    latency_us: float
    streamed_bytes: int
    bandwidth_gbs: float
    bandwidth_kind: Literal["measured", "spec"]
    spec_bandwidth_gbs: float
    samples: Samples | None = None
    single_launch_us: float | None = None

    @property
    def bound_us(self) -> float:
        """The floor: a plain read of the streamed bytes."""
        return self.streamed_bytes / self.bandwidth_gbs * 1e-3

    @property
    def under_floor(self) -> bool:
        return not self.latency_us >= self.bound_us


@dataclass(frozen=True, kw_only=True)
class Verdict(Facts):
    """One program's verdict; every latency field is None unless that very program was found correct.

    `latency_us` is the time of a step, a token of every row, at `latency_position`, `single_launch_us` that of a launch of one step there;
    `tokens_per_second` counts all rows; `pct_of_roofline` is floor over latency, in percent. `correct` is None where nothing was judged.
    """

    status: Status
    valid: bool
    rejected_reason: str | None = None
    rejections: tuple[str, ...] = ()
    correct: bool | None = None
    rel_err: float | None = None
    max_abs_err: float | None = None
    top1_agreement: float | None = None
    tolerance_used: float | None = None
    near_ties: int | None = None
    positions: tuple[int, ...] = ()
    latency_us: float | None = None
    latency_kind: LatencyKind | None = None
    latency_position: int | None = None
    latency_samples: Samples | None = None
    single_launch_us: float | None = None
    tokens_per_second: float | None = None
    pct_of_roofline: float | None = None
    bound_us: float | None = None
    bandwidth_gbs: float | None = None
    bandwidth_kind: Literal["measured", "spec"] | None = None
    spec_bandwidth_gbs: float | None = None
    streamed_bytes: int | None = None
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise ValueError(f"verdict of {self.model} ({self.schedule_id}): " + "; ".join(problems))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON-able data; tuples become lists, and an error that is not finite null."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


def _problems(v: Verdict) -> Iterable[str]:
    if v.latency_us is not None and not (v.valid and v.correct is True and v.status == "correct"):
        yield f"a latency needs a correctness pass, but correct is {v.correct} and status {v.status}"
    if v.correct is True and not (v.valid and v.status == "correct" and v.positions):
        yield f"a pass needs a valid program judged at some position, but got {v.status} at {len(v.positions)} positions"
    if v.status == "correct" and v.correct is not True:
        yield f"status correct needs a correctness pass, but correct is {v.correct}"
    if v.correct is True and not (v.tolerance_used is not None and v.tolerance_used < 1):
        yield f"a pass must stay below the tolerance, but used {v.tolerance_used} of it"
    if (v.latency_us is None) != (v.latency_kind is None):
        yield f"latency and its kind go together, but got {v.latency_us} and {v.latency_kind}"
    if v.latency_kind == "measured-gpu" and not (v.device == "cuda" and v.latency_samples and v.bandwidth_kind == "measured"):
        yield "a measured latency needs the card, its samples and its measured bandwidth"
    if v.latency_us is not None and v.bound_us is not None and not v.latency_us >= v.bound_us:
        yield f"latency {v.latency_us} us is below the floor {v.bound_us} us of the bytes streamed"
    if not v.valid and (v.status != "rejected" or not v.rejections):
        yield "what is not valid must be a rejection with its reasons"


def rejected(facts: Facts, rejections: Iterable[str]) -> Verdict:
    """The verdict on a config or program that was refused before it ran; `rejections` must name at least one reason."""
    reasons = tuple(rejections)
    return Verdict(**asdict(facts), status="rejected", valid=False, rejections=reasons, rejected_reason="; ".join(reasons), notes=())


def failed(facts: Facts, kind: Literal["timeout", "crash"], message: str) -> Verdict:
    """The verdict on a valid program whose launch did not finish."""
    return Verdict(**asdict(facts), status=kind, valid=True, correct=False, notes=(message,))


def judged(facts: Facts, judgement: Judgement, latency: Latency | None = None, notes: Iterable[str] = ()) -> Verdict:
    """The verdict on a program that ran. A latency under its floor becomes a note; one of another program is a ValueError."""
    same = (facts.program_digest, facts.binary_digest)
    if (judgement.program_digest, judgement.binary_digest) != same:
        raise ValueError("the judgement is about another program than the facts")
    verdict = Verdict(
        **asdict(facts),
        status="correct" if judgement.correct else "incorrect",
        valid=True,
        correct=judgement.correct,
        rel_err=judgement.rel_err,
        max_abs_err=judgement.max_abs_err,
        top1_agreement=judgement.top1_agreement,
        tolerance_used=judgement.tolerance_used,
        near_ties=judgement.near_ties,
        positions=judgement.positions,
        notes=(*judgement.failures, *notes),
    )
    if latency is None:
        return verdict
    if (latency.program_digest, latency.binary_digest) != same:
        raise ValueError("the latency was taken from another program than the one judged")
    return _with_latency(verdict, latency)


def _with_latency(verdict: Verdict, latency: Latency) -> Verdict:
    floor = replace(
        verdict,
        bound_us=latency.bound_us,
        bandwidth_gbs=latency.bandwidth_gbs,
        bandwidth_kind=latency.bandwidth_kind,
        spec_bandwidth_gbs=latency.spec_bandwidth_gbs,
        streamed_bytes=latency.streamed_bytes,
    )
    if latency.under_floor:
        note = f"latency {latency.latency_us:.2f} us is under the floor of {latency.bound_us:.2f} us: not reported"
        return replace(floor, notes=(*verdict.notes, note))
    return replace(
        floor,
        latency_us=latency.latency_us,
        latency_kind=latency.kind,
        latency_position=latency.position,
        latency_samples=latency.samples,
        single_launch_us=latency.single_launch_us,
        tokens_per_second=1e6 * verdict.batch / latency.latency_us,
        pct_of_roofline=100 * latency.bound_us / latency.latency_us,
    )


def from_json(data: Mapping[str, Any]) -> Verdict:
    """The verdict that `to_json` gave; ValueError if the data break a rule of honesty, TypeError for unknown fields."""
    values = {f.name: data[f.name] for f in fields(Verdict) if f.name in data}
    unknown = sorted(set(data) - set(values))
    if unknown:
        raise TypeError(f"verdict: unknown fields {', '.join(unknown)}")
    values |= {k: tuple(v) for k, v in values.items() if isinstance(v, list)}
    if values.get("latency_samples") is not None:
        values["latency_samples"] = Samples(**values["latency_samples"])
    return Verdict(**values)
