"""Random small decoders: up to 3 SMs and 6 tasks that together make a token, placed, tagged and synchronised at random but rightly.

Of one token, greedy or with draws, or of a batch (isa/batch.py); where a batch attends, each seat has a task of its own. A few are for
prefill (eval/soundness/random_stretches.py), which have a task a seat in most of their phases: many, but with few orders that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Literal, TypeAlias

from amk.eval.soundness.random_stretches import random_stretch
from amk.isa.abi import NONE
from amk.isa.attention import Attention
from amk.isa.batch import MOST_SEATS, SEAT_BLOCK
from amk.isa.draw import Draw
from amk.isa.draw_head import DrawHead
from amk.isa.embed import Embed
from amk.isa.embed_batch import EmbedBatch
from amk.isa.filter_draw import FilterDraw
from amk.isa.filter_head import TILE_PACKETS, FilterHead
from amk.isa.gemm import Gemm
from amk.isa.gemm_glu import GemmGlu
from amk.isa.gemm_head import GemmHead
from amk.isa.gemv import Gemv
from amk.isa.gemv_glu import HALF, GemvGlu
from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Instruction, Kind
from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, Machine
from amk.isa.matmul import OUT_BY_SEAT, X_BY_SEAT, X_KEPT
from amk.isa.matvec import X_NARROW, X_NORM
from amk.isa.rmsnorm import RmsNorm
from amk.isa.sample import Sample
from amk.isa.sample_batch import SampleBatch
from amk.isa.swiglu import SwiGlu
from amk.schedule.program import Buffer, Constant, DeviceKnobs, KvCache, Matrix, MatVecShape, Program

MAX_TASKS, MAX_SMS = 6, 3
DEVICE = DeviceKnobs(cache_hint="none", sync="counter", poll_sleep_ns=0, release_early=0, weight_feed="bulk")
Maker: TypeAlias = Callable[..., Instruction]
Plan: TypeAlias = tuple[str, ...]
PLANS: tuple[Plan, ...] = (
    ("embed", "head", "sample"),
    ("embed", "gemv", "head", "sample"),
    ("embed", "norm", "head", "sample"),
    ("embed", "residual", "head", "sample"),
    ("embed", "norm", "residual", "head", "sample"),
    ("embed", "gemv", "residual", "head", "sample"),
    ("embed", "glu", "residual", "head", "sample"),
    ("embed", "gate_up", "swiglu", "head", "sample"),
    ("embed", "qkv", "attention", "head", "sample"),
    ("embed", "qkv", "attention", "residual", "head", "sample"),
)
BATCH_PLANS: tuple[Plan, ...] = (  # norms and activations of a batch are parts of its products
    ("embed", "head", "sample"),
    ("embed", "gemv", "head", "sample"),
    ("embed", "residual", "head", "sample"),
    ("embed", "gemv", "residual", "head", "sample"),
    ("embed", "glu", "head", "sample"),
    ("embed", "glu", "residual", "head", "sample"),
)
ATTENDING_BATCH: Plan = ("embed", "qkv", "attention", "head", "sample")
ATTENDING_SHARE = 0.06  # of the batches: they have many more interleavings
STRETCH_SHARE = 0.08
LEAST = {"gate_up": 2}  # tasks that a part of a plan needs, where it is not one


@dataclass(frozen=True)
class Family:
    """The instructions of one kind of program, which take the same words but for what the sample sees: `seen` candidates or tiles."""

    share: int  # in a hundred programs
    embed: Maker = Embed
    product: Maker = Gemv
    glu: Maker = GemvGlu
    head: Maker = GemvHead
    sample: Maker = Sample
    seen: Literal["count", "tiles"] = "count"
    batch: int = 1
    warps: tuple[int, ...] = (1, 2)
    hidden: tuple[int, ...] = (16, 32, 64)  # at most as many as there are gains


def _batches(share: int, seats: int) -> Family:
    return Family(
        share=share,
        embed=partial(EmbedBatch, batch=seats),
        product=partial(Gemm, batch=seats),
        glu=partial(GemmGlu, batch=seats),
        head=partial(GemmHead, batch=seats),
        sample=partial(SampleBatch, batch=seats),
        batch=seats,
    )


FAMILIES = (
    Family(share=50),
    Family(share=16, head=DrawHead, sample=Draw),
    Family(share=16, head=FilterHead, sample=FilterDraw, seen="tiles"),
    _batches(14, SEAT_BLOCK),
    # A consumer has no registers for so much of x, and reads it again for every tile.
    replace(_batches(4, MOST_SEATS), warps=(1,), hidden=(80,)),
)


@dataclass(frozen=True)
class Value:
    """`count` elements (of every seat) from the start of a buffer, published with a tag by tasks that arrive at a counter `arrivals` times
    in all. Where it lies by seat, each seat's part is a buffer of `seats` too.
    """

    buffer: int
    tag: int
    narrow: bool
    count: int
    counter: int
    arrivals: int
    seats: tuple[int, ...] = ()


@dataclass
class Builder:
    """A program as it grows: `tasks` come after what they read."""

    random: Random
    family: Family
    machine: Machine
    tasks: list[Instruction] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)
    matrices: list[Matrix] = field(default_factory=list)
    shapes: list[MatVecShape] = field(default_factory=list)
    packets: int = 0
    counters: int = 0
    tags: int = 0
    used: dict[int, int] = field(default_factory=dict)  # buffer: tags in use
    unique_tags: bool = True

    def buffer(self, kind: Kind, packets: int) -> int:
        """A buffer of `packets` for every seat."""
        self.buffers.append(Buffer(f"b{len(self.buffers)}", kind, self.packets, packets * self.machine.batch))
        self.packets += packets * self.machine.batch
        self.packets += self.packets % 2  # what the device takes in pairs begins at an even packet
        return len(self.buffers) - 1

    def stream(self, count: int) -> tuple[int, bool]:
        """A buffer for what a residual is added to, and whether it is narrow: of a batch."""
        narrow = self.machine.batch > 1
        return (self.buffer("narrow", count // self.machine.narrow) if narrow else self.buffer("f32", count)), narrow

    def seats(self, buffer: int) -> tuple[int, ...]:
        """The buffers of each seat's part of one that lies by seat: of one token the buffer itself."""
        if self.machine.batch == 1:
            return (buffer,)
        whole, first = self.buffers[buffer], len(self.buffers)
        size = whole.packets // self.machine.batch
        self.buffers += [Buffer(f"{whole.name}@{s}", whole.kind, whole.offset + s * size, size) for s in range(self.machine.batch)]
        return tuple(range(first, len(self.buffers)))

    def tag(self, buffer: int) -> int:
        """A tag that no other value of the buffer has."""
        self.used[buffer] = self.used.get(buffer, 0) + 1
        if self.unique_tags:
            self.tags += 1
            return self.tags
        self.tags = max(self.tags, self.used[buffer])
        return self.used[buffer]

    def wait(self, value: Value) -> dict[str, int]:
        """A wait for the value's counter, or now and then none: counters are hints."""
        if self.random.random() < 0.2:
            return {}
        return {"wait_counter": value.counter, "wait_count": value.arrivals}

    def value(self, buffer: int, tag: int, narrow: bool, count: int, tasks: list[Instruction]) -> Value:
        """Adds the tasks that publish a value."""
        done = [replace(task, done_counter=self.counters) for task in tasks]
        self.tasks += done
        self.counters += 1
        return Value(buffer, tag, narrow, count, self.counters - 1, sum(task.arrivals(self.machine) for task in done))

    def matrix(self, rows: int, cols: int, flags: int, gated: bool = False) -> dict[str, int]:
        """The words of a product that name a new matrix (`gated`: gate and up rows, interleaved) and its compiled shape."""
        name = f"m{len(self.matrices)}"
        stacked, gate_up = (
            Matrix(name, (f"{name}.w",), "stack", rows, cols),
            Matrix(name, (f"{name}.gate", f"{name}.up"), "interleave8", rows, cols),
        )
        self.matrices.append(gate_up if gated else stacked)
        shape = MatVecShape(cols, flags)
        if shape not in self.shapes:
            self.shapes.append(shape)
        words = {"weight": len(self.matrices) - 1, "rows": rows, "cols": cols, "flags": flags, "shape": self.shapes.index(shape)}
        return words | {"gain": 0} if flags & X_NORM else words

    def read_x(self, x: Value) -> dict[str, int]:
        normed = self.random.choice((0, X_NORM))
        flags = X_NARROW if x.narrow else normed
        if self.machine.batch > 1:
            flags |= self.random.choice((0, X_KEPT)) | (X_BY_SEAT if x.seats else normed if x.count % TILE_ROWS == 0 else 0)
        return {"x_buf": x.buffer, "x_tag": x.tag, "flags": flags}

    def pieces(self, units: int, wanted: int) -> list[tuple[int, int]]:
        """(first, count) of at most `wanted` contiguous parts of `units`."""
        wanted = min(units, wanted)
        cuts = sorted(self.random.sample(range(1, units), wanted - 1))
        return [(a, b - a) for a, b in zip([0, *cuts], [*cuts, units], strict=True)]


def random_program(random: Random) -> Program:
    """A program that follows the rules unless chance made a bad choice of ring or queue order."""
    if random.random() < STRETCH_SHARE:
        return random_stretch(random)
    (family,) = random.choices(FAMILIES, [family.share for family in FAMILIES])
    plan = _plan(random, family)
    machine = _machine(random, family, "attention" in plan)
    build = Builder(random, family, machine, unique_tags=random.random() < 0.5)
    parts = _shares(random, plan)
    _fill(build, plan, parts)
    return _place(build, random)


def is_small(program: Program) -> bool:
    """Whether it has MAX_TASKS tasks at most, those of attention of a batch counted once; of a stretch, how many does not matter."""
    if program.machine.prefill:
        return True
    attends = program.machine.batch > 1 and program.kv.layers > 0
    return program.task_count <= MAX_TASKS + (SEAT_BLOCK - 1 if attends else 0)


def _plan(random: Random, family: Family) -> Plan:
    if family.batch == 1:
        return random.choice(PLANS)
    attends = family.batch == SEAT_BLOCK and random.random() < ATTENDING_SHARE
    return ATTENDING_BATCH if attends else random.choice(BATCH_PLANS)


def _machine(random: Random, family: Family, attends: bool) -> Machine:
    warps, dtype = random.choice(family.warps), random.choice(("bf16", "bf16", "fp32" if family.batch == 1 else "fp16"))
    stages = random.randint(1, 4)
    element = 4 if dtype == "fp32" else 2
    least = max(FRAGMENT_BYTES * warps, 2 * 16 * 16 * element if attends else 0)
    machine = Machine(
        sms=random.randint(1, MAX_SMS),
        consumer_warps=warps,
        stages=stages,
        stage_bytes=least * random.choice((1, 2)),
        inflight=random.randint(1, stages),
        reduction_slots=random.choice((1, 2)),
        kv_lag=random.choice((1, 2, 16, 17)),
        dtype=dtype,
        hidden=random.choice(family.hidden),
        vocab=random.choice((16, 17, 32, 40)),
        heads=random.choice((1, 2)),
        kv_heads=1,
        head_dim=16,
        rms_eps=1e-5,
        context=random.choice((16, 48, 64)) if attends else 16,
        tags=0,
        batch=family.batch,
    )
    if stages == 1 or random.random() < 0.5:
        return machine
    return replace(machine, throttled=random.randint(1, machine.inflight), watermark=random.randint(1, stages - 1))


def _shares(random: Random, plan: Plan) -> list[int]:
    """How many tasks each part of the plan may become; MAX_TASKS in all at most."""
    parts = [LEAST.get(name, 1) for name in plan]
    for _ in range(random.randint(0, MAX_TASKS - sum(parts))):
        choices = [i for i, name in enumerate(plan) if name not in ("sample", "gate_up")]
        parts[random.choice(choices)] += 1
    return parts


def _fill(build: Builder, plan: Plan, parts: list[int]) -> None:
    token = build.buffer("u32", 1)
    token_tag = build.tag(token)
    makers: dict[str, Callable[[Builder, list[Value], int], Value]] = {
        "norm": _norm,
        "gemv": _gemv,
        "residual": _residual,
        "glu": _glu,
        "gate_up": _gate_up,
        "swiglu": _swiglu,
        "qkv": _qkv,
        "attention": _attention,
        "head": _head,
    }
    values: list[Value] = []
    for name, part in zip(plan, parts, strict=True):
        if name == "embed":
            values.append(_embed(build, token, token_tag, part))
        elif name == "sample":
            values.append(_sample(build, values[-1], token, token_tag))
        else:
            values.append(makers[name](build, values, part))
    _wait_for_token(build, values[-1])


def _wait_for_token(build: Builder, token: Value) -> None:
    """Embed waits for the previous token's sampler, or for nothing."""
    wait = build.wait(token)
    build.tasks = [replace(task, **wait) if task.carried else task for task in build.tasks]


def _embed(build: Builder, token: int, token_tag: int, part: int) -> Value:
    hidden = build.machine.hidden
    out, narrow = build.stream(hidden)
    tag = build.tag(out)
    tasks: list[Instruction] = [
        build.family.embed(token_buf=token, token_tag=token_tag, out_buf=out, out_tag=tag, col0=16 * first, cols=16 * count)
        for first, count in build.pieces(hidden // 16, part)
    ]
    return build.value(out, tag, narrow, hidden, tasks)


def _norm(build: Builder, values: list[Value], part: int) -> Value:
    x = values[-1]
    out = build.buffer("narrow", x.count // build.machine.narrow)
    tag = build.tag(out)
    tasks: list[Instruction] = [
        RmsNorm(x_buf=x.buffer, x_tag=x.tag, out_buf=out, out_tag=tag, cols=x.count, col0=16 * a, count=16 * n, gain=0, **build.wait(x))
        for a, n in build.pieces(x.count // 16, part)
    ]
    return build.value(out, tag, True, x.count, tasks)


def _gemv(build: Builder, values: list[Value], part: int) -> Value:
    """A product of which the next reader may need a part only."""
    whole = _product(build, values[-1], build.random.choice((16, 32, 48)), part)
    left = whole.count - 8
    return replace(whole, count=left) if left > 0 and build.random.random() < 0.2 else whole


def _qkv(build: Builder, values: list[Value], part: int) -> Value:
    """What attention reads: of a batch by seat."""
    by_seat = OUT_BY_SEAT if build.machine.batch > 1 else 0
    out = _product(build, values[-1], (build.machine.heads + 2) * build.machine.head_dim, part, by_seat)
    return replace(out, seats=build.seats(out.buffer))


def _product(build: Builder, x: Value, rows: int, part: int, order: int = 0) -> Value:
    out, narrow = (build.buffer("f32", rows), False) if order else build.stream(rows)
    tag = build.tag(out)
    read = build.read_x(x)
    read["flags"] |= order
    words = build.matrix(rows, x.count, read["flags"]) | read
    tasks: list[Instruction] = [
        build.family.product(out_buf=out, out_tag=tag, tile0=a, tiles=n, **words, **build.wait(x))
        for a, n in build.pieces(rows // TILE_ROWS, part)
    ]
    return build.value(out, tag, narrow, rows, tasks)


def _residual(build: Builder, values: list[Value], part: int) -> Value:
    """A product added to the embedding, into the same packets or into new ones."""
    x, res = values[-1], values[0]
    out = res.buffer if build.random.random() < 0.6 else build.stream(res.count)[0]
    tag = build.tag(out)
    read = build.read_x(x)
    words = build.matrix(res.count, x.count, read["flags"]) | read | {"res_buf": res.buffer, "res_tag": res.tag}
    tasks: list[Instruction] = [
        build.family.product(out_buf=out, out_tag=tag, tile0=a, tiles=n, **words, **build.wait(x))
        for a, n in build.pieces(res.count // TILE_ROWS, part)
    ]
    return build.value(out, tag, res.narrow, res.count, tasks)


def _glu(build: Builder, values: list[Value], part: int) -> Value:
    x, inner = values[-1], build.random.choice((16, 32))
    out = build.buffer("narrow", inner // build.machine.narrow)
    tag = build.tag(out)
    read = build.read_x(x)
    words = build.matrix(2 * inner, x.count, read["flags"], gated=True) | read
    tasks: list[Instruction] = [
        build.family.glu(out_buf=out, out_tag=tag, tile0=a, tiles=n, **words, **build.wait(x)) for a, n in build.pieces(inner // HALF, part)
    ]
    return build.value(out, tag, True, inner, tasks)


def _gate_up(build: Builder, values: list[Value], part: int) -> Value:
    rows = build.random.choice((16, 32))
    _product(build, values[-1], rows, 1)  # gate: the value before the last but one of the tags
    gate = build.tasks[-1]
    assert isinstance(gate, Gemv)
    values.append(Value(gate.out_buf, gate.out_tag, False, rows, gate.done_counter, 1))
    return _product(build, values[-2], rows, 1)


def _swiglu(build: Builder, values: list[Value], part: int) -> Value:
    gate, up = values[-2:]
    out = build.buffer("narrow", up.count // build.machine.narrow)
    tag = build.tag(out)
    words = {"gate_buf": gate.buffer, "gate_tag": gate.tag, "up_buf": up.buffer, "up_tag": up.tag}
    tasks: list[Instruction] = [
        SwiGlu(out_buf=out, out_tag=tag, col0=16 * a, count=16 * n, **words, **build.wait(up))
        for a, n in build.pieces(up.count // 16, part)
    ]
    return build.value(out, tag, True, up.count, tasks)


def _attention(build: Builder, values: list[Value], part: int) -> Value:
    x, machine = values[-1], build.machine
    splits, q_rows = min(part, 2) if machine.batch == 1 else 1, machine.heads * machine.head_dim
    out = build.buffer("narrow", q_rows // machine.narrow)
    tag = build.tag(out)
    words = dict.fromkeys(("q_tag", "k_tag", "v_tag"), x.tag)
    words |= {"k_start": q_rows, "v_start": q_rows + machine.head_dim, "out_tag": tag}
    partials = build.buffer("f32", machine.heads * (machine.head_dim + 2)) if splits > 1 else NONE
    words |= {"part_buf": partials, "part_tag": build.tag(partials) if splits > 1 else 0}
    words |= {"q0": 0, "nq": machine.heads, "kv_head": 0, "splits": splits, "unit_rows": 16}
    words["window"] = build.random.choice((0, 0, 20, 33))
    outs = build.seats(out)
    tasks: list[Instruction] = [
        Attention(q_buf=own, k_buf=own, v_buf=own, out_buf=outs[seat], layer=seat, split=split, **words, **build.wait(x))
        for seat, own in enumerate(x.seats)
        for split in reversed(range(splits))
    ]
    return replace(build.value(out, tag, True, q_rows, tasks), seats=outs)


def _head(build: Builder, values: list[Value], part: int) -> Value:
    x, rows = values[-1], build.machine.vocab
    tiles = -(-rows // TILE_ROWS)
    pieces, by_tile = build.pieces(tiles, part), build.family.seen == "tiles"
    out = build.buffer("u32", TILE_PACKETS * tiles if by_tile else 2 * len(pieces))
    tag = build.tag(out)
    read = build.read_x(x)
    words, pair = build.matrix(rows, x.count, read["flags"]) | read, 2 * build.machine.batch
    tasks: list[Instruction] = [
        build.family.head(out_buf=out, out_tag=tag, tile0=a, tiles=n, out_start=0 if by_tile else pair * i, **words, **build.wait(x))
        for i, (a, n) in enumerate(pieces)
    ]
    return build.value(out, tag, False, tiles if by_tile else len(pieces), tasks)


def _sample(build: Builder, scores: Value, token: int, token_tag: int) -> Value:
    words = {"in_buf": scores.buffer, "in_tag": scores.tag, build.family.seen: scores.count}
    task = build.family.sample(out_buf=token, out_tag=token_tag, **words, **build.wait(scores))
    return build.value(token, token_tag, False, 1, [task])


def _place(build: Builder, random: Random) -> Program:
    machine = replace(build.machine, tags=build.tags)
    queues: list[list[Instruction]] = [[] for _ in range(machine.sms)]
    for task in build.tasks:
        random.choice(queues).append(task)
    sequences = machine.batch if any(isinstance(task, Attention) for task in build.tasks) else 0
    return Program(
        machine=machine,
        device=DEVICE,
        buffers=tuple(build.buffers),
        arena_packets=build.packets,
        matrices=tuple(build.matrices),
        shapes=tuple(build.shapes),
        constants=(Constant("gain", ("g",), "stack", 0, 80),),
        kv=KvCache(sequences, machine.kv_heads, -(-machine.context // 16) * 16),
        counters=tuple(f"c{i}" for i in range(build.counters)),
        queues=tuple(map(tuple, queues)),
        streams=tuple(tuple(i for i, task in enumerate(queue) if task.streamed) for queue in queues),
        scratch_bytes=max(task.shared_bytes(machine) for task in build.tasks),
    )
