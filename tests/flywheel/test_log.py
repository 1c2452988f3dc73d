"""The log: nothing is lost, nothing is torn, nothing dishonest enters."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amk.flywheel.append import append, lines, locked
from amk.flywheel.log import (
    COLUMNS,
    HEADER,
    append_row,
    check_columns,
    escape,
    format_row,
    parse_row,
    read_rows,
    unescape,
    write_rows,
)
from amk.tests.flywheel.examples import row

WRITERS, EACH = 4, 25
PROMISED = "experiment tag loop model gpu regime correctness latency_us pct_of_roofline schedule_id kernel_id description".split()
TIMED: dict[str, Any] = {"correctness": "PASS", "latency_us": 0.1 + 0.2, "latency_kind": "predicted", "pct_of_roofline": 50.0}


def write_many(path: Path, writer: int) -> None:
    for number in range(EACH):
        append_row(path, row(experiment=f"{writer}", description=f"{number}\t" + "x" * 500, trial=f"{writer}-{number}"))


def test_columns_begin_as_promised() -> None:
    assert list(COLUMNS[: len(PROMISED)]) == PROMISED


def test_processes_that_append_at_the_same_time_lose_and_tear_nothing(tmp_path: Path) -> None:
    path = tmp_path / "workspace" / "results.tsv"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(path, writer)) for writer in range(WRITERS)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert [process.exitcode for process in writers] == [0] * WRITERS
    rows = read_rows(path)
    assert sorted(r.trial for r in rows) == sorted(f"{w}-{n}" for w in range(WRITERS) for n in range(EACH))
    for writer in range(WRITERS):
        assert [r.trial for r in rows if r.experiment == f"{writer}"] == [f"{writer}-{n}" for n in range(EACH)]
    assert path.read_text(encoding="utf-8").count(HEADER) == 1


@given(st.text(st.characters()))
def test_any_text_comes_back_from_one_cell_of_one_line(text: str) -> None:
    cell = escape(text)
    assert unescape(cell) == text
    assert "\t" not in cell and len(cell.splitlines()) <= 1
    cell.encode()
    assert parse_row(format_row(row(description=text))) == row(description=text)


def test_numbers_come_back_exactly() -> None:
    assert parse_row(format_row(row(**TIMED))) == row(**TIMED)


def test_a_row_torn_anywhere_is_left_out_and_the_next_one_is_whole(tmp_path: Path) -> None:
    """The first row is kept wherever a kill cut the second."""
    path, first, second, third = tmp_path / "results.tsv", row(trial="1"), row(trial="2", **TIMED), row(trial="3")
    append_row(path, first)
    before, line = path.read_bytes(), format_row(second).encode()
    for cut in range(len(line) + 1):
        path.write_bytes(before + line[:cut])
        whole = [first, second] if cut == len(line) else [first]
        assert read_rows(path) == whole
        append_row(path, third)
        assert read_rows(path) == [*whole, third]


def test_a_torn_header_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "results.tsv"
    for cut in range(len(HEADER) + 1):
        path.write_text(HEADER[:cut], encoding="utf-8")
        append_row(path, row(trial="1"))
        assert path.read_text(encoding="utf-8") == f"{HEADER}\n{format_row(row(trial='1'))}\n"


def test_torn_tails_longer_than_a_block_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes(b"one\n" + b"x" * 200_000)
    with locked(path):
        append(path, "two\n", lambda _: False)
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_trial_is_logged_once_however_often_it_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "results.tsv"
    for trial in ("1", "1", "", ""):
        append_row(path, row(trial=trial, description="1"))
    assert [r.trial for r in read_rows(path)] == ["1", "", ""]


def test_a_row_that_finds_no_room_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, write = tmp_path / "results.tsv", os.pwrite
    append_row(path, row(trial="1"))
    before = path.read_bytes()

    def half(file: int, data: bytes, at: int) -> int:
        write(file, data[: len(data) // 2], at)
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "pwrite", half)
    with pytest.raises(OSError, match="no space left"):
        append_row(path, row(trial="2"))
    assert path.read_bytes() == before


def test_a_row_that_is_written_in_pieces_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:7], at))
    for trial in ("1", "2"):
        append_row(tmp_path / "results.tsv", row(trial=trial))
    assert read_rows(tmp_path / "results.tsv") == [row(trial="1"), row(trial="2")]


def test_a_file_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.tsv"
    append_row(path, row(trial="1"))

    def lost(handle: int) -> None:
        raise OSError(errno.EIO, "the disk is gone")

    monkeypatch.setattr(os, "fsync", lost)
    with pytest.raises(OSError, match="the disk is gone"):
        write_rows(path, [row(trial="2")])
    assert read_rows(path) == [row(trial="1")]


def test_a_file_with_other_columns_is_refused_and_untouched(tmp_path: Path) -> None:
    path = tmp_path / "results.tsv"
    path.write_text("a\tb\n1\t2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="must begin with the columns"):
        append_row(path, row())
    assert path.read_text(encoding="utf-8") == "a\tb\n1\t2\n"


@pytest.mark.parametrize("text", ['{"my": "notes"}', HEADER[:-1] + "?", "experiment\ttags", f"\n{HEADER}", "\ufeff" + HEADER[:9]])
def test_somebody_elses_file_without_a_newline_is_refused_and_untouched(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.tsv"
    path.write_text(text, encoding="utf-8")
    for use in (lambda: append_row(path, row()), lambda: read_rows(path), lambda: check_columns(path)):
        with pytest.raises(ValueError, match="must begin with the columns"):
            use()
    assert path.read_text(encoding="utf-8") == text


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.tsv"
    append_row(path, row())
    path.write_bytes(path.read_bytes() + b"what\n")
    with pytest.raises(ValueError, match="line 3 must be a row"):
        read_rows(path)


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.tsv") == [] and lines(tmp_path / "none.tsv", bool) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (TIMED | {"correctness": "FAIL"}, "a latency needs a correctness PASS"),
        (TIMED | {"correctness": ""}, "a latency needs a correctness PASS"),
        (TIMED | {"latency_kind": ""}, "go together"),
        (TIMED | {"latency_us": float("nan")}, "latency_us must be a positive number"),
        (TIMED | {"latency_us": -1.0}, "latency_us must be a positive number"),
        ({"pct_of_roofline": 90.0}, "needs a latency"),
        ({"tag": "kept", "correctness": "PASS"}, "a kept trial needs"),
        *((TIMED | {"tag": tag}, "cannot have passed") for tag in ("rejected", "failed", "timeout", "crash")),
        ({"tag": "won"}, "tag must be one of"),
        ({"correctness": "pass"}, "correctness must be"),
        ({"ts": "yesterday"}, "ts must be"),
    ],
)
def test_a_dishonest_row_cannot_be_made(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        row(**changes)
