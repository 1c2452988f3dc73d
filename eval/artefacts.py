"""What `compile` leaves behind: the program's records, the kernel's source, the cubin and a report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from amk.eval.candidate import Candidate
from amk.vm.build import Binary
from amk.vm.image import pack_program
from amk.vm.source import kernel_source


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
    }
    contents = {
        "megakernel.cu": kernel_source(program).encode(),
        f"megakernel.{arch}.cubin": binary.cubin,
        "records.bin": b"".join(image.tasks),
        "report.json": (json.dumps(report, indent=1) + "\n").encode(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return [str(folder / name) for name in contents]
