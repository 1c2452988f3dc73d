"""Measures the published figures on the live card: latency by position, and what each knob does. Writes results/bench-CARD.json.

    python amk_bootstrap.py amk.dev.bench_gpu

Every row has the program's and the binary's digest and its raw samples; correctness is `make gpu`'s business and the harness's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amk.dev.provenance import write_results
from amk.eval.bench import launch_start, read_bandwidth_gbs, samples_us
from amk.eval.card import live_card
from amk.models.registry import resolve
from amk.schedule.compile import lower
from amk.schedule.config import parse_config
from amk.schedule.cost import floor_us, streamed_bytes
from amk.schedule.digest import program_digest, schedule_id
from amk.schedule.knobs import Config
from amk.schedule.targets import Target
from amk.schedule.validate import ValidProgram, validate
from amk.vm.cuda import CudaVM, UnprovenCudaVM

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
    "pipelining_depth=3": {"pipelining_depth": 3},
    "pipelining_depth=8": {"pipelining_depth": 8},
    "page_allocation=linear": {"page_allocation": "linear"},
    "threads_per_block=128": {"threads_per_block": 128},
    "smem_bytes_per_block=98304": {"smem_bytes_per_block": 98304},
    "stage_bytes=8192, depth 8": {"kernel_knobs": {"stage_bytes": 8192}, "pipelining_depth": 8},
    "stage_bytes=32768, depth 2": {"kernel_knobs": {"stage_bytes": 32768}, "pipelining_depth": 2},
    "cache_hint=none": {"kernel_knobs": {"cache_hint": "none"}},
    "sync=tags": {"kernel_knobs": {"sync": "tags"}},
    "poll_sleep_ns=100": {"kernel_knobs": {"poll_sleep_ns": 100}},
    "unroll=8": {"kernel_knobs": {"unroll": 8}},
    "reduction_slots=8": {"kernel_knobs": {"reduction_slots": 8}},
    "kv_splits=1": {"kernel_knobs": {"kv_splits": 1}},
}


def machine(target: Target, name: str, config: dict[str, Any]) -> UnprovenCudaVM:
    model, parsed = resolve(name), parse_config(config)
    assert isinstance(parsed, Config), parsed
    valid = validate(lower(model.spec, parsed, target, context=CONTEXT[name]))
    assert isinstance(valid, ValidProgram), valid
    return CudaVM(valid, model.weights, arch=target.arch)


def row(vm: UnprovenCudaVM, name: str, label: str, position: int, bandwidth: float) -> dict[str, Any]:
    """One measured line, printed as it is made."""
    start, steps = launch_start(position, vm.context)
    many, single = samples_us(vm, start, steps), samples_us(vm, position, 1)
    median = sorted(many)[len(many) // 2]
    floor = floor_us(vm.program, position, bandwidth)
    print(f"{name:20} {label:28} position {position:5}: {median:7.1f} us, {100 * floor / median:5.1f} % of the plain read", flush=True)
    return {
        "model": name, "config": label, "position": position, "latency_us": median, "floor_us": floor,
        "pct_of_roofline": 100 * floor / median, "streamed_bytes": streamed_bytes(vm.program, position),
        "samples_us": many, "single_launch_samples_us": single, "schedule_id": schedule_id(vm.program),
        "program_digest": program_digest(vm.program), "binary_digest": vm.kernel.binary.digest,
        "arena_bytes": 8 * vm.program.arena_packets, "registers": vm.kernel.binary.registers,
    }  # fmt: skip


def rows(target: Target, name: str, label: str, config: dict[str, Any], positions: tuple[int, ...], bandwidth: float) -> list[dict[str, Any]]:
    vm = machine(target, name, config)
    try:
        return [row(vm, name, label, position, bandwidth) for position in positions]
    finally:
        vm.close()


def main() -> None:
    card = live_card()
    assert card is not None, "a card is what this script measures"
    target = card.target
    bandwidth = read_bandwidth_gbs(target)
    print(f"plain read: {bandwidth:.0f} GB/s", flush=True)
    latency = [line for name, positions in POSITIONS.items() for line in rows(target, name, "default", {}, positions, bandwidth)]
    cases = [(name, label, config) for name in POSITIONS for label, config in VARIANTS.items()]
    knobs = [line for name, label, config in cases for line in rows(target, name, label, config, (128,), bandwidth)]
    after = read_bandwidth_gbs(target)
    results = {"plain_read_gbs": [bandwidth, after], "latency": latency, "knobs": knobs}
    write_results(Path("results") / f"bench-{target.name}.json", results)


if __name__ == "__main__":
    main()
