"""AutoMegaKernel: a decoder model compiled into one persistent CUDA megakernel."""

from typing import Any

__all__ = ["evaluate", "generate", "loop", "propose"]


def __getattr__(name: str) -> Any:
    """The harness's verbs, imported when first asked for: `import amk` stays cheap."""
    if name not in __all__:
        raise AttributeError(f"module 'amk' has no attribute {name!r}")
    from amk import harness

    return getattr(harness, name)
