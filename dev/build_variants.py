"""Builds kernel variants for every architecture without a GPU and reports registers and spills.

A variant is a model shape with a config: together they reach every instruction, element type, head size, warp count and weight feed that
the device code distinguishes. All are built for sm_90a, and those that need most registers or have code of their own for the others too.
Exit code 1 if one does not compile, or spills registers that it should hold.
"""

from __future__ import annotations

import argparse
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
from amk.schedule.settings import STRETCHES, Chooser
from amk.schedule.targets import TARGETS, Target
from amk.vm.build import BuildFailed, compile_kernel
from amk.vm.source import kernel_source

NEW = ("b200", "rtx5090")  # sm_100a, sm_120a
AMPERE = ("a100", "a10g", "l40s")  # sm_80, sm_86, sm_89
OTHERS = (*NEW, "a100", "t4")  # t4: sm_75
EVERYWHERE = (*NEW, *AMPERE, "t4")
UNFUSED: dict[str, Any] = {"fusion_grouping": []}
PLAIN_128: dict[str, Any] = {"threads_per_block": 128, "kernel_knobs": {"cache_hint": "none"}}


@dataclass(frozen=True)
class Variant:
    """A model's dimensions, a config, and how many tokens are computed side by side, as rows of their own or for
    prefill.

    `others` are the cards besides h200 that it is built for. `spills`: it may keep in memory what changes once a task, but nothing
    that its loops touch.
    """

    name: str
    spec: ModelSpec
    config: dict[str, Any]
    others: tuple[str, ...] = ()
    spills: bool = False
    batch: int = 1
    prefill: bool = False
    chooser: Chooser = "greedy"

    def spec_on(self, target: Target) -> ModelSpec:
        """The model in 16-bit elements that the card has."""
        if self.spec.dtype in target.dtypes:
            return self.spec
        layers, head = (w and replace(w, scale="fp16") for w in (self.spec.layer_weights, self.spec.head_weights))
        return replace(self.spec, dtype="fp16", layer_weights=layers, head_weights=head)


def variants() -> list[Variant]:
    one_b, small = describe("llama-3.2-1b-shape"), replace(describe("small"), windows=())
    fp16, fp32 = replace(small, dtype="fp16"), replace(small, dtype="fp32")
    widest = {"int8-asym": OTHERS, "int4-g32-asym": EVERYWHERE, "fp8": OTHERS, "fp8-g128": EVERYWHERE}
    return [
        Variant("llama-3.2-1b", one_b, {}, EVERYWHERE),
        Variant("llama-3.2-1b unfused", one_b, UNFUSED),
        Variant("llama-3.2-1b 128 threads, no hints", one_b, PLAIN_128, OTHERS),
        Variant("llama-3.1-8b", describe("llama-3.1-8b-shape"), {}, (*NEW, *AMPERE)),
        Variant("qwen3-0.6b", describe("qwen3-0.6b-shape"), {}, OTHERS),
        Variant("smollm2-135m", describe("smollm2-135m-shape"), {}, NEW),
        Variant("llama-3.2-1b, draws", one_b, {}, ("a100",), chooser="draw"),
        Variant("llama-3.2-1b, filters", one_b, {}, OTHERS, chooser="filter"),
        Variant("llama-3.2-1b 128 threads, filters", one_b, {"threads_per_block": 128}, chooser="filter"),
        Variant("qwen3-0.6b, filters", describe("qwen3-0.6b-shape"), {}, NEW, chooser="filter"),
        Variant("small fp32, filters", fp32, {}, chooser="filter"),
        Variant("small fp16", fp16, {}, OTHERS),
        Variant("small fp32 unfused", fp32, UNFUSED, OTHERS),
        Variant("small, heads of 80", replace(small, head_dim=80), {}, ("t4",)),
        Variant("small, heads of 256", replace(small, head_dim=256, heads=4, kv_heads=2), {}, OTHERS, spills=True),
        *(Variant(f"llama-3.2-1b, batch {batch}", one_b, {}, NEW, batch=batch) for batch in (8, 16)),
        Variant("llama-3.1-8b, batch 8", describe("llama-3.1-8b-shape"), {}, batch=8),
        Variant("smollm2-135m, batch 8", describe("smollm2-135m-shape"), {}, ("a100",), batch=8),
        Variant("small fp16, batch 16", fp16, {"threads_per_block": 128}, OTHERS, batch=16),
        *(Variant(f"llama-3.2-1b, prefill by {batch}", one_b, {}, batch=batch, prefill=True, spills=batch == 64) for batch in STRETCHES),
        Variant("llama-3.1-8b, prefill by 128", describe("llama-3.1-8b-shape"), {}, batch=128, prefill=True),
        Variant("qwen3-0.6b, prefill by 128", describe("qwen3-0.6b-shape"), {}, ("b200",), batch=128, prefill=True),
        Variant("smollm2-135m, prefill by 64", describe("smollm2-135m-shape"), {}, ("a100",), batch=64, prefill=True),
        Variant(
            "small fp16, prefill by 32, heads of 24", replace(fp16, head_dim=24), {"threads_per_block": 128}, OTHERS, batch=32, prefill=True
        ),
        Variant(
            "small, prefill by 128, heads of 256",
            replace(small, head_dim=256, heads=4, kv_heads=2),
            {},
            batch=128,
            prefill=True,
            spills=True,
        ),
        *(Variant(f"llama-3.2-1b {name}", with_weights(one_b, form), {}, widest.get(name, ())) for name, form in FORMATS.items()),
        Variant("llama-3.2-1b int8, head bf16", replace(with_weights(one_b, FORMATS["int8"]), head_weights=None), {}, NEW),
        Variant(
            "llama-3.2-1b int4-g128, head bf16", replace(with_weights(one_b, FORMATS["int4-g128"]), head_weights=None), {}, ("a100", "t4")
        ),
        Variant("llama-3.2-1b int4-g64-asym 128 thr.", with_weights(one_b, FORMATS["int4-g64-asym"]), {"threads_per_block": 128}),
        Variant("llama-3.1-8b int4-g128", with_weights(describe("llama-3.1-8b-shape"), FORMATS["int4-g128"]), {}),
        Variant("llama-3.1-8b fp8", with_weights(describe("llama-3.1-8b-shape"), FORMATS["fp8"]), {}, ("a100",)),
        Variant("smollm2-135m fp8 128 threads", with_weights(describe("smollm2-135m-shape"), FORMATS["fp8"]), {"threads_per_block": 128}),
        Variant("smollm2-135m int4-g128", with_weights(describe("smollm2-135m-shape"), FORMATS["int4-g128"]), {}),
        Variant("small fp16 int8-asym", with_weights(fp16, FORMATS["int8-asym"]), UNFUSED, ("t4",)),
        Variant("small fp16 int4-g32-asym", with_weights(fp16, FORMATS["int4-g32-asym"]), {}),
        *(Variant(f"llama-3.2-1b {feed}", one_b, {"kernel_knobs": {"weight_feed": feed}}, NEW[:1]) for feed in ("cp_async", "plain")),
    ]


def build(case: tuple[Variant, str]) -> tuple[bool, str]:
    """Whether the variant compiles for the card without spills, and its line of the report."""
    variant, card = case
    target = TARGETS[card]
    config = parse_config(variant.config)
    if isinstance(config, list):
        return False, f"{variant.name}: {config}"
    program = compile_program(
        variant.spec_on(target), config, target, context=4096, chooser=variant.chooser, batch=variant.batch, prefill=variant.prefill
    )
    if isinstance(program, list):
        return False, f"{variant.name} for {card}: {program}"
    try:
        binary = compile_kernel(kernel_source(program), target.arch)
    except BuildFailed as problem:
        return False, f"{variant.name} for {target.arch}: {problem}"
    spills = f"{binary.spill_store_bytes:5} / {binary.spill_load_bytes:5}"
    line = f"{variant.name:36} {target.arch:8} {binary.registers:4} {binary.stack_bytes:6} {spills} {len(binary.cubin) // 1024:6}"
    # A stack frame without spills is an array that is indexed at run time.
    if binary.spill_store_bytes + binary.spill_load_bytes and not variant.spills:
        return False, f"{line}: registers must suffice, but some are spilled"
    return True, line


def main() -> int:
    cases = [(variant, card) for variant in variants() for card in ("h200", *variant.others)]
    print(f"{'variant':36} {'arch':8} {'regs':>4} {'stack':>6} {'spill st / ld':>13} {'KiB':>6}")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(build, cases))
    for ok, line in results:
        print(line if ok else f"FAILED {line}", file=sys.stdout if ok else sys.stderr)
    return 0 if all(ok for ok, _ in results) else 1


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
