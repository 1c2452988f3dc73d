"""Real lowerings of tiny models on a few SMs, over the knobs that shape a program."""

from __future__ import annotations

from functools import cache
from random import Random

from amk.isa.batch import SEAT_BLOCK
from amk.schedule.compile import compile_program
from amk.schedule.knobs import FUSIONS, Config
from amk.schedule.model import DType, ModelSpec
from amk.schedule.program import Program
from amk.schedule.settings import Chooser
from amk.schedule.targets import small_target

VARIANTS = 256  # lowerings that mutants are made of
BATCH_EVERY = 8  # one in so many is of a batch, and as many are for prefill
OF_BATCH, OF_PREFILL = BATCH_EVERY - 1, BATCH_EVERY // 2 - 1  # which ones
STRETCH = 32  # seats: more only make more tasks of the same
LAYERS, LAYERS_PREFILL = (1, 1, 2), (1, 2, 2)  # of the last layer a program for prefill has the KV rows alone


def random_lowering(random: Random) -> Program:
    """One of VARIANTS lowerings."""
    return lowering(random.randrange(VARIANTS))


@cache
def lowering(variant: int) -> Program:
    """The program of a model and a config that follow from `variant`; a config that the model rejects gives way to the next."""
    random = Random(f"lowering/{variant}")
    turn = variant % BATCH_EVERY
    batch, prefill = (SEAT_BLOCK, False) if turn == OF_BATCH else (STRETCH, True) if turn == OF_PREFILL else (1, False)
    while True:
        model, config, target = _model(random, LAYERS_PREFILL if prefill else LAYERS), _config(random), small_target(random.randint(2, 8))
        chooser = random.choice(CHOOSERS) if batch == 1 else "greedy"
        program = compile_program(model, config, target, context=None, chooser=chooser, batch=batch, prefill=prefill)
        if isinstance(program, Program):
            return program


def _model(random: Random, depths: tuple[int, ...]) -> ModelSpec:
    layers, dtype = random.choice(depths), random.choice(DTYPES)
    return ModelSpec(
        name="tiny",
        family="llama",
        dtype=dtype,
        hidden=64,
        layers=layers,
        heads=4,
        kv_heads=random.choice((1, 2, 4)),
        head_dim=16,
        intermediate=random.choice((64, 128)),
        vocab=random.choice((48, 50, 96)),
        rms_eps=1e-5,
        max_context=random.choice((16, 64, 96)),
        qkv_bias=random.random() < 0.25,
        qk_norm=random.random() < 0.25,
        windows=tuple(random.choice((None, None, 40)) for _ in range(layers)),
    )


DTYPES: tuple[DType, ...] = ("bf16", "bf16", "fp32")
CHOOSERS: tuple[Chooser, ...] = ("greedy", "draw", "filter")


def _config(random: Random) -> Config:
    return Config(
        n_tile=random.choice((16, 32)),
        kv_block=random.choice((16, 32)),
        fusion=tuple(name for name in FUSIONS if random.random() < 0.7),
        sm_assignment=random.choice(("contiguous", "round_robin", "load_balance")),
        pipelining_depth=random.randint(1, 4),
        page_allocation=random.choice(("graph_color", "graph_color", "linear")),
        threads_per_block=random.choice((128, 256)),
        smem_bytes_per_block=random.choice((0, 32768)),
        stage_bytes=random.choice((0, 8192)),
        sync=random.choice(("counter", "counter", "tags")),
        kv_splits=random.choice((0, 1, 2)),
        throttled_depth=random.choice((0, 1, 2)),
        high_watermark=random.choice((0, 1, 3)),
    )
