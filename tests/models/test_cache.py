"""A cached folder is complete or absent, whoever dies while it is made."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from amk.models.cache import cache_root, published
from amk.vm.build import cache_folder


def write(folder: Path, text: str = "whole") -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text(text)


def content(folder: Path) -> str:
    return (folder / "inner" / "file").read_text()


def build_half(target: Path, ready: Connection) -> None:
    """A process that has half built a folder, says so, and waits to be killed."""

    def make(folder: Path) -> None:
        write(folder, "half")
        ready.send("half")
        signal.pause()

    published(target, make)


def build_counted(target: Path, log: Path) -> None:
    def make(folder: Path) -> None:
        with log.open("a") as file:
            file.write("made\n")
        write(folder)

    published(target, make)


def test_folder_is_made_once_and_then_found(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(3):
        build_counted(tmp_path / "model", log)
    assert log.read_text() == "made\n" and content(tmp_path / "model") == "whole"


def test_killed_build_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    target = tmp_path / "cache" / "model"
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=build_half, args=(target, sender))
    process.start()
    assert receiver.poll(30) and receiver.recv() == "half"
    assert not target.exists()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert list(target.parent.glob("*.partial-*")) and not target.exists()
    assert content(published(target, write)) == "whole"
    assert not list(target.parent.glob("*.partial-*"))


def test_failed_build_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder, "half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        published(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists() and not list(tmp_path.glob("*.partial-*"))
    assert content(published(tmp_path / "model", write)) == "whole"


def test_processes_at_once_build_once_and_all_find_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=build_counted, args=(tmp_path / "model", log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert log.read_text() == "made\n" and content(tmp_path / "model") == "whole"


def test_cache_is_where_the_user_says_and_binaries_lie_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMK_CACHE", str(tmp_path / "set"))
    assert cache_root() == tmp_path / "set" and cache_root(tmp_path) == tmp_path
    assert cache_folder().parent == cache_root()
    monkeypatch.delenv("AMK_CACHE")
    assert cache_root() == Path.home() / ".cache" / "automegakernel"
    assert cache_folder().parent == cache_root()
