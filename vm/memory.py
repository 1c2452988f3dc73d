"""What every task may read besides packets: weights, constants, RoPE table, KV rows; and where a token's results go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from amk.isa.instruction import F32, Instruction
from amk.isa.sampling import GREEDY, Sampling
from amk.schedule.model import WeightSource
from amk.schedule.program import Program
from amk.vm.kv import KvRows
from amk.vm.layout import constants, embedding, matrix_rows


class Weights:
    """A program's weights as fp32 arrays, held once; the embedding stays in the checkpoint's dtype."""

    def __init__(self, program: Program, source: WeightSource) -> None:
        self.matrices: list[F32] = [matrix_rows(matrix, source).float().numpy() for matrix in program.matrices]
        self.constants: F32 = constants(program, source).numpy()
        self.rope: F32 = source.rope_table(program.machine.context).numpy()
        self._embed = embedding(program, source)
        self._row: tuple[int, F32] = (-1, np.zeros(0, dtype=np.float32))

    def embedding(self, token: int) -> F32:
        if self._row[0] != token:
            self._row = (token, self._embed[token].float().numpy())
        return self._row[1]


@dataclass
class Results:
    """What the steps of a launch hand to the host: of each step a token, and of a machine of a batch one for each seat; so with logits.

    `ended` is the number of tokens where a stop token ended the launch.
    """

    tokens: list[list[int]]  # [steps][seats]
    logits: F32 | None  # [steps, seats, vocab]
    ended: int | None = None


@dataclass
class LaunchInputs:
    """A launch: the host's tokens of each seat, the position of each seat's first step, the number of steps, how tokens are chosen and who
    hears of them.
    """

    tokens: tuple[tuple[int, ...], ...]  # [seats][steps that the host decides]
    positions: tuple[int, ...]
    steps: int
    results: Results = field(repr=False)
    active: int = 0  # seats of a stretch that hold tokens
    sampling: Sampling = GREEDY
    on_token: Callable[[int, int], None] = field(default=lambda step, token: None, repr=False)

    def forced(self, step: int, seat: int) -> int | None:
        tokens = self.tokens[seat]
        return tokens[step] if step < len(tokens) else None

    def position(self, program: Program, task: Instruction, step: int) -> int:
        """Where a task is at a step: attention at its seat's position; other tasks' work does not depend on it."""
        return self.positions[program.seat_of(task)] + step


class StepMemory:
    """The part of isa.instruction.Memory that no order of tasks changes, for one step of a launch."""

    def __init__(self, program: Program, weights: Weights, kv: KvRows, launch: LaunchInputs, step: int) -> None:
        self.machine = program.machine
        self.sampling = launch.sampling
        self._weights = weights
        self._kv = kv
        self._launch = launch
        self._step = step

    def matrix(self, weight: int) -> F32:
        return self._weights.matrices[weight]

    def constant(self, start: int, count: int) -> F32:
        return self._weights.constants[start : start + count]

    def rope(self, position: int) -> F32:
        angles: F32 = self._weights.rope[position]
        return angles

    def embedding(self, token: int) -> F32:
        return self._weights.embedding(token)

    def kv_rows(self, layer: int, head: int, start: int, stop: int) -> tuple[F32, F32]:
        return self._kv.rows(layer, head, start, stop)

    def write_kv(self, layer: int, head: int, row: int, k: F32, v: F32) -> None:
        self._kv.write(layer, head, row, k, v)

    def write_logits(self, start: int, values: F32, seat: int = 0) -> None:
        if self._launch.results.logits is not None:
            self._launch.results.logits[self._step, seat, start : start + len(values)] = values

    def emit_token(self, token: int, seat: int = 0) -> bool:
        launch, step = self._launch, self._step
        launch.results.tokens[step][seat] = token
        launch.on_token(step, token)
        ends = token in launch.sampling.stop_tokens and launch.forced(step + 1, seat) is None
        if ends:
            launch.results.ended = step + 1
        return ends

    def forced_token(self, seat: int = 0) -> int | None:
        return self._launch.forced(self._step, seat)

    def active(self) -> int:
        return self._launch.active

    def reduced_sums(self) -> tuple[F32, Any] | None:
        return None
