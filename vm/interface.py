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

        `on_token` hears of each step's token while the launch runs, in order. The launch ends early with the first stop token that no
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
