"""Whether an NVIDIA card is there, asked without making a CUDA context."""

from __future__ import annotations

import ctypes
import os


def card_count() -> int:
    """NVIDIA cards that the driver lists; 0 without a driver or when CUDA_VISIBLE_DEVICES hides them all."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in ("", "-1"):
        return 0
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() != 0:
        return 0
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return count.value


def visible_cards() -> list[str]:
    """What CUDA_VISIBLE_DEVICES calls each card that this process may use."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = card_count()
    return [str(number) for number in range(found)] if named is None else [name.strip() for name in named.split(",") if found]
