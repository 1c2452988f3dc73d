"""Whether something can be written is found out without leaving a trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from amk.eval.errors import UsageError
from amk.eval.writable import require_appendable_file, require_writable_file, require_writable_folder

FILES = (require_writable_file, require_appendable_file)


def everything(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


@pytest.mark.parametrize("name", ["", "new", "new/deeper/still", "new/../other", "there", "link"])
def test_a_folder_that_can_be_written_passes_and_stays_as_it_was(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    before = everything(tmp_path)
    require_writable_folder(tmp_path / name, "out")
    for require in FILES:
        require(tmp_path / name / "results.tsv", "results")
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["file", "file/below", "dangling", "x" * 300, "nul\0", "new/" + "x" * 300])
def test_a_folder_that_cannot_be_is_a_usage_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("kept")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = everything(tmp_path)
    with pytest.raises(UsageError, match="^out: must be a folder to write into"):
        require_writable_folder(tmp_path / name, "out")
    assert everything(tmp_path) == before and (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("require", FILES)
def test_a_file_that_is_no_plain_file_is_a_usage_error(tmp_path: Path, require: Callable[[Path, str], None]) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/null"), Path(""), tmp_path / ("x" * 250), tmp_path / "nul\0"):
        with pytest.raises(UsageError, match="^results: must be a"):
            require(path, "results")


def test_a_folder_where_nothing_can_be_made_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="/proc/amk"):  # for root too
        require_writable_folder(Path("/proc/amk"), "out")
