"""Builds every kernel variant for every architecture without a GPU and reports registers and spills.

A variant is a model shape with a config: together they reach every instruction, element type, head size and warp count that the device
code distinguishes. Exit code 1 if one does not compile.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from amk.isa.weight_format import FORMATS
from amk.models.quantised_weights import with_weights
from amk.models.registry import describe
from amk.schedule.compile import compile_program
from amk.schedule.config import parse_config
from amk.schedule.model import ModelSpec
from amk.schedule.settings import Chooser
from amk.schedule.targets import TARGETS
from amk.vm.build import BuildFailed, compile_kernel
from amk.vm.source import kernel_source

CARDS = ("h200", "b200", "rtx5090")  # sm_90a, sm_100a, sm_120a
UNFUSED: dict[str, Any] = {"fusion_grouping": []}


@dataclass(frozen=True)
class Variant:
    """A model's dimensions, a config, and how many tokens are computed side by side."""

    name: str
    spec: ModelSpec
    config: dict[str, Any]
    batch: int = 1
    chooser: Chooser = "greedy"


def variants() -> list[Variant]:
    one_b, small = describe("llama-3.2-1b-shape"), replace(describe("small"), windows=())
    return [
        Variant("llama-3.2-1b", one_b, {}),
        Variant("llama-3.2-1b unfused", one_b, UNFUSED),
        Variant("llama-3.2-1b 128 threads, no hints", one_b, {"threads_per_block": 128, "kernel_knobs": {"cache_hint": "none"}}),
        Variant("llama-3.1-8b", describe("llama-3.1-8b-shape"), {}),
        Variant("qwen3-0.6b", describe("qwen3-0.6b-shape"), {}),
        Variant("smollm2-135m", describe("smollm2-135m-shape"), {}),
        Variant("llama-3.2-1b, draws", one_b, {}, chooser="draw"),
        Variant("llama-3.2-1b, filters", one_b, {}, chooser="filter"),
        Variant("llama-3.2-1b 128 threads, filters", one_b, {"threads_per_block": 128}, chooser="filter"),
        Variant("qwen3-0.6b, filters", describe("qwen3-0.6b-shape"), {}, chooser="filter"),
        Variant("small fp32, filters", replace(small, dtype="fp32"), {}, chooser="filter"),
        Variant("small fp16", replace(small, dtype="fp16"), {}),
        Variant("small fp32 unfused", replace(small, dtype="fp32"), UNFUSED),
        Variant("small, heads of 80", replace(small, head_dim=80), {}),
        Variant("small, heads of 256", replace(small, head_dim=256, heads=4, kv_heads=2), {}),
        *(Variant(f"llama-3.2-1b, batch {batch}", one_b, {}, batch) for batch in (8, 16)),
        Variant("llama-3.1-8b, batch 8", describe("llama-3.1-8b-shape"), {}, 8),
        Variant("smollm2-135m, batch 8", describe("smollm2-135m-shape"), {}, 8),
        Variant("small fp16, batch 16", replace(small, dtype="fp16"), {"threads_per_block": 128}, 16),
        *(Variant(f"llama-3.2-1b {name}", with_weights(one_b, form), {}) for name, form in FORMATS.items()),
        Variant("llama-3.2-1b int8, head bf16", replace(with_weights(one_b, FORMATS["int8"]), head_weights=None), {}),
        Variant("llama-3.2-1b int4-g64-asym 128 thr.", with_weights(one_b, FORMATS["int4-g64-asym"]), {"threads_per_block": 128}),
        Variant("llama-3.1-8b int4-g128", with_weights(describe("llama-3.1-8b-shape"), FORMATS["int4-g128"]), {}),
        Variant("smollm2-135m int4-g128", with_weights(describe("smollm2-135m-shape"), FORMATS["int4-g128"]), {}),
        Variant("small fp16 int8-asym", with_weights(replace(small, dtype="fp16"), FORMATS["int8-asym"]), UNFUSED),
        Variant("small fp16 int4-g32-asym", with_weights(replace(small, dtype="fp16"), FORMATS["int4-g32-asym"]), {}),
    ]


def build(case: tuple[Variant, str]) -> tuple[bool, str]:
    """Whether the variant compiles for the card, and its line of the report."""
    variant, card = case
    target = TARGETS[card]
    config = parse_config(variant.config)
    if isinstance(config, list):
        return False, f"{variant.name}: {config}"
    program = compile_program(variant.spec, config, target, context=4096, chooser=variant.chooser, batch=variant.batch)
    if isinstance(program, list):
        return False, f"{variant.name} for {card}: {program}"
    try:
        binary = compile_kernel(kernel_source(program), target.arch)
    except BuildFailed as problem:
        return False, f"{variant.name} for {target.arch}: {problem}"
    spills = f"{binary.spill_store_bytes:5} / {binary.spill_load_bytes:5}"
    return True, f"{variant.name:36} {target.arch:8} {binary.registers:4} {binary.stack_bytes:6} {spills} {len(binary.cubin) // 1024:6}"


def main() -> int:
    cases = [(variant, card) for variant in variants() for card in CARDS]
    print(f"{'variant':36} {'arch':8} {'regs':>4} {'stack':>6} {'spill st / ld':>13} {'KiB':>6}")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(build, cases))
    for ok, line in results:
        print(line if ok else f"FAILED {line}", file=sys.stdout if ok else sys.stderr)
    return 0 if all(ok for ok, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main())
