"""Binaries that were built before are taken from the cache, whole, or built again."""

from __future__ import annotations

from pathlib import Path

import pytest

from amk.vm.build import cache_folder, compile_kernel

SOURCE = 'extern "C" __global__ void nothing() {}'


@pytest.mark.parametrize("spoil", [lambda data: b"", lambda data: data[:-1], lambda data: data[:100] + b"x" + data[101:]])
@pytest.mark.parametrize("suffix", [".cubin", ".log"])
def test_a_binary_that_the_cache_holds_in_part_is_built_again(
    suffix: str, spoil: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AMK_CACHE", str(tmp_path))
    built = compile_kernel(SOURCE, "sm_90a")
    assert (built.cached, compile_kernel(SOURCE, "sm_90a").cached) == (False, True)
    (kept,) = cache_folder().glob(f"*{suffix}")
    kept.write_bytes(spoil(kept.read_bytes()) if suffix == ".cubin" else b"")  # type: ignore[operator]
    again = compile_kernel(SOURCE, "sm_90a")
    assert (again.cached, again.cubin, again.registers) == (False, built.cubin, built.registers)
    assert compile_kernel(SOURCE, "sm_90a").cached
