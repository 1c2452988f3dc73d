"""Wrong machines for the oracle's own tests: each is the reference machine with one thing changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from amk.eval.oracle import Finding, Reference, default_plan, judge, make_reference, rounding_points
from amk.isa.abi import NONE
from amk.isa.attention import Attention
from amk.isa.gemv import Gemv
from amk.isa.instruction import F32, Instruction, Memory
from amk.models.model import Model
from amk.schedule.compile import lower
from amk.schedule.config import parse_config
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec
from amk.schedule.program import Program
from amk.schedule.targets import small_target
from amk.vm.interface import Decoded
from amk.vm.reference import UnprovenVM


@dataclass(frozen=True, eq=False)
class Case:
    """A model with its program for four SMs and the oracle's reference."""

    model: Model
    program: Program
    reference: Reference

    @property
    def spec(self) -> ModelSpec:
        return self.model.spec

    def finding(self, program: Program | None = None, weights: Any = None, wrap: Callable[[UnprovenVM], Any] = lambda vm: vm) -> Finding:
        """What the oracle finds about the program, or about a changed one."""
        return judge(wrap(UnprovenVM(program or self.program, weights or self.model.weights)), self.reference)


def case_of(model: Model, config: dict[str, Any] | None = None, context: int | None = None) -> Case:
    parsed = parse_config(config or {})
    assert isinstance(parsed, Config), parsed
    program = lower(model.spec, parsed, small_target(4), context=context)
    plan = default_plan(model.spec, program.machine.context, "cpu")
    return Case(model, program, make_reference(model.spec, model.eager("fp32"), plan, rounding_points(program)))


@dataclass(frozen=True)
class Noisy:
    """The model's weights with Gaussian noise of `share` of its norm in one tensor; in both uses of a tied one."""

    model: Model
    noisy: str
    share: float = 0.02

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        weight = self.model.weights.tensor(name, device)
        tied = self.model.spec.tied_head and {name, self.noisy} == {"head", "embed"}
        if name != self.noisy and not tied:
            return weight
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(7)).to(device)
        exact = weight.float()
        return (exact + noise * (self.share * exact.norm() / noise.norm())).to(weight.dtype)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        return self.model.weights.rope_table(rows, device)


@dataclass(frozen=True)
class Turned:
    """The model's weights with another RoPE table."""

    model: Model
    change: Callable[[torch.Tensor], torch.Tensor]

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        return self.model.weights.tensor(name, device)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        return self.change(self.model.weights.rope_table(rows, device))


def rope_deleted(table: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.ones_like(table[..., 0]), torch.zeros_like(table[..., 1])], dim=-1)


def rope_of_theta(theta: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def turn(table: torch.Tensor) -> torch.Tensor:
        rows, half = table.shape[:2]
        angles = torch.arange(rows, device=table.device)[:, None] * theta ** (-torch.arange(half, device=table.device) / half)
        return torch.stack([angles.cos(), angles.sin()], dim=-1).float()

    return turn


def rope_late_by_one(table: torch.Tensor) -> torch.Tensor:
    return torch.cat([table[:1], table[:-1]])


def rope_scaled(table: torch.Tensor) -> torch.Tensor:
    """Positions stretched by 2 %: the table of position 1.02 p."""
    angles = torch.atan2(table[..., 1], table[..., 0])
    rates = angles[1]
    stretched = torch.arange(len(table), device=table.device)[:, None] * rates * 1.02
    return torch.stack([stretched.cos(), stretched.sin()], dim=-1)


def change_tasks(program: Program, change: Callable[[Instruction], Instruction]) -> Program:
    return replace(program, queues=tuple(tuple(map(change, queue)) for queue in program.queues))


def drop_residuals(program: Program) -> Program:
    """The output projection of layer 0 (the matrix named in the first product with a residual) adds none."""
    first = min(t.weight for queue in program.queues for t in queue if isinstance(t, Gemv) and t.res_buf != NONE)

    def drop(task: Instruction) -> Instruction:
        return replace(task, res_buf=NONE, res_tag=0) if isinstance(task, Gemv) and task.weight == first else task

    return change_tasks(program, drop)


class LeavesOutTheNewestRow(Attention):
    """A causal mask that is one too strict: the query does not see its own row."""

    def _attend(self, memory: Memory, q: F32, ranges: list[tuple[int, int]]) -> tuple[F32, F32, F32]:
        shorter = [(a, b - 1) if self.split == 0 and i == len(ranges) - 1 and b - a > 1 else (a, b) for i, (a, b) in enumerate(ranges)]
        return super()._attend(memory, q, shorter)


def mask_too_strict(program: Program) -> Program:
    def strict(task: Instruction) -> Instruction:
        return LeavesOutTheNewestRow(**{f.name: getattr(task, f.name) for f in fields(task)}) if isinstance(task, Attention) else task

    return change_tasks(program, strict)


def window_wider(rows: int) -> Callable[[Program], Program]:
    """Sliding windows `rows` rows wider (narrower if negative) than the model's."""

    def widen(task: Instruction) -> Instruction:
        return replace(task, window=task.window + rows) if isinstance(task, Attention) and task.window else task

    return lambda program: change_tasks(program, widen)


@dataclass
class StaleRow:
    """A machine whose KV row `row` of layer 0 holds the row before it."""

    vm: UnprovenVM
    row: int

    @property
    def context(self) -> int:
        return self.vm.context

    def seed_kv(self, layer: int, keys: Any, values: Any) -> None:
        keys, values = keys.clone(), values.clone()
        if layer == 0 and keys.shape[1] > self.row:
            keys[:, self.row], values[:, self.row] = keys[:, self.row - 1], values[:, self.row - 1]
        self.vm.seed_kv(layer, keys, values)

    def read_kv(self, layer: int, stop: int) -> tuple[Any, Any]:
        return self.vm.read_kv(layer, stop)

    def decode(self, tokens: Sequence[int], position: int, *, steps: int | None = None, logits: bool = False) -> Decoded:
        return self.vm.decode(tokens, position, steps=steps, logits=logits)

    def close(self) -> None:
        self.vm.close()
