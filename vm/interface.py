"""What every machine that runs a proven program offers: the reference machine on the CPU and the CUDA machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


class LaunchFailed(Exception):
    """A launch ended without finishing: `kind` is "timeout" (a wait ran out), "crash" (a CUDA error) or "mismatch" (binary and program)."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Decoded:
    """What a launch of `steps` tokens gives: the token chosen after each step and, where asked for, fp32 logits [steps, vocab].

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

    def decode(self, tokens: Sequence[int], position: int, *, steps: int | None = None, logits: bool = False) -> Decoded:
        """One launch: step i takes tokens[i] where it exists, later steps take the machine's own choice (greedy).

        Step i runs at `position + i` and needs KV rows before it. `steps` defaults to len(tokens), which must be at least 1.
        ValueError if the steps leave the context; LaunchFailed if the launch does not finish.
        """
        ...

    def close(self) -> None: ...
