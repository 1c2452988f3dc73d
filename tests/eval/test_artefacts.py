"""What `compile` leaves behind holds the program: the files alone, with what the kernel's source states, give its queues back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from amk.eval.artefacts import artefact_names, write_artefacts
from amk.eval.candidate import prepare
from amk.eval.card import Place
from amk.models.registry import describe
from amk.schedule.targets import TARGETS
from amk.vm.build import Binary
from amk.vm.image import Image, unpack_program

BINARY = Binary(cubin=b"cubin", digest="0" * 64, registers=1, stack_bytes=0, spill_store_bytes=0, spill_load_bytes=0, cached=False)


def image_of(folder: Path) -> Image:
    """The program's bytes as HARNESS.md describes the files."""
    *_, records, report = artefact_names("sm_90a")
    data, counts = (folder / records).read_bytes(), json.loads((folder / report).read_bytes())["records"]
    at = 0

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        return data[at - size : at]

    tasks = tuple(take(counts["task_bytes"] * count) for count in counts["tasks"])
    streams = tuple(take(2 * count) for count in counts["stream_entries"])
    image = Image(tasks, streams, take(4 * counts["buffers"]))
    assert at == len(data)
    return image


@pytest.mark.parametrize(("config", "batch"), [({}, 1), ({"fusion_grouping": [], "tiling": {"gemv": {"N_tile": 256}}}, 1), ({}, 8)])
def test_the_files_of_compile_give_the_very_program_back(config: dict[str, Any], batch: int, tmp_path: Path) -> None:
    spec = replace(describe("toy"), dtype="bf16")
    candidate = prepare(spec, Place(TARGETS["h200"], "cpu", None), config, batch=batch)
    assert candidate.program is not None
    program = candidate.program.program
    write_artefacts(tmp_path, candidate, "sm_90a", BINARY, {})
    frame = replace(program, queues=(), streams=(), buffers=tuple(replace(buffer, offset=0) for buffer in program.buffers))
    assert unpack_program(image_of(tmp_path), frame) == program
