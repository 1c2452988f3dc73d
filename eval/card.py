"""The live card: its facts, asked without making a CUDA context, and the choice of target and device for a request."""

from __future__ import annotations

import os
import subprocess
import uuid
from dataclasses import dataclass
from functools import cache
from typing import Any

from amk.eval.errors import EnvironmentProblem, UsageError
from amk.schedule.targets import TARGETS, Target, card_of, live_target

DEFAULT_GPU = "h200"
DEVICES = ("auto", "cuda", "cpu")


@dataclass(frozen=True)
class Card:
    """The first CUDA device: its driver name, the UUID that no other card has, and its facts as a compile target."""

    device_name: str
    uuid: str
    target: Target


@dataclass(frozen=True)
class Place:
    """What a request compiles for and where it is judged: "cuda" (then `target` is the live card) or "cpu"."""

    target: Target
    device: str
    device_name: str | None


@cache
def live_card() -> Card | None:
    """The live card, or None where there is no driver or no device. Only device attributes are read."""
    try:
        from cuda.bindings import driver

        if driver.cuInit(0)[0] != driver.CUresult.CUDA_SUCCESS or driver.cuDeviceGetCount()[1] < 1:
            return None
        return _read_card(driver)
    except (ImportError, OSError, RuntimeError):
        return None


def _read_card(driver: Any) -> Card:
    device = driver.cuDeviceGet(0)[1]
    names = driver.CUdevice_attribute

    def attribute(name: str) -> int:
        return int(driver.cuDeviceGetAttribute(getattr(names, f"CU_DEVICE_ATTRIBUTE_{name}"), device)[1])

    name = driver.cuDeviceGetName(128, device)[1].split(b"\x00")[0].decode()
    major, minor = attribute("COMPUTE_CAPABILITY_MAJOR"), attribute("COMPUTE_CAPABILITY_MINOR")
    bandwidth = None if card_of(name) else attribute("MEMORY_CLOCK_RATE") * 1e3 * attribute("GLOBAL_MEMORY_BUS_WIDTH") / 8 * 2 / 1e9
    target = live_target(
        name,
        arch=f"sm_{major}{minor}" + ("a" if major >= 9 else ""),
        sms=attribute("MULTIPROCESSOR_COUNT"),
        shared_bytes=attribute("MAX_SHARED_MEMORY_PER_BLOCK_OPTIN"),
        memory_bytes=int(driver.cuDeviceTotalMem(device)[1]),
        clock_mhz=attribute("CLOCK_RATE") // 1000,
        bandwidth_gbs=bandwidth,
    )
    return Card(name, uuid.UUID(bytes=bytes(driver.cuDeviceGetUuid(device)[1].bytes)).hex, target)


def choose(gpu: str | None, device: str) -> Place:
    """The place for `--gpu` and `--device`. UsageError for an unknown name; EnvironmentProblem where the card asked for is not there."""
    if device not in DEVICES:
        raise UsageError(f"device: must be one of {', '.join(DEVICES)}, but got {device!r}")
    if gpu is not None and not (isinstance(gpu, str) and (gpu == "auto" or gpu in TARGETS)):
        raise UsageError(f"gpu: must be one of {', '.join(TARGETS)} or auto, but got {gpu!r}")
    card = live_card()
    if card is None:
        return _without_card(gpu, device)
    if gpu in (None, "auto", card.target.name):
        return Place(card.target, "cpu" if device == "cpu" else "cuda", card.device_name)
    if device == "cuda":
        raise EnvironmentProblem(f"gpu: must be the live card to be measured, but {gpu} was asked for and the card is a {card.device_name}")
    assert gpu is not None
    return Place(TARGETS[gpu], "cpu", None)


def _without_card(gpu: str | None, device: str) -> Place:
    if device == "cuda":
        raise EnvironmentProblem("device cuda: needs an NVIDIA card and its driver, but none was found; use --device cpu")
    if gpu == "auto":
        raise EnvironmentProblem("gpu auto: means the live card, but none was found; name a target such as h200")
    return Place(TARGETS[gpu or DEFAULT_GPU], "cpu", None)


def foreign_processes() -> list[int]:
    """Process ids of other programs with a context on the card; empty where nvidia-smi cannot tell.

    To be asked by a process that has a context itself.
    """
    return others(listed_processes(), os.getpid())


def listed_processes() -> list[int]:
    """Process ids of all programs with a context on the live card, as nvidia-smi lists them; empty where it cannot tell."""
    card = live_card()
    if card is None:
        return []
    # Of this card alone: what runs on the others of the machine does not disturb it.
    command = ["nvidia-smi", f"--id=GPU-{uuid.UUID(card.uuid)}", "--query-compute-apps=pid", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) for line in lines if line.isdigit()]


def others(listed: list[int], own: int) -> list[int]:
    """The processes of a list that are not ours. A container's process may be listed under the host's number: then one of them is ours."""
    return [pid for pid in listed if pid != own] if own in listed else listed[1:]
