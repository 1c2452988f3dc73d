"""AutoMegaKernel: a decoder model compiled into one persistent CUDA megakernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from amk.harness import evaluate, generate, loop, propose

__all__ = ["evaluate", "generate", "loop", "propose"]


def __getattr__(name: str) -> Any:
    """The harness loads at the first use of a verb: importing one of our packages costs that package alone."""
    if name in __all__:
        from amk import harness

        return getattr(harness, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
