"""The knob table: every choice that a schedule has. Defaults, checks, schema, search space and documentation are read from here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from amk.schedule.rejection import Rejection, reject, show

Assignment: TypeAlias = str | tuple[tuple[str, tuple[int, ...]], ...]
KnobType = Literal["int", "choice", "set", "assignment"]


STAGE_CHOICES = (8192, 16384, 20480, 24576, 32768)  # bytes; what an automatic choice is among, too
SPLIT_CHOICES = (1, 2, 4, 8, 16)  # likewise


@dataclass(frozen=True)
class Knob:
    """One choice: its dotted key in a config, the values it may take, and who reads it.

    "int" and "choice" take one of `choices`, or an int from `minimum` to `maximum`; "set" takes a list of distinct `choices`; "assignment"
    takes one of `choices` or a map from op to SMs. A search of a range tries the values of `search`.
    """

    name: str
    type: KnobType
    default: Any
    meaning: str
    consumer: str
    unit: str = ""
    choices: tuple[Any, ...] = ()
    minimum: int = 0
    maximum: int = 0
    search: tuple[int, ...] = ()

    @property
    def allowed(self) -> str:
        """What a value must be, as the sentence `must be ...` goes on."""
        if self.type == "set":
            return f"a list of distinct entries of {show(self.choices)}"
        if self.type == "assignment":
            return f"one of {show(self.choices)} or a map from op to a list of SMs"
        return f"one of {show(self.choices)}" if self.choices else f"an integer from {self.minimum} to {self.maximum}"

    @property
    def values(self) -> tuple[Any, ...]:
        """The values that a search tries, in order."""
        return self.choices or self.search

    def parse(self, value: Any) -> tuple[Any, list[Rejection]]:
        """The canonical value and no rejection, or the default and why `value` is none."""
        if self.type == "assignment" and type(value) is dict:
            return self._parse_map(value)
        if self.type == "set":
            accepted = type(value) is list and all(_is_in(v, self.choices) for v in value) and len(set(value)) == len(value)
            return (tuple(c for c in self.choices if c in value), []) if accepted else self._refuse(value)
        if self.choices:
            return (value, []) if _is_in(value, self.choices) else self._refuse(value)
        accepted = type(value) is int and self.minimum <= value <= self.maximum
        return (value, []) if accepted else self._refuse(value)

    def _refuse(self, value: Any) -> tuple[Any, list[Rejection]]:
        return self.default, [reject(self.name, value, self.allowed)]

    def _parse_map(self, value: dict[Any, Any]) -> tuple[Any, list[Rejection]]:
        problems = [reject(f"{self.name}.{show(op)}", op, "the name of an op") for op in value if type(op) is not str]
        named = {op: sms for op, sms in value.items() if type(op) is str}
        for op, sms in named.items():
            if type(sms) is not list or any(type(sm) is not int or sm < 0 for sm in sms):
                problems.append(reject(f"{self.name}.{op}", sms, "a list of SM numbers, one for each tile of the op"))
        if not value:
            problems.append(reject(self.name, value, f"{self.allowed} with at least one op"))
        return (self.default, problems) if problems else (tuple(sorted((op, tuple(sms)) for op, sms in named.items())), [])


def _is_in(value: Any, choices: tuple[Any, ...]) -> bool:
    """Membership by type and value: True is not 1, and an unhashable value is simply not a choice."""
    return any(type(value) is type(choice) and value == choice for choice in choices)


def _knob(name: str, type: KnobType, default: Any, meaning: str, consumer: str, **rest: Any) -> Any:
    return field(default=default, metadata={"knob": Knob(name, type, default, meaning, consumer, **rest)})


NO_PAUSE = 1  # of poll_sleep_ns
FUSIONS = ("norm", "qkv", "gate_up")


@dataclass(frozen=True)
class Config:
    """One schedule as a value for each knob. The fields are the knob table; `KNOBS` lists it."""

    n_tile: int = _knob(
        "tiling.gemv.N_tile",
        "int",
        16,
        "rows of a weight matrix that are placed on an SM together",
        "place",
        unit="rows",
        choices=(16, 32, 64, 128, 256, 512),
    )
    kv_block: int = _knob(
        "tiling.attention.kv_block",
        "int",
        128,
        "old KV rows that are dealt to a split at a time",
        "emit, isa.attention",
        unit="rows",
        choices=(16, 32, 64, 128, 256),
    )
    fusion: tuple[str, ...] = _knob(
        "fusion_grouping",
        "set",
        FUSIONS,
        "what is fused: norm into the products that read it, q, k and v into one matrix, gate and up into one product with SwiGLU",
        "fuse",
        choices=FUSIONS,
    )
    sm_assignment: Assignment = _knob(
        "sm_assignment",
        "assignment",
        "load_balance",
        "which SM does which tile: a policy, or a map from op (`qkv` in every layer, `L3.qkv` in one) to the SM of each of its tiles",
        "place",
        choices=("contiguous", "round_robin", "load_balance"),
    )
    pipelining_depth: int = _knob(
        "pipelining_depth",
        "int",
        3,
        "ring stages that are being copied at a time; more than the ring has are as many as it has",
        "compile, vm feeder",
        unit="stages",
        minimum=1,
        maximum=12,
        search=tuple(range(1, 13)),
    )
    page_allocation: str = _knob(
        "page_allocation",
        "choice",
        "graph_color",
        "whether values that never live together share packets of the arena (graph_color) or each has its own (linear)",
        "memory",
        choices=("graph_color", "linear"),
    )
    threads_per_block: int = _knob(
        "threads_per_block",
        "int",
        256,
        "consumer threads of a block; feeder, storer and watcher come on top",
        "compile, vm consumer",
        unit="threads",
        choices=(128, 256),
    )
    smem_bytes_per_block: int = _knob(
        "smem_bytes_per_block",
        "int",
        0,
        "shared memory for the ring, in whole stages; 0 is as much as fits",
        "compile, vm feeder",
        unit="bytes",
        minimum=0,
        maximum=1 << 20,
        search=(0, 32768, 65536, 98304, 131072, 163840, 196608),
    )
    stage_bytes: int = _knob(
        "kernel_knobs.stage_bytes",
        "int",
        0,
        "bytes of a ring stage without scales of quantised weights; 0 is 16384, more where it cuts small tiles or 16 KV rows need it, "
        "less where it would not fit",
        "compile, vm feeder",
        unit="bytes",
        choices=(0, *STAGE_CHOICES),
    )
    cache_hint: str = _knob(
        "kernel_knobs.cache_hint",
        "choice",
        "evict_first",
        "L2 policy of weight copies",
        "vm feeder",
        choices=("evict_first", "none"),
    )
    sync: str = _knob(
        "kernel_knobs.sync",
        "choice",
        "counter",
        "how a task learns that it may begin: the watcher polls a counter as a hint, or the tags of the values alone tell",
        "synchronise, vm watcher",
        choices=("counter", "tags"),
    )
    poll_sleep_ns: int = _knob(
        "kernel_knobs.poll_sleep_ns",
        "int",
        0,
        "pause between two looks at a counter; 1 is none; 0 is automatic: 50 for batches and for layers of a middling size where sync is "
        "counter and the feed bulk copies, else none",
        "pause, vm watcher",
        unit="ns",
        choices=(0, NO_PAUSE, 20, 50, 100),
    )
    release_early: int = _knob(
        "kernel_knobs.release_early",
        "int",
        16,
        "share of a task's awaited arrivals that may be missing when consumers begin to look at the tags themselves",
        "vm watcher",
        unit="1/32",
        choices=(0, 1, 2, 4, 8, 16),
    )
    throttled_depth: int = _knob(
        "kernel_knobs.throttled_depth",
        "int",
        0,
        "ring stages that are being copied at a time while high_watermark of them are not free; pipelining_depth or more never throttles. "
        "0 is automatic: 2, or 1 for small layers; for very small ones, and for other feeds than bulk copies, no throttle",
        "throttle, vm feeder",
        unit="stages",
        minimum=0,
        maximum=12,
        search=(0, 1, 2, 3),
    )
    high_watermark: int = _knob(
        "kernel_knobs.high_watermark",
        "int",
        0,
        "ring stages that are not free from which on the feeder is throttled; as many as the ring has or more never throttle; "
        "0 is 6 for large layers and 4 for others",
        "throttle, vm feeder",
        unit="stages",
        minimum=0,
        maximum=32,
        search=(0, 2, 3, 4, 5, 6, 8),
    )
    reduction_slots: int = _knob(
        "kernel_knobs.reduction_slots",
        "int",
        0,
        "tiles whose partial sums may wait for the storer, each in shared memory that the ring cannot have; 0 is 4, of a batch 1",
        "settings, vm storer",
        unit="tiles",
        choices=(0, 1, 2, 4, 8),
    )
    kv_splits: int = _knob(
        "kernel_knobs.kv_splits",
        "int",
        0,
        "tasks that share the KV rows of a head, no more than there are blocks of rows; 0 is as many as there are SMs for",
        "settings, emit",
        unit="tasks",
        choices=(0, *SPLIT_CHOICES),
    )
    weight_feed: str = _knob(
        "kernel_knobs.weight_feed",
        "choice",
        "auto",
        "how bytes come into the ring: bulk copies (compute capability 9.0 and later), cp_async (8.0) or plain loads; auto is the first of "
        "these that the card has",
        "settings, vm feeder",
        choices=("auto", "bulk", "cp_async", "plain"),
    )


KNOBS: tuple[Knob, ...] = tuple(f.metadata["knob"] for f in fields(Config))
FIELD_OF: dict[str, str] = {f.metadata["knob"].name: f.name for f in fields(Config)}


@dataclass(frozen=True)
class Rule:
    """What must hold between `knobs`, whatever the model and the card: `check` gives the rejection of a config that breaks it."""

    meaning: str
    knobs: tuple[str, ...]
    check: Callable[[Config], Rejection | None]


def _ring_holds_a_stage(config: Config) -> Rejection | None:
    if config.smem_bytes_per_block == 0 or config.smem_bytes_per_block >= max(config.stage_bytes, 8192):
        return None
    need = max(config.stage_bytes, 8192)
    return reject("smem_bytes_per_block", config.smem_bytes_per_block, f"0 or at least one stage ({need} bytes)")


RING_KNOBS = ("smem_bytes_per_block", "kernel_knobs.stage_bytes")
RULES: tuple[Rule, ...] = (Rule("smem_bytes_per_block is 0 or holds at least one stage", RING_KNOBS, _ring_holds_a_stage),)
