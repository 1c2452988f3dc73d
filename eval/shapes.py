"""The results of the harness as types: field names are part of the contract, and schemas/ is rendered from here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

from amk.eval.verdict import Samples, Verdict
from amk.schedule.render import DRAFT

NAMES: dict[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}


class Propose(TypedDict):
    """The config to start from, and everything that may be changed about it."""

    model: str
    gpu: str
    schedule_config: dict[str, Any]
    effective_config: dict[str, Any]
    schedule_id: str
    search_space: dict[str, Any]
    schema: str
    edit_surface: str


class Loop(TypedDict):
    """A run of keep or revert. A row is a verdict with `trial`, `source`, `tag` and `trial_id`."""

    best_verdict: dict[str, Any] | None
    best_config: dict[str, Any] | None
    rows: list[dict[str, Any]]
    n_trials: int
    n_valid: int
    n_correct: int
    results_tsv: str


class Prefill(TypedDict):
    """How a prompt became KV rows: the first `tokens` of it in `launches` of up to `stretch`, in `elapsed_us` of the device's time.

    Where a `reason` is given there were no such launches, and every token of it was decoded. `elapsed_us` is null on the CPU too.
    """

    stretch: int | None
    launches: int
    tokens: int
    elapsed_us: float | None
    reason: str | None


class Generate(TypedDict):
    """Tokens after a prompt, greedy or drawn. `divergence_index` is null when equal or not verified; times are null on the CPU.

    `latency_us_per_token` and `tokens_per_second` are of the tokens that were decoded: of the prompt, those after `prefill`.
    """

    text: str | None
    tokens: list[int]
    generated: list[int]
    prompt_tokens: int
    prefill: Prefill
    tokens_per_second: float | None
    latency_us_per_token: float | None
    divergence_index: int | None
    matches_eager: bool | None
    near_tie: bool | None
    stop_reason: Literal["stop_token", "stop_text", "max_tokens"]
    device: str
    device_name: str | None
    model: str
    gpu: str
    schedule_id: str


class BaselineRow(TypedDict):
    """A baseline at one position, sampled in turns with ours: "measured", "failed" (it did not build or run) or "refused" (it is wrong, or
    under the floor).

    `form` says what it is, `rel_err` how far its logits are from the source model's, `expected_rel_err` how far that model's own
    are in `dtype`. `ratio` is its latency over ours.
    """

    name: Literal["cuda-graph", "torch-compile"]
    status: Literal["measured", "failed", "refused"]
    reason: str | None
    form: str | None
    dtype: str
    rel_err: float | None
    expected_rel_err: float | None
    latency_us: float | None
    ratio: float | None
    samples: Samples | None
    samples_us: list[float]


class BenchRow(TypedDict):
    """The time of a step (a token a row) at one position; null if under its floor. `baselines` is empty where none were asked for."""

    position: int
    latency_us: float | None
    latency_kind: Literal["measured-gpu", "predicted"] | None
    single_launch_us: float | None
    tokens_per_second: float | None
    pct_of_roofline: float | None
    bound_us: float
    bandwidth_gbs: float
    bandwidth_kind: Literal["measured", "spec"]
    streamed_bytes: int
    samples: Samples | None
    samples_us: list[float]
    baselines: list[BaselineRow]


class Bench(TypedDict):
    """Latencies of one program, after its verdict."""

    model: str
    gpu: str
    device: str
    verdict: Verdict
    rows: list[BenchRow]


class ActorTime(TypedDict):
    """Microseconds that an average actor of a role spent in each phase: waiting for others, loading, computing, publishing."""

    actor: Literal["feeder", "consumer", "storer", "watcher"]
    wait_us: float
    load_us: float
    compute_us: float
    publish_us: float


class TaskTime(ActorTime):
    """The same in one class of tasks, all layers together."""

    task: str


class Trace(TypedDict):
    """Where the time of the token at `position` went, in a build made for that: slower than the measured one, so no time here is a latency.

    `file` is a Chrome trace with every SM's actors (of its consumers the first); the sums are over all of them. Null and empty where
    the program was not found correct.
    """

    model: str
    gpu: str
    device: str
    verdict: Verdict
    position: int
    file: str | None
    traced_us: float | None
    lost_events: int
    by_actor: list[ActorTime]
    by_task: list[TaskTime]


SHAPES: Mapping[str, type] = {"verdict": Verdict, "propose": Propose, "loop": Loop, "generate": Generate, "bench": Bench, "trace": Trace}


def result_schema(name: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a result; more fields may follow. KeyError for a name that is not in SHAPES."""
    return {"$schema": DRAFT, "title": name} | _schema(SHAPES[name])


def _schema(kind: Any) -> dict[str, Any]:
    if kind in NAMES:
        return {"type": NAMES[kind]}
    if is_dataclass(kind) or hasattr(kind, "__total__"):
        return _record(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, UnionType):
        return {"anyOf": [_schema(choice) for choice in arguments]}
    if origin in (list, tuple):
        return {"type": "array", "items": _schema(arguments[0])}
    return {"type": "object"} if origin is dict or kind is dict else {}


def _record(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)] if is_dataclass(kind) else list(hints)
    properties = {name: _schema(hints[name]) for name in names}
    return {"description": " ".join((kind.__doc__ or "").split()), "type": "object", "properties": properties, "required": names}
