"""What `compile` leaves behind: the program's records, the kernel's source, the cubin and a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amk.eval.candidate import Candidate
from amk.isa.abi import TASK_BYTES
from amk.vm.build import Binary
from amk.vm.image import Image, pack_program
from amk.vm.source import kernel_source


def artefact_names(arch: str) -> tuple[str, str, str, str]:
    """The files of `write_artefacts`: source, binary, records and report."""
    return "megakernel.cu", f"megakernel.{arch}.cubin", "records.bin", "report.json"


def write_artefacts(folder: Path, candidate: Candidate, arch: str, binary: Binary, verdict: dict[str, Any]) -> list[str]:
    """Writes into `folder` (made if missing) and returns the files' paths."""
    assert candidate.program is not None
    program = candidate.program.program
    image = pack_program(program)
    report = {
        "verdict": verdict,
        "config": candidate.effective,
        "arch": arch,
        "registers": binary.registers,
        "stack_bytes": binary.stack_bytes,
        "spill_store_bytes": binary.spill_store_bytes,
        "spill_load_bytes": binary.spill_load_bytes,
        "cubin_digest": binary.digest,
        "records": _counts(image),
    }
    text = json.dumps(report, indent=1) + "\n"
    contents = (kernel_source(program).encode(), binary.cubin, b"".join((*image.tasks, *image.streams, image.buffers)), text.encode())
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / name for name in artefact_names(arch)]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    return list(map(str, paths))


def _counts(image: Image) -> dict[str, Any]:
    """How the records' file is taken apart: tasks of each SM, then stream entries (u16) of each, then offsets of buffers (u32)."""
    return {
        "task_bytes": TASK_BYTES,
        "tasks": [len(tasks) // TASK_BYTES for tasks in image.tasks],
        "stream_entries": [len(entries) // 2 for entries in image.streams],
        "buffers": len(image.buffers) // 4,
    }
