"""The reference machine: a program on the CPU, task by task in one legal order, or actor by actor in any order. What a program means."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from amk.isa.instruction import Access, Instruction, Publishes
from amk.isa.machine import Machine
from amk.isa.sampling import GREEDY, Sampling
from amk.schedule.model import WeightSource
from amk.schedule.program import Program
from amk.schedule.proven import ValidProgram
from amk.vm.actors import Launch, unordered
from amk.vm.arena import Arena
from amk.vm.interface import (
    Decoded,
    DecodedBatch,
    LaunchFailed,
    OnStep,
    check_sampling,
    checked_rows,
    require_decoder,
    stretches,
)
from amk.vm.kv import KvRows, plane, require_same_rows
from amk.vm.memory import LaunchInputs, Results, StepMemory, Weights
from amk.vm.order import legal_order
from amk.vm.scheduler import Order, Scheduler

Values: TypeAlias = npt.NDArray[Any]


class UnprovenVM:
    """The reference machine for any program, proven or not: what the validator itself is checked with.

    fp32 arithmetic on values rounded where the device rounds them. Without `order` it runs whole tasks in one legal order, which is
    fast; with one it steps the actors of every SM in that order, adds partial sums as the device does, and finds deadlocks.
    `first_epoch` is the epoch of the first token, for tests near the wrap of the tags. A machine `beside` another has its weights and KV
    rows: one for prefill beside the one that decodes (LaunchFailed if theirs are not the same).
    """

    program: Program
    _weights: Weights
    _kv: KvRows

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        *,
        order: Order | None = None,
        first_epoch: int = 1,
        beside: UnprovenVM | None = None,
    ) -> None:
        if beside is not None:
            require_same_rows(program, beside.program)
        self.program = program
        self.order = order
        self.context, self.batch = program.machine.context, program.machine.batch
        self._weights = beside._weights if beside else Weights(program, source)
        self._kv = beside._kv if beside else KvRows(program)
        self._arena = Arena(program, first_epoch)
        self._tasks: list[Instruction] | None = None

    def seed_kv(self, layer: int, keys: Any, values: Any, row: int = 0) -> None:
        self._kv.seed(plane(self.program, layer, row), keys, values)

    def read_kv(self, layer: int, stop: int, row: int = 0) -> tuple[Any, Any]:
        keys, values = self._kv.read(plane(self.program, layer, row), stop)
        return _as_tensor(keys), _as_tensor(values)

    def decode(
        self,
        tokens: Sequence[int],
        position: int,
        *,
        steps: int | None = None,
        logits: bool = False,
        sampling: Sampling = GREEDY,
        on_token: OnStep | None = None,
    ) -> Decoded:
        check_sampling(self.program, sampling)
        launch = self._inputs(tokens, position, len(tokens) if steps is None else steps, logits)
        launch.sampling = sampling
        launch.on_token = on_token or launch.on_token
        results = self._launch(launch)
        made = results.ended
        rows = None if results.logits is None else results.logits[:made, 0]
        return Decoded(tuple(tokens[0] for tokens in results.tokens[:made]), _as_tensor(rows), None)

    def decode_batch(
        self, tokens: Sequence[Sequence[int]], positions: Sequence[int], *, steps: int | None = None, logits: bool = False
    ) -> DecodedBatch:
        machine = self.program.machine
        every, places, count = checked_rows(machine, tokens, positions, steps)
        results = self._launch(launch_inputs(machine, every, places, count, logits))
        rows = None if results.logits is None else results.logits[:, : len(tokens)]
        chosen = tuple(zip(*results.tokens, strict=True))[: len(tokens)]
        return DecodedBatch(chosen, _as_tensor(rows), None)

    def prefill(self, tokens: Sequence[int], position: int) -> None:
        """vm.interface.PrefillMachine.prefill, for which there is no device's time."""
        machine = self.program.machine
        for own, start in stretches(machine, tokens, position):
            seats = [[token] for token in own] + [[0]] * (machine.batch - len(own))
            self._launch(replace(launch_inputs(machine, seats, [start], 1, logits=False), active=len(own)))

    def _launch(self, launch: LaunchInputs) -> Results:
        epoch = self._arena.begin(launch.steps)
        try:
            if self.order is None:
                self._run_tasks(launch, epoch)
            else:
                Launch(self.program, self._weights, self._kv, self._arena, launch, epoch, Scheduler(self.order)).run()
        except BaseException:  # also one that came from who hears of tokens
            self._arena.zero()
            raise
        if launch.results.ended is not None:
            self._arena.zero()  # as the device does: counters of the token that did not come about are nobody's
        return launch.results

    def close(self) -> None:
        """Gives the weights' memory back; the machine cannot decode afterwards."""
        del self._weights, self._kv, self._arena

    def _inputs(self, tokens: Sequence[int], position: int, steps: int, logits: bool) -> LaunchInputs:
        machine = self.program.machine
        require_decoder(machine, "decode")
        if not tokens:
            raise ValueError("tokens: must hold at least one token, but got none")
        if steps < len(tokens):
            raise ValueError(f"steps: must be at least the number of tokens ({len(tokens)}), but got {steps}")
        if position < 0 or position + steps > self.context:
            raise ValueError(f"position: steps must lie within {self.context} rows, but they go from {position} to {position + steps - 1}")
        for token in tokens:
            if not 0 <= token < machine.vocab:
                raise ValueError(f"tokens: must be from 0 to {machine.vocab - 1}, but got {token}")
        return launch_inputs(machine, [tokens], [position], steps, logits)

    def _run_tasks(self, launch: LaunchInputs, epoch: int) -> None:
        if self._tasks is None:
            self._tasks = legal_order(self.program)
        for step in range(launch.steps):
            memory = SequentialMemory(self.program, self._weights, self._kv, launch, step, self._arena, epoch + step)
            for task in self._tasks:
                for access, values in _joined(task.run(memory, launch.position(self.program, task, step))):
                    self._arena.store(access, values, epoch + step)
            if launch.results.ended is not None:
                return


def launch_inputs(machine: Machine, tokens: Sequence[Sequence[int]], positions: Sequence[int], steps: int, logits: bool) -> LaunchInputs:
    """A launch of checked arguments: tokens and a position for each seat."""
    rows = np.zeros((steps, len(tokens), machine.vocab), dtype=np.float32) if logits else None
    results = Results([[-1] * len(tokens) for _ in range(steps)], rows)
    return LaunchInputs(tuple(map(tuple, tokens)), tuple(positions), steps, results)


class SequentialMemory(StepMemory):
    """Packets come straight from the arena; one without its tag is a hang, or, where no tag is looked at, garbage."""

    def __init__(self, program: Program, weights: Weights, kv: KvRows, launch: LaunchInputs, step: int, arena: Arena, epoch: int) -> None:
        super().__init__(program, weights, kv, launch, step)
        self._arena = arena
        self._epoch = epoch

    def read(self, access: Access) -> Values:
        if not (access.carried and self._step == 0) and not self._arena.holds(access, self._epoch):
            missing = self._arena.describe(access, self._epoch)
            if access.gated:
                raise unordered(missing)
            raise LaunchFailed("timeout", f"a task waits for {missing}, but nobody publishes that")
        return self._arena.load(access)


class ReferenceVM(UnprovenVM):
    """A DecodeMachine on the CPU for proven programs; see UnprovenVM for `order` and `first_epoch`."""

    def __init__(
        self,
        program: ValidProgram,
        source: WeightSource,
        *,
        order: Order | None = None,
        first_epoch: int = 1,
        beside: UnprovenVM | None = None,
    ) -> None:
        super().__init__(program.program, source, order=order, first_epoch=first_epoch, beside=beside)


def _joined(publishes: Publishes) -> Iterator[tuple[Access, Values]]:
    """The publishes of one task with neighbours in a buffer joined: a product of many tiles is stored at once."""
    run: list[Values] = []
    start = 0
    for (access, values), (following, _) in zip(publishes, [*publishes[1:], (None, None)], strict=False):
        start = start if run else access.start
        run.append(values)
        if following is None or not _continues(access, values, following):
            yield replace(access, start=start), np.concatenate(run) if len(run) > 1 else values
            run = []


def _continues(access: Access, values: Values, following: Access) -> bool:
    """Whether `following` begins where `access` ends, with a packet of its own."""
    same = (access.buffer, access.stop, access.tag, access.kind) == (following.buffer, following.start, following.tag, following.kind)
    return same and (access.kind != "narrow" or len(values) % 2 == 0)


def _as_tensor(logits: npt.NDArray[np.float32] | None) -> Any:
    if logits is None:
        return None
    import torch

    return torch.from_numpy(logits)
