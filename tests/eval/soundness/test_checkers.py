"""The explorer and the trace checker, each on small programs with one planted fault."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from amk.eval.soundness.explorer import explore
from amk.eval.soundness.findings import TooLarge, Unsafe
from amk.eval.soundness.random_programs import DEVICE
from amk.eval.soundness.trace import check_traces
from amk.isa.attention import Attention
from amk.isa.embed import Embed
from amk.isa.gemv import Gemv
from amk.isa.gemv_head import GemvHead
from amk.isa.instruction import Instruction
from amk.isa.machine import Machine
from amk.isa.matvec import X_NARROW
from amk.isa.sample import Sample
from amk.schedule.program import Buffer, Constant, KvCache, Matrix, MatVecShape, Program

Check = Callable[[Program], Unsafe | None]
MACHINE = Machine(
    sms=2,
    consumer_warps=2,
    stages=2,
    stage_bytes=1024,
    inflight=2,
    reduction_slots=1,
    kv_lag=17,
    dtype="bf16",
    hidden=32,
    vocab=32,
    heads=1,
    kv_heads=1,
    head_dim=16,
    rms_eps=1e-5,
    context=16,
    tags=5,
)
TOKEN, HIDDEN, INNER, PAIRS, SPARE = range(5)
BUFFERS = (
    Buffer("token", "u32", 0, 1),
    Buffer("hidden", "f32", 2, 32),
    Buffer("inner", "f32", 34, 32),
    Buffer("pairs", "u32", 66, 4),
    Buffer("spare", "f32", 70, 32),
)
EMBED, UP, DOWN, HEAD, SAMPLE = range(5)  # counters, and the places in `decoder` of the first task of each part


@pytest.fixture(params=["explorer", "trace"])
def check(request: pytest.FixtureRequest) -> Check:
    if request.param == "explorer":
        return lambda program: explore(program, tokens=3)
    return lambda program: check_traces(program, Random(0), tokens=3, orders=8)


def product(kind: type[Gemv] | type[GemvHead], weight: int, x: int, tag: int, **words: Any) -> Instruction:
    return kind(shape=0, flags=0, weight=weight, x_buf=x, x_tag=tag, cols=32, rows=32, **words)


def decoder() -> tuple[list[Instruction], list[Instruction]]:
    """Embed, inner = up(hidden), hidden += down(inner), two tasks of the head, sample; on two SMs."""
    embed = Embed(
        token_buf=TOKEN, token_tag=5, out_buf=HIDDEN, out_tag=1, col0=0, cols=32, wait_counter=SAMPLE, wait_count=2, done_counter=EMBED
    )
    up = product(Gemv, 0, HIDDEN, 1, out_buf=INNER, out_tag=2, tile0=0, tiles=2, wait_counter=EMBED, wait_count=2, done_counter=UP)
    words = {"out_buf": HIDDEN, "out_tag": 3, "res_buf": HIDDEN, "res_tag": 1, "wait_counter": UP, "wait_count": 1, "done_counter": DOWN}
    down = product(Gemv, 1, INNER, 2, tile0=0, tiles=2, **words)
    heads = [
        product(
            GemvHead,
            2,
            HIDDEN,
            3,
            out_buf=PAIRS,
            out_tag=4,
            out_start=2 * i,
            tile0=i,
            tiles=1,
            wait_counter=DOWN,
            wait_count=1,
            done_counter=HEAD,
        )
        for i in range(2)
    ]
    sample = Sample(in_buf=PAIRS, in_tag=4, out_buf=TOKEN, out_tag=5, count=2, wait_counter=HEAD, wait_count=2, done_counter=SAMPLE)
    return [embed, down, heads[0]], [up, heads[1], sample]


def program_of(
    first: list[Instruction], second: list[Instruction], machine: Machine = MACHINE, buffers: tuple[Buffer, ...] = BUFFERS
) -> Program:
    queues = (tuple(first), tuple(second))
    return Program(
        machine=machine,
        device=DEVICE,
        buffers=buffers,
        arena_packets=max(b.offset + b.packets for b in buffers),
        matrices=tuple(Matrix(f"m{i}", (f"w{i}",), "stack", 32, 32) for i in range(3)),
        shapes=(MatVecShape(32, 0),),
        constants=(Constant("gain", ("g",), "stack", 0, 32),),
        kv=KvCache(0, 1, 16),
        counters=("embed", "up", "down", "head", "sample"),
        queues=queues,
        streams=tuple(tuple(i for i, task in enumerate(queue) if task.streamed) for queue in queues),
        scratch_bytes=4096,
    )


def kind_of(found: Unsafe | None) -> str:
    return "safe" if found is None else found.kind


def test_a_decoder_in_order_is_safe(check: Check) -> None:
    assert check(program_of(*decoder())) is None


def test_a_task_ahead_of_what_it_waits_for_on_its_own_sm_is_a_deadlock(check: Check) -> None:
    (embed, down, head0), second = decoder()
    assert kind_of(check(program_of([down, embed, head0], second))) == "deadlock"


def test_queues_that_wait_for_each_other_are_a_deadlock(check: Check) -> None:
    (embed, down, head0), (up, head1, sample) = decoder()
    assert kind_of(check(program_of([embed, head0, down], [up, head1, sample]))) == "deadlock"


def test_a_threshold_above_the_arrivals_is_a_deadlock_and_one_below_is_a_hint_too_early(check: Check) -> None:
    first, (up, head1, sample) = decoder()
    assert kind_of(check(program_of(first, [replace(up, wait_count=3), head1, sample]))) == "deadlock"
    assert check(program_of(first, [replace(up, wait_count=1), head1, sample])) is None


def test_a_carried_threshold_above_the_arrivals_is_a_deadlock_of_the_second_token(check: Check) -> None:
    (embed, down, head0), second = decoder()
    assert kind_of(check(program_of([replace(embed, wait_count=3), down, head0], second))) == "deadlock"


def test_a_ring_of_no_stages_is_a_deadlock(check: Check) -> None:
    assert kind_of(check(program_of(*decoder(), machine=replace(MACHINE, stages=0)))) == "deadlock"
    assert check(program_of(*decoder(), machine=replace(MACHINE, stages=1, inflight=1))) is None


def test_a_slot_overwritten_before_its_reader_is_a_race(check: Check) -> None:
    """Without the residual, down's output may take the place of hidden; but head 1 now reads hidden as embed left it."""
    (embed, down, head0), (up, head1, sample) = decoder()
    late = replace(head1, x_tag=1, wait_counter=EMBED)  # type: ignore[call-arg]
    assert kind_of(check(program_of([embed, down, head0], [up, late, sample]))) == "race"


def test_an_overwrite_that_only_counters_put_after_the_reader_is_a_race(check: Check) -> None:
    """The reader of `hidden` arrives at the counter that the writer waits for, and has the writer check nothing of its own."""
    (embed, down, head0), (up, head1, sample) = decoder()
    reader = replace(head1, x_tag=1, wait_counter=EMBED)  # type: ignore[call-arg]
    patient = replace(down, wait_counter=HEAD, wait_count=1)
    assert kind_of(check(program_of([embed, patient, head0], [up, reader, sample]))) == "race"


def test_program_order_of_one_warp_orders_no_overwrite(check: Check) -> None:
    """Down takes the place of inner after the head that reads it, in one queue; but it checks hidden alone."""

    def queue(out: int) -> list[Instruction]:
        (embed, _, head), (up, late, sample) = decoder()
        reads = replace(head, x_buf=INNER, x_tag=2, wait_counter=UP)  # type: ignore[call-arg]
        down = product(Gemv, 1, HIDDEN, 1, out_buf=out, out_tag=3, tile0=0, tiles=2, done_counter=DOWN)
        return [embed, up, reads, down, replace(late, x_buf=out), sample]  # type: ignore[call-arg]

    assert kind_of(check(program_of(queue(INNER), []))) == "race"
    assert check(program_of(queue(SPARE), [])) is None


def test_an_embedding_that_takes_a_candidate_for_the_token_is_found(check: Check) -> None:
    """Its packets are u32 too, and the first half of the embedding keeps all in order; but a candidate is no row of the table."""
    token, pairs = ({"token_buf": buffer, "token_tag": tag} for buffer, tag in ((TOKEN, 5), (PAIRS, 4)))
    head = product(GemvHead, 0, HIDDEN, 1, out_buf=PAIRS, out_tag=4, tile0=0, tiles=2)
    sample = Sample(in_buf=PAIRS, in_tag=4, out_buf=TOKEN, out_tag=5, count=1)

    def taking(second: dict[str, int]) -> Program:
        embeds = [Embed(**words, out_buf=HIDDEN, out_tag=1, col0=16 * i, cols=16) for i, words in enumerate((token, second))]
        return replace(program_of([*embeds, head, sample], []), matrices=(Matrix("m0", ("w0",), "stack", 32, 32),))

    assert check(taking(token)) is None
    assert kind_of(check(taking(pairs))) == "kind"


def test_an_unchecked_read_is_a_race(check: Check) -> None:
    first, (up, head1, sample) = decoder()
    assert kind_of(check(program_of(first, [replace(up, x_tag=0), head1, sample]))) == "race"  # type: ignore[call-arg]


def test_two_writers_that_nothing_orders_are_a_race(check: Check) -> None:
    """The candidates may take the place of inner once it is dead; a head that does not wait for that may not."""
    shifted = tuple(replace(b, offset=34) if b.name == "pairs" else b for b in BUFFERS)
    assert check(program_of(*decoder(), buffers=shifted)) is None  # inner is dead when the candidates come
    (embed, down, head0), (up, head1, sample) = decoder()
    early = replace(head1, x_tag=1, wait_counter=EMBED)  # type: ignore[call-arg]
    separate = [embed, replace(down, out_buf=SPARE, out_tag=3), replace(head0, x_buf=SPARE)]  # type: ignore[call-arg]
    assert kind_of(check(program_of(separate, [up, early, sample], buffers=shifted))) in ("race", "deadlock")  # a run may hang on it


def test_packets_that_nobody_reads_may_not_be_overwritten_by_another_task(check: Check) -> None:
    """Down reads half of what up publishes; the other half may still be on its way when embed takes its place."""
    (embed, down, head0), (up, head1, sample) = decoder()
    shapes = (MatVecShape(32, 0), MatVecShape(16 + 8, 0))
    half = replace(down, cols=24, shape=1)  # type: ignore[call-arg]
    matrices = tuple(Matrix(f"m{i}", (f"w{i}",), "stack", 32, 24 if i == 1 else 32) for i in range(3))
    apart = replace(program_of([embed, half, head0], [up, head1, sample]), shapes=shapes, matrices=matrices)
    assert check(apart) is None
    inside = tuple(replace(b, offset=34 + 26) if b.name == "pairs" else b for b in BUFFERS)
    assert kind_of(check(replace(apart, buffers=inside))) == "race"


def test_a_stream_in_another_order_than_its_queue_takes_wrong_chunks(check: Check) -> None:
    program = program_of(*decoder())
    assert kind_of(check(replace(program, streams=((2, 1), program.streams[1])))) == "ring"


def test_a_stream_that_lacks_a_task_never_feeds_it(check: Check) -> None:
    program = program_of(*decoder())
    assert kind_of(check(replace(program, streams=((1,), program.streams[1])))) in ("ring", "deadlock")


def test_a_tag_that_nobody_publishes_is_found(check: Check) -> None:
    first, (up, head1, sample) = decoder()
    assert kind_of(check(program_of(first, [replace(up, x_tag=2), head1, sample]))) in ("coverage", "deadlock")  # type: ignore[call-arg]


def test_a_packet_published_twice_with_one_tag_is_found(check: Check) -> None:
    first, (up, head1, sample) = decoder()
    twice = replace(head1, out_start=0)  # type: ignore[call-arg]
    assert kind_of(check(program_of(first, [up, twice, sample]))) in ("coverage", "deadlock")


def test_the_last_packet_of_a_buffer_is_legal_and_the_next_one_is_not(check: Check) -> None:
    assert check(program_of(*decoder())) is None
    shorter = tuple(replace(b, packets=3) if b.name == "pairs" else b for b in BUFFERS)
    assert kind_of(check(program_of(*decoder(), buffers=shorter))) == "bounds"


def attending(**sizes: int) -> Program:
    """Embed, q, k and v, one attention task, the head, sample."""
    machine = replace(MACHINE, context=48, stage_bytes=2048, **sizes)  # type: ignore[arg-type]
    embed = Embed(token_buf=0, token_tag=1, out_buf=1, out_tag=1, col0=0, cols=32)
    qkv = Gemv(shape=0, flags=0, weight=0, x_buf=1, x_tag=1, out_buf=2, out_tag=1, tile0=0, tiles=3, cols=32, rows=48)
    words = {
        "q_buf": 2,
        "q_tag": 1,
        "k_buf": 2,
        "k_tag": 1,
        "v_buf": 2,
        "v_tag": 1,
        "k_start": 16,
        "v_start": 32,
        "part_buf": 0,
        "part_tag": 0,
    }
    attention = Attention(**words, out_buf=3, out_tag=1, layer=0, q0=0, nq=1, kv_head=0, split=0, splits=1, unit_rows=16)
    head = GemvHead(shape=1, flags=X_NARROW, weight=1, x_buf=3, x_tag=1, out_buf=4, out_tag=1, tile0=0, tiles=2, cols=16, rows=32)
    sample = Sample(in_buf=4, in_tag=1, out_buf=0, out_tag=1, count=1)
    buffers = (BUFFERS[0], BUFFERS[1], Buffer("qkv", "f32", 34, 48), Buffer("out", "narrow", 82, 8), Buffer("pairs", "u32", 90, 2))
    return replace(
        program_of([embed, qkv, sample], [attention, head], machine, buffers),
        matrices=(Matrix("qkv", ("qkv",), "stack", 48, 32), Matrix("head", ("head",), "stack", 32, 16)),
        shapes=(MatVecShape(32, 0), MatVecShape(16, X_NARROW)),
        kv=KvCache(1, 1, 48),
    )


def test_rows_streamed_a_token_too_early_are_a_race(check: Check) -> None:
    assert check(attending(kv_lag=17)) is None
    assert kind_of(check(attending(kv_lag=18))) == "race"


def test_a_feeder_that_waits_for_the_end_of_its_own_token_is_a_deadlock(check: Check) -> None:
    assert check(attending(kv_lag=1)) is None
    assert kind_of(check(attending(kv_lag=0))) == "deadlock"


def test_rows_past_the_cache_are_out_of_bounds(check: Check) -> None:
    assert kind_of(check(replace(attending(), kv=KvCache(1, 1, 32)))) == "bounds"


def test_a_row_appended_by_two_tasks_is_found(check: Check) -> None:
    program = attending()
    first, (attention, head) = program.queues
    twice = replace(program, queues=(first, (attention, attention, head)), streams=(program.streams[0], (0, 1, 2)))
    assert kind_of(check(twice)) == "coverage"


def test_the_explorer_gives_up_rather_than_guess() -> None:
    with pytest.raises(TooLarge):
        explore(program_of(*decoder()), tokens=3, max_states=2)
