"""Measures the published figures on the live card: latency by position, and what each knob does. Writes results/bench-CARD.json.

    python amk_bootstrap.py amk.dev.bench_gpu

Every program is judged by the oracle before it is timed; a row has what the oracle found, the digests and the raw samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amk.dev.provenance import write_results
from amk.eval.bench import launch_start, quantiles, read_bandwidth_gbs, samples_us
from amk.eval.card import choose
from amk.eval.card_lock import live_card_lock
from amk.eval.oracle import judge
from amk.eval.session import Session
from amk.schedule.cost import floor_us, streamed_bytes
from amk.vm.cuda import UnprovenCudaVM

ONE_B, SMOL = "llama-3.2-1b-shape", "smollm2-135m-shape"
POSITIONS = {ONE_B: (16, 128, 1024, 8000), SMOL: (16, 128, 1024)}
CONTEXT = {ONE_B: 9216, SMOL: 4096}
VARIANTS: dict[str, dict[str, Any]] = {
    "sm_assignment=load_balance": {"sm_assignment": "load_balance"},
    "sm_assignment=round_robin": {"sm_assignment": "round_robin"},
    "fusion_grouping=[]": {"fusion_grouping": []},
    "N_tile=128": {"tiling": {"gemv": {"N_tile": 128}}},
    "kv_block=16": {"tiling": {"attention": {"kv_block": 16}}},
    "kv_block=256": {"tiling": {"attention": {"kv_block": 256}}},
    "pipelining_depth=2": {"pipelining_depth": 2},
    "pipelining_depth=4": {"pipelining_depth": 4},
    "pipelining_depth=8": {"pipelining_depth": 8},
    "page_allocation=linear": {"page_allocation": "linear"},
    "threads_per_block=128": {"threads_per_block": 128},
    "smem_bytes_per_block=98304": {"smem_bytes_per_block": 98304},
    "stage_bytes=8192, depth 8": {"kernel_knobs": {"stage_bytes": 8192}, "pipelining_depth": 8},
    "stage_bytes=32768, depth 2": {"kernel_knobs": {"stage_bytes": 32768}, "pipelining_depth": 2},
    "cache_hint=none": {"kernel_knobs": {"cache_hint": "none"}},
    "sync=tags": {"kernel_knobs": {"sync": "tags"}},
    "poll_sleep_ns=100": {"kernel_knobs": {"poll_sleep_ns": 100}},
    "release_early=0": {"kernel_knobs": {"release_early": 0}},
    "release_early=8": {"kernel_knobs": {"release_early": 8}},
    "reduction_slots=8": {"kernel_knobs": {"reduction_slots": 8}},
    "kv_splits=1": {"kernel_knobs": {"kv_splits": 1}},
}


def judged_rows(session: Session, label: str, config: dict[str, Any], positions: tuple[int, ...]) -> list[dict[str, Any]]:
    """One measured line a position, printed as it is made; AssertionError if the program is refused or wrong."""
    candidate = session.prepare(config, CONTEXT[session.model.spec.name])
    assert candidate.program is not None, candidate.rejections
    program = candidate.program.program
    facts, machine = session.load(candidate)
    assert isinstance(machine, UnprovenCudaVM)
    try:
        finding = judge(machine, session.reference(program))
        assert finding.correct, finding.failures
        head: dict[str, Any] = {
            "model": session.model.spec.name, "config": label, "effective": candidate.effective, "correct": finding.correct,
            "tolerance_used": finding.tolerance_used, "schedule_id": facts.schedule_id, "program_digest": facts.program_digest,
            "binary_digest": facts.binary_digest, "arena_bytes": 8 * program.arena_packets, "registers": machine.kernel.binary.registers,
        }  # fmt: skip
        return [head | timed(machine, head["model"], label, position, session.bandwidth()) for position in positions]
    finally:
        machine.close()


def timed(machine: UnprovenCudaVM, name: str, label: str, position: int, bandwidth: float) -> dict[str, Any]:
    start, steps = launch_start(position, machine.context)
    many, single = samples_us(machine, start, steps), samples_us(machine, position, 1)
    median = quantiles(many).p50
    floor = floor_us(machine.program, position, bandwidth)
    print(f"{name:20} {label:28} position {position:5}: {median:7.1f} us, {100 * floor / median:5.1f} % of the plain read", flush=True)
    return {
        "position": position, "latency_us": median, "floor_us": floor, "pct_of_roofline": 100 * floor / median,
        "streamed_bytes": streamed_bytes(machine.program, position), "samples_us": many, "single_launch_samples_us": single,
    }  # fmt: skip


def main() -> None:
    with live_card_lock(print):
        measure_all()


def measure_all() -> None:
    sessions = {name: Session(name, choose(None, "cuda")) for name in POSITIONS}
    latency = [line for name, session in sessions.items() for line in judged_rows(session, "default", {}, POSITIONS[name])]
    cases = [(session, label, config) for session in sessions.values() for label, config in VARIANTS.items()]
    knobs = [line for session, label, config in cases for line in judged_rows(session, label, config, (128,))]
    target = sessions[ONE_B].place.target
    reads = [session.bandwidth() for session in sessions.values()] + [read_bandwidth_gbs(target)]
    write_results(Path("results") / f"bench-{target.name}.json", {"plain_read_gbs": reads, "latency": latency, "knobs": knobs})


if __name__ == "__main__":
    main()
