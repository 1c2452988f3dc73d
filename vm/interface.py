"""What every machine that runs a proven program offers: the reference machine on the CPU and the CUDA machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from amk.isa.filter_draw import FilterDraw
from amk.isa.sampling import GREEDY, Sampling
from amk.schedule.program import Program

OnStep: TypeAlias = Callable[[int, int], None]  # step of the launch, token chosen in it


class LaunchFailed(Exception):
    """A launch ended without finishing: `kind` is "timeout" (a wait ran out), "crash" (a CUDA error) or "mismatch" (binary and program)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Decoded:
    """What a launch gives: the token chosen after each step and, where asked for, fp32 logits [steps, vocab].

    There are fewer tokens than steps were asked for where the last one is a stop token.

    Logits are torch tensors on the CPU. `elapsed_us` is the device's time for the launch, None where there is no device.
    """

    tokens: tuple[int, ...]
    logits: Any | None
    elapsed_us: float | None


@dataclass(frozen=True)
class DecodedBatch:
    """What a launch gives for each row of a batch: `tokens` [rows][steps], and where asked for fp32 logits [steps, rows, vocab]."""

    tokens: tuple[tuple[int, ...], ...]
    logits: Any | None
    elapsed_us: float | None


class BatchMachine(Protocol):
    """A program of a batch loaded with weights: up to `batch` rows, each a sequence with a position and KV rows of its own."""

    context: int
    batch: int

    def seed_kv(self, layer: int, keys: Any, values: Any, row: int = 0) -> None: ...

    def read_kv(self, layer: int, stop: int, row: int = 0) -> tuple[Any, Any]: ...

    def decode_batch(
        self, tokens: Sequence[Sequence[int]], positions: Sequence[int], *, steps: int | None = None, logits: bool = False
    ) -> DecodedBatch:
        """One launch: step i of row r takes tokens[r][i] where it exists, later steps take the row's own choice (greedy).

        Row r runs at positions[r] + i. Rows of the batch that are not given run idle from position 0: their KV rows are lost. `steps`
        defaults to the most tokens of a row. ValueError for no row or too many, a row without a token, and steps that leave the
        context; LaunchFailed if the launch does not finish.
        """
        ...

    def close(self) -> None: ...


class PrefillMachine(Protocol):
    """A program for prefill loaded with weights: it makes the KV rows of a sequence's tokens, a stretch of up to `batch` in a launch."""

    context: int
    batch: int

    def prefill(self, tokens: Sequence[int], position: int) -> float | None:
        """Makes the KV rows of tokens[i] at `position + i`, stretch after stretch; needs those before `position`.

        Returns the device's microseconds from the first launch to the end of the last, None where there is no device. ValueError for no
        token, tokens that do not exist, and positions that leave the context; LaunchFailed if a launch does not finish.
        """
        ...

    def close(self) -> None: ...


def stretches(machine: Any, tokens: Sequence[int], position: int) -> list[tuple[list[int], int]]:
    """The tokens and the position of each stretch. ValueError as `PrefillMachine.prefill` says. `machine` is the isa.machine.Machine."""
    if not machine.prefill:
        raise ValueError("prefill: must be asked of a program for prefill, but this one decodes")
    if not tokens:
        raise ValueError("prefill: must have at least one token, but got none")
    if position < 0 or position + len(tokens) > machine.context:
        last = position + len(tokens) - 1
        raise ValueError(f"prefill: must stay in positions 0..{machine.context - 1}, but goes from {position} to {last}")
    bad = [token for token in tokens if not 0 <= token < machine.vocab]
    if bad:
        raise ValueError(f"prefill: tokens must lie in 0..{machine.vocab - 1}, but one is {bad[0]}")
    return [(list(tokens[at : at + machine.batch]), position + at) for at in range(0, len(tokens), machine.batch)]


def require_decoder(machine: Any, name: str) -> None:
    """ValueError where the program is for prefill: it has no logits and no step after the first."""
    if machine.prefill:
        raise ValueError(f"{name}: must be asked of a program that decodes, but this one is for prefill")


def checked_rows(
    machine: Any, tokens: Sequence[Sequence[int]], positions: Sequence[int], steps: int | None
) -> tuple[list[tuple[int, ...]], list[int], int]:
    """Tokens and positions of every row of the batch, idle ones included, and the number of steps. ValueError as `decode_batch` says.

    `machine` is the program's isa.machine.Machine.
    """
    require_decoder(machine, "decode_batch")
    if not 1 <= len(tokens) <= machine.batch or len(positions) != len(tokens):
        got = f"{len(tokens)} rows of tokens and {len(positions)} positions"
        raise ValueError(f"decode_batch: must have 1 to {machine.batch} rows, each with a position, but got {got}")
    count = max(map(len, tokens)) if steps is None else steps
    for row, (given, position) in enumerate(zip(tokens, positions, strict=True)):
        if not 1 <= len(given) <= count:
            raise ValueError(f"decode_batch: row {row} must have 1 to {count} tokens for {count} steps, but has {len(given)}")
        if position < 0 or position + count > machine.context:
            last = position + count - 1
            raise ValueError(f"decode_batch: row {row} must stay in positions 0..{machine.context - 1}, but goes from {position} to {last}")
        bad = [token for token in given if not 0 <= token < machine.vocab]
        if bad:
            raise ValueError(f"decode_batch: row {row}: tokens must lie in 0..{machine.vocab - 1}, but one is {bad[0]}")
    idle = machine.batch - len(tokens)
    return [*map(tuple, tokens), *[(0,)] * idle], [*positions, *[0] * idle], count


class DecodeMachine(Protocol):
    """A program loaded with weights. Positions are 0-based rows of the KV cache."""

    context: int

    def seed_kv(self, layer: int, keys: Any, values: Any) -> None:
        """Sets KV rows 0..n-1 of a layer: tensors [kv_heads, n, head_dim], K after norm and RoPE."""
        ...

    def read_kv(self, layer: int, stop: int) -> tuple[Any, Any]:
        """KV rows 0..stop-1 of a layer, in the form of `seed_kv`: fp32 tensors on the CPU. ValueError where there are none."""
        ...

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
        """One launch: step i takes tokens[i] where it exists, later steps take the machine's own choice, made as `sampling` says.

        `on_token` hears of each step's token while the launch runs, in order; what it raises comes through when the launch has
        ended, and the machine can decode again. The launch ends early with the first stop token that no
        token of the host follows.

        Step i runs at `position + i` and needs KV rows before it. `steps` defaults to len(tokens), which must be at least 1.
        ValueError if the steps leave the context, or the program cannot choose as asked (`check_sampling`).
        LaunchFailed if the launch does not finish.
        """
        ...

    def close(self) -> None: ...


def check_sampling(program: Program, sampling: Sampling) -> None:
    """ValueError for values that mean nothing, or that the program has no instructions for."""
    problems = list(sampling.problems())
    if problems:
        raise ValueError("; ".join(problems))
    filters = any(isinstance(task, FilterDraw) for queue in program.queues for task in queue)
    if sampling.filters and not filters:
        raise ValueError(f"sampling: must have no filters for a program that is not compiled for them, but got {sampling}")
    if (sampling.temperature > 0 or sampling.stop_tokens) and not program.draws:
        raise ValueError(f"sampling: must be greedy and without stop tokens for a program compiled for that, but got {sampling}")
