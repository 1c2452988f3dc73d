"""Whether a figure is about the program and the kernel as they are now: a digest that is made again from the code at hand."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from functools import cache

from amk.models.registry import describe
from amk.schedule.compile import compile_program
from amk.schedule.digest import program_digest
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.rejection import Rejection
from amk.schedule.targets import TARGETS
from amk.vm.source import kernel_source

COMMENT = re.compile(r"//[^\n]*")


def code_digest(program: Program) -> str:
    """SHA-256 of the program and its kernel's source, comments and spaces left out: equal wherever the same thing is compiled."""
    source = " ".join(COMMENT.sub("", kernel_source(program)).split())
    return hashlib.sha256(f"{program_digest(program)}\n{source}".encode()).hexdigest()


@cache
def present_digest(model: str, card: str, context: int, batch: int = 1, prefill: bool = False) -> str:
    """`code_digest` of a built-in model's default program for a card of the table, as the code at hand has it; empty if it has none."""
    return _digest(compile_program(describe(model), Config(), TARGETS[card], context=context, batch=batch, prefill=prefill))


def config_digest(model: str, config: Config, card: str, context: int, batch: int = 1) -> str:
    """The same of a program with another config."""
    return _digest(compile_program(describe(model), config, TARGETS[card], context=context, batch=batch))


def _digest(program: Program | Sequence[Rejection]) -> str:
    return code_digest(program) if isinstance(program, Program) else ""
