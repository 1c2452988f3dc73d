"""What a config means for one model on one card: automatic values chosen, and every reason why the three do not go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from amk.isa.abi import NONE
from amk.isa.attention import MAX_GROUP
from amk.isa.machine import ELEMENT_BYTES, FRAGMENT_BYTES, KV_BLOCK_ROWS, TILE_ROWS, Piece, kv_span, quantised_piece
from amk.schedule.knobs import SPLIT_CHOICES, STAGE_CHOICES, Config
from amk.schedule.model import ModelSpec, matrices_bytes
from amk.schedule.pause import pause_ns
from amk.schedule.rejection import Rejection, reject
from amk.schedule.targets import Target
from amk.schedule.throttle import Throttle, throttle_of

DEFAULT_CONTEXT = 16384
MAX_HEAD_DIM = 256
MOST_LAYERS = NONE // 16 - 1  # the names of their buffers and counters must fit into a field of a record
BATCHES = (1, 8, 16)  # tokens that a program may compute side by side
STRETCHES = (32, 64, 128)  # and consecutive positions of one sequence

# How a program chooses tokens: the largest logit; by temperature; by temperature and filters. The last two end at stop tokens.
Chooser: TypeAlias = Literal["greedy", "draw", "filter"]


@dataclass(frozen=True)
class Settings:
    """Realised choices: `splits[l]` attention tasks of a KV head in layer l; `stage_sizes` to try, in bytes with scales, best first.

    `feed` is how they are filled, `throttle` when more slowly; `poll_sleep_ns` is how long watchers pause, 0 for not at all. `batch` tokens
    are computed side by side: each with KV rows of its own, or, for `prefill`, consecutive positions of one sequence.
    """

    config: Config
    target: Target
    context: int
    consumer_warps: int
    splits: tuple[int, ...]
    stage_sizes: tuple[int, ...]
    feed: str
    throttle: Throttle
    poll_sleep_ns: int
    batch: int = 1
    chooser: Chooser = "greedy"
    prefill: bool = False

    @property
    def sequences(self) -> int:
        """Sequences with KV rows of their own."""
        return 1 if self.prefill else self.batch

    @property
    def reduction_slots(self) -> int:
        """As the config says; nobody uses any where no product is stored, as for prefill.

        Of one token they cost next to nothing, and any number is as fast. Those of a batch are larger: one of them and a ring of one or two
        stages more are 1.6 % faster than four at the 1B on an H200 (docs/performance-log.md, v15).
        """
        if self.prefill:
            return 1
        return self.config.reduction_slots or (4 if self.batch == 1 else 1)

    @property
    def tiles_per_unit(self) -> int:
        return self.config.n_tile // TILE_ROWS


def resolve(
    spec: ModelSpec,
    config: Config,
    target: Target,
    context: int | None,
    batch: int = 1,
    chooser: Chooser = "greedy",
    prefill: bool = False,
) -> Settings | list[Rejection]:
    """The settings, or every reason against them that can be told before lowering.

    `context` is the number of KV rows, rounded up to a multiple of 16; None takes what the model allows, up to 16384.
    """
    problems = [
        *model_problems(spec),
        *_dtype_problems(spec, target),
        *_feed_problems(config, target),
        *_batch_problems(spec, config, batch, chooser, prefill),
    ]
    if problems:
        return problems
    rows = min(spec.max_context, DEFAULT_CONTEXT) if context is None else context
    warps = config.threads_per_block // 32
    problems = [*_context_problems(spec, rows), *_stage_problems(spec, config, warps)]
    if problems:
        return problems
    rows += -rows % KV_BLOCK_ROWS
    problems = list(_memory_problems(spec, target, rows, 1 if prefill else batch))
    if problems:
        return problems
    feed = target.feeds[0] if config.weight_feed == "auto" else config.weight_feed
    splits, stage_sizes = splits_of(spec, config, target, rows, batch), _stage_sizes(spec, config, target, warps)
    throttle = throttle_of(spec, config, target, feed)
    pause = 0 if prefill else pause_ns(spec, config, target, batch, feed)
    return Settings(config, target, rows, warps, splits, stage_sizes, feed, throttle, pause, batch, chooser, prefill)


def least_stage_bytes(spec: ModelSpec, consumer_warps: int) -> int:
    """A stage must hold 16 rows of K and V of a head, and one piece of weights of each consumer warp (its scales not counted)."""
    padded = spec.head_dim + -spec.head_dim % 16
    fragments = max([1, *(piece.bytes // FRAGMENT_BYTES for piece in _quantised_pieces(spec))])
    return max(2 * KV_BLOCK_ROWS * padded * ELEMENT_BYTES[spec.dtype], FRAGMENT_BYTES * fragments * consumer_warps)


def stage_bytes_with_scales(spec: ModelSpec, stage_bytes: int) -> int:
    """Bytes of a stage that holds `stage_bytes` of codes and their scales: so scales never cost a stage half of its room."""
    codes = FRAGMENT_BYTES
    fits = [stage_bytes // (p.bytes // codes * codes) * p.bytes + p.tail for p in _quantised_pieces(spec)]
    return max([stage_bytes, *fits])


def _quantised_pieces(spec: ModelSpec) -> list[Piece]:
    return [quantised_piece(weights) for weights in (spec.layer_weights, spec.head_weights) if weights]


def model_problems(spec: ModelSpec) -> Iterator[Rejection]:
    """Sizes that no instruction can take, whatever the config. A lane reads two packets of two elements with one load."""
    limits = (
        ("hidden", spec.hidden, spec.hidden > 0 and spec.hidden % 16 == 0, "a multiple of 16"),
        ("intermediate", spec.intermediate, spec.intermediate > 0 and spec.intermediate % 4 == 0, "a multiple of 4"),
        ("head_dim", spec.head_dim, 0 < spec.head_dim <= MAX_HEAD_DIM and spec.head_dim % 8 == 0, f"a multiple of 8 up to {MAX_HEAD_DIM}"),
        ("heads", spec.heads, spec.heads > 0 and spec.heads % spec.kv_heads == 0, f"a multiple of kv_heads ({spec.kv_heads})"),
        ("heads", spec.heads, spec.group <= MAX_GROUP, f"at most {MAX_GROUP} for each of the {spec.kv_heads} KV heads"),
        ("layers", spec.layers, 0 < spec.layers <= MOST_LAYERS, f"from 1 to {MOST_LAYERS}"),
        ("vocab", spec.vocab, spec.vocab > 0, "at least 1"),
        ("dtype", spec.dtype, spec.dtype in ELEMENT_BYTES, f"one of {tuple(ELEMENT_BYTES)}"),
    )
    return (reject(f"model.{name}", value, allowed) for name, value, holds, allowed in limits if not holds)


def _dtype_problems(spec: ModelSpec, target: Target) -> Iterator[Rejection]:
    if spec.dtype not in target.dtypes:
        allowed = f"one of {target.dtypes} on {target.name} ({target.arch}); MODEL@{target.dtypes[0]} is the model so converted"
        yield reject("model.dtype", spec.dtype, allowed)
    if spec.dtype == "fp32" and (spec.layer_weights or spec.head_weights):
        yield reject("model.dtype", spec.dtype, "bf16 or fp16 for quantised weights")
    layers, head = spec.layer_weights, spec.head_weights
    if layers and head and layers.floating != head.floating:
        yield reject(
            "model.head_weights", head.name, f"none or of the kind of the layers' {layers.name}: integers or floating-point numbers"
        )


def weight_feeds(target: Target) -> tuple[str, ...]:
    """The values of the knob weight_feed that the card allows."""
    return ("auto", *target.feeds)


def _feed_problems(config: Config, target: Target) -> Iterator[Rejection]:
    allowed = weight_feeds(target)
    if config.weight_feed not in allowed:
        yield reject("kernel_knobs.weight_feed", config.weight_feed, f"one of {allowed} on {target.name} ({target.arch})")


def _batch_problems(spec: ModelSpec, config: Config, batch: int, chooser: Chooser, prefill: bool) -> Iterator[Rejection]:
    """What programs of a batch cannot do yet: draws, fp32, quantised weights, norms and activations that are tasks of their own, and for
    prefill q, k and v of a matrix each, and columns of heads that are not whole fragments.
    """
    allowed = STRETCHES if prefill else BATCHES
    if batch not in allowed:
        yield reject("batch", batch, f"one of {allowed}")
    if batch == 1:
        return
    if chooser != "greedy":
        yield reject("batch", batch, "1 for programs that draw")
    if spec.dtype == "fp32":
        yield reject("model.dtype", spec.dtype, "bf16 or fp16 for a batch")
    if spec.quantised:
        yield reject("batch", batch, "1 for quantised weights")
    first = "qkv" if prefill else "norm"
    if not {first, "gate_up"} <= set(config.fusion):
        yield reject("fusion_grouping", list(config.fusion), f"{first} and gate_up among them for {'prefill' if prefill else 'a batch'}")
    if prefill and spec.q_rows % 16:
        yield reject("model.heads", spec.heads, f"such that they have whole runs of 16 columns, each {spec.head_dim}, for prefill")


def _context_problems(spec: ModelSpec, context: int) -> Iterator[Rejection]:
    if not 1 <= context <= spec.max_context + -spec.max_context % KV_BLOCK_ROWS:
        yield reject("context", context, f"from 1 to the model's {spec.max_context} tokens")


def _stage_problems(spec: ModelSpec, config: Config, warps: int) -> Iterator[Rejection]:
    least = least_stage_bytes(spec, warps)
    if config.stage_bytes and config.stage_bytes < least:
        allowed = f"0 or at least {least} bytes ({KV_BLOCK_ROWS} KV rows of head_dim {spec.head_dim} in {spec.dtype}, or a piece a warp)"
        yield reject("kernel_knobs.stage_bytes", config.stage_bytes, allowed)


def _memory_problems(spec: ModelSpec, target: Target, context: int, sequences: int) -> Iterator[Rejection]:
    weights = matrices_bytes(spec)
    kv = 2 * sequences * ELEMENT_BYTES[spec.dtype] * context * spec.kv_rows * spec.layers
    if weights + kv > target.memory_bytes:
        have = f"{target.memory_bytes / 1e9:.1f} GB of memory on {target.name}"
        allowed = f"small enough for weights ({weights / 1e9:.1f} GB) and KV rows ({kv / 1e9:.1f} GB) to fit the {have}"
        yield reject("context", context, allowed)


def _stage_sizes(spec: ModelSpec, config: Config, target: Target, warps: int) -> tuple[int, ...]:
    """Stage sizes in order of preference; a choice that is not automatic has no second."""
    if config.stage_bytes:
        return (stage_bytes_with_scales(spec, config.stage_bytes),)
    least = least_stage_bytes(spec, warps)
    fitting = tuple(size for size in STAGE_CHOICES if size >= least)
    preferred = max(fitting[0], _usual_stage(spec, target))
    smaller = (size for size in reversed(fitting) if size <= 16384 and size < preferred)
    return tuple(stage_bytes_with_scales(spec, size) for size in (preferred, *smaller))


def _usual_stage(spec: ModelSpec, target: Target) -> int:
    """16 KB, or more where that cuts the tile that most products have, 16 rows of `hidden` columns, in two and more is faster.

    Measured at SmolLM2-135M (18 KB) and Qwen3-0.6B (32 KB) on an H200, so for GPUs with its feed (docs/performance-log.md, v10 and v14).
    Quantised tiles are half as large or less.
    """
    tile = TILE_ROWS * spec.hidden * ELEMENT_BYTES[spec.dtype]
    if target.feeds[0] != "bulk" or spec.layer_weights:
        return 16384
    if 16384 < tile <= 20480:
        return 32768
    return 24576 if tile == 32768 else 16384


def splits_of(spec: ModelSpec, config: Config, target: Target, context: int, batch: int) -> tuple[int, ...]:
    """Attention tasks of a KV head of a seat, for each layer."""
    return tuple(_splits(spec, config, target, context, window or 0, batch) for window in spec.windows)


def _splits(spec: ModelSpec, config: Config, target: Target, context: int, window: int, batch: int) -> int:
    """Splits of a KV head: as asked for (or as SMs allow), but no more than ever have rows to stream."""
    most = max(kv_span(p, window, config.kv_block, 1).units for p in range(max(0, context - KV_BLOCK_ROWS), context))
    fitting = [n for n in SPLIT_CHOICES if n * spec.kv_heads * batch <= target.sms]
    wanted = config.kv_splits or max(fitting, default=1)
    return max(1, min(wanted, most))
