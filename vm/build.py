"""Source to cubin with NVRTC through cuda-core: no host compiler, no GPU needed; cached by content."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PTXAS_LINE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS_LINE = re.compile(r"Used (\d+) registers")


class BuildFailed(Exception):
    """The compiler refused the source: its log. Raised for a bug in device code or a target it cannot compile for."""


@dataclass(frozen=True)
class Binary:
    """A cubin, the SHA-256 of its bytes, and what ptxas reported of it."""

    cubin: bytes
    digest: str
    registers: int
    stack_bytes: int
    spill_store_bytes: int
    spill_load_bytes: int
    cached: bool


def cache_folder() -> Path:
    """Where cubins are kept: $AMK_CACHE/cubin, else ~/.cache/automegakernel/cubin."""
    return Path(os.environ.get("AMK_CACHE") or Path.home() / ".cache" / "automegakernel") / "cubin"


@cache
def compiler_version() -> str:
    """NVRTC's version, part of the cache key. BuildFailed if there is no NVRTC."""
    try:
        from cuda.bindings import nvrtc

        error, major, minor = nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as problem:
        raise BuildFailed(f"NVRTC must be installed (cuda-toolkit[nvrtc]) to build kernels, but it did not load: {problem}") from problem
    return f"{major}.{minor}"


def compile_kernel(source: str, arch: str, name: str = "megakernel", lines: bool = False) -> Binary:
    """The cubin of `source` for `arch` ("sm_90a", "sm_100a", ...), from the cache where it was built before. Raises BuildFailed.

    With `lines` it tells tools which line of `source` an instruction comes from; `name` is the file's name then.
    """
    parts = [source, arch, name, compiler_version(), *(["lines"] if lines else [])]
    key = hashlib.sha256("\x00".join(parts).encode()).hexdigest()
    folder = cache_folder()
    cubin_path, log_path = folder / f"{key}.cubin", folder / f"{key}.log"
    if (kept := _kept(cubin_path, log_path)) is not None:
        return kept
    cubin, log = _compile(source, arch, name, lines)
    built = _binary(cubin, log, cached=False)
    folder.mkdir(parents=True, exist_ok=True)
    _write_whole(log_path, f"{built.digest}\n{log}".encode())
    _write_whole(cubin_path, cubin)
    return built


def _kept(cubin_path: Path, log_path: Path) -> Binary | None:
    """What was built before: None if it is not there, or not with the bytes whose digest begins the log."""
    try:
        cubin, (digest, _, log) = cubin_path.read_bytes(), log_path.read_text().partition("\n")
    except (OSError, ValueError):
        return None
    kept = _binary(cubin, log, cached=True)
    return kept if kept.digest == digest else None


def _compile(source: str, arch: str, name: str, lines: bool) -> tuple[bytes, str]:
    from cuda.core import Program, ProgramOptions

    log = io.StringIO()
    options = ProgramOptions(
        name=name, arch=arch, std="c++17", ptxas_options=["-v"], device_as_default_execution_space=True, lineinfo=lines or None
    )
    try:
        code = Program(source, "c++", options).compile("cubin", logs=log)
    except Exception as problem:  # cuda-core raises its own NVRTCError with the log in its text
        raise BuildFailed(f"{name} for {arch} did not compile: {problem}\n{log.getvalue()}") from problem
    return bytes(code.code), log.getvalue()


def _binary(cubin: bytes, log: str, cached: bool) -> Binary:
    frames = [tuple(map(int, found)) for found in PTXAS_LINE.findall(log)]
    stack, stores, loads = (sum(column) for column in zip(*frames, strict=True)) if frames else (0, 0, 0)
    registers = max(map(int, REGISTERS_LINE.findall(log)), default=0)
    return Binary(cubin, hashlib.sha256(cubin).hexdigest(), registers, stack, stores, loads, cached)


def _write_whole(path: Path, data: bytes) -> None:
    """The file appears with all its bytes or not at all."""
    handle, temporary = tempfile.mkstemp(dir=path.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
