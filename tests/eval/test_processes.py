"""Processes of ours start from any script, with a `__main__` guard or without one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from amk.eval.processes import own_context

VERIFY = "from amk import harness\nprint(harness.verify(programs=60, mutants=0)['passed'])"
WORKER = """
from amk.eval.candidate import prepare
from amk.eval.card import Place
from amk.eval.worker import Request, Worker
from amk.models.registry import describe
from amk.schedule.targets import TARGETS
place = Place(TARGETS["h200"], "cpu", None)
found = Worker.shared().call(Request("evaluate", "toy", place, prepare(describe("toy"), place, {})), lambda *_: None)
print(found["correct"])
"""


@pytest.mark.parametrize("body", [VERIFY, WORKER])
def test_a_script_without_a_guard_is_run_once(tmp_path: Path, body: str) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"print('begun', flush=True)\n{body}\n")
    ran = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert (ran.stdout.split(), ran.stderr) == (["begun", "True"], "")


def test_main_is_what_it_was_whichever_threads_started_processes() -> None:
    main, context = sys.modules["__main__"], own_context()
    processes = [context.Process(target=os.getpid) for _ in range(4)]
    threads = [threading.Thread(target=process.start) for process in processes]
    for thread in threads:
        thread.start()
    for thread, process in zip(threads, processes, strict=True):
        thread.join()
        process.join()
    assert sys.modules["__main__"] is main and [process.exitcode for process in processes] == [0] * 4
