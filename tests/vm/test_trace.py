"""The traced build: in no other build is anything of it left, and it is the same machine."""

from __future__ import annotations

import re
from typing import Any

import pytest

from amk.models.registry import describe
from amk.schedule.compile import lower
from amk.schedule.config import parse_config
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.targets import TARGETS
from amk.vm.build import compile_kernel
from amk.vm.source import kernel_source, traced_source

UNFUSED: dict[str, Any] = {"fusion_grouping": [], "kernel_knobs": {"sync": "tags"}}


def program(model: str, config: dict[str, Any]) -> Program:
    parsed = parse_config(config)
    assert isinstance(parsed, Config)
    return lower(describe(model), parsed, TARGETS["h200"], context=1024)


def without_tracing(source: str) -> str:
    """The source as if tracing had never been written: no line with TRACE, no file of it."""
    untraced = re.sub(r"// ---- isa/device/trace\.cuh\n.*?#endif\n", "", source, flags=re.DOTALL)
    return "\n".join(line for line in untraced.splitlines() if "TRACE(" not in line)


@pytest.mark.parametrize(("model", "config"), [("small", {}), ("toy", UNFUSED)])
def test_a_build_without_tracing_is_the_one_that_had_never_heard_of_it(model: str, config: dict[str, Any]) -> None:
    source = kernel_source(program(model, config))
    never = without_tracing(source)
    assert "trace" not in never.lower() and "trace" in source.lower()
    assert compile_kernel(source, "sm_90a").digest == compile_kernel(never, "sm_90a").digest


@pytest.mark.parametrize("arch", ["sm_90a", "sm_100a", "sm_120a"])
def test_the_traced_build_compiles_and_is_another_binary(arch: str) -> None:
    made = program("small", {})
    traced, plain = compile_kernel(traced_source(made, 64), arch), compile_kernel(kernel_source(made), arch)
    assert b"amk_trace_events" in traced.cubin and b"amk_trace" not in plain.cubin
