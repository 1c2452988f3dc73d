"""Trials: written whole or not at all, never overwritten, enough to rebuild the log and the corpus."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from amk.flywheel import trials as of_trials
from amk.flywheel.append import locked
from amk.flywheel.corpus import append_record, read_records
from amk.flywheel.log import append_row, read_rows
from amk.flywheel.trials import FILE, Trial, new_id, read_trials, rebuild, save_trial, tag_of
from amk.tests.flywheel.examples import crashed, record, refused, trial, verdict

KILLS = 5
FORK = multiprocessing.get_context("fork")


def write_until_killed(folder: Path, done: int) -> None:
    """Writes trials for ever; the id of each goes down the pipe `done` once it is saved and logged."""
    while True:
        one = trial(record=record())
        save_trial(folder / "runs", one)
        append_row(folder / "results.tsv", one.row)
        append_record(folder / "corpus.jsonl", record())
        os.write(done, f"{one.id}\n".encode())


def killed_writer(folder: Path, writes: int) -> list[str]:
    """Ids of the trials that a writer had finished when it was killed, after at least `writes`."""
    ends, begins = os.pipe()
    process = FORK.Process(target=write_until_killed, args=(folder, begins))
    process.start()
    os.close(begins)
    with os.fdopen(ends) as pipe:
        told = [pipe.readline().strip() for _ in range(writes)]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        return told + pipe.read().split()


def test_a_kill_loses_at_most_the_trial_in_flight(tmp_path: Path) -> None:
    finished: list[str] = []
    for kill in range(KILLS):
        finished += killed_writer(tmp_path, 3 + kill)
        saved = [t.id for t in read_trials(tmp_path / "runs")]
        logged = [r.trial for r in read_rows(tmp_path / "results.tsv")]
        assert set(finished) <= set(logged) <= set(saved)
        assert len(saved) <= len(finished) + kill + 1
    assert rebuild(tmp_path / "results.tsv", tmp_path / "runs") == len(saved)
    assert sorted(r.trial for r in read_rows(tmp_path / "results.tsv")) == saved
    append_row(tmp_path / "results.tsv", trial().row)
    assert len(read_rows(tmp_path / "results.tsv")) == len(saved) + 1


def test_log_and_corpus_are_rebuilt_from_the_trials_alone(tmp_path: Path) -> None:
    results, runs, corpus = tmp_path / "results.tsv", tmp_path / "runs", tmp_path / "corpus.jsonl"
    trials = [trial(kept=True, record=record()), trial(refused(), description="tab\tline\n")]
    trials += [trial(crashed()), trial(verdict(correct=False))]
    for one in trials:
        save_trial(runs, one)
        append_row(results, one.row)
    append_record(corpus, record())
    rows, records = read_rows(results), read_records([corpus])
    results.unlink()
    corpus.write_bytes(b"\xff broken\n")
    assert rebuild(results, runs, corpus) == len(trials)
    assert (read_rows(results), read_records([corpus])) == (rows, records)
    assert [r.tag for r in rows] == ["kept", "rejected", "crash", "failed"]
    assert [r.correctness for r in rows] == ["PASS", "", "FAIL", "FAIL"]


def test_rebuilding_drops_lines_that_no_trial_stands_behind(tmp_path: Path) -> None:
    append_row(tmp_path / "results.tsv", trial(verdict(1e3), description="forged").row)
    save_trial(tmp_path / "runs", one := trial())
    rebuild(tmp_path / "results.tsv", tmp_path / "runs")
    assert read_rows(tmp_path / "results.tsv") == [one.row]


def test_what_others_write_until_a_file_is_locked_stays_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finishes a trial right before either lock is taken."""
    results, runs, corpus = tmp_path / "results.tsv", tmp_path / "runs", tmp_path / "corpus.jsonl"
    written: list[Trial] = []

    @contextmanager
    def late(path: Path) -> Iterator[None]:
        latency_us = 100.0 + len(written)
        one = trial(verdict(latency_us), record=record(latency_us))
        save_trial(runs, one)
        append_row(results, one.row)
        append_record(corpus, record(latency_us))
        written.append(one)
        with locked(path):
            yield

    monkeypatch.setattr(of_trials, "locked", late)
    rebuild(results, runs, corpus)
    assert read_rows(results) == [one.row for one in written] and len(written) == 2
    assert read_records([corpus]) == [one.record for one in written]


def test_a_writer_whose_trial_was_rebuilt_does_not_log_it_twice(tmp_path: Path) -> None:
    save_trial(tmp_path / "runs", one := trial())
    rebuild(tmp_path / "results.tsv", tmp_path / "runs")
    append_row(tmp_path / "results.tsv", one.row)
    assert read_rows(tmp_path / "results.tsv") == [one.row]


def test_folders_of_killed_writers_are_passed_over(tmp_path: Path) -> None:
    save_trial(tmp_path, one := trial())
    whole = (tmp_path / one.id / FILE).read_bytes()
    for number, left in enumerate((b"", whole[: len(whole) // 2], whole)):
        (tmp_path / f".partial-{number}").mkdir()
        (tmp_path / f".partial-{number}" / FILE).write_bytes(left)
    (tmp_path / "empty").mkdir()
    assert read_trials(tmp_path) == [one]


def test_a_trial_is_never_overwritten(tmp_path: Path) -> None:
    save_trial(tmp_path, one := trial())
    with pytest.raises(FileExistsError, match="never overwritten"):
        save_trial(tmp_path, trial(refused(), id=one.id))
    assert read_trials(tmp_path) == [one]
    assert [p.name for p in tmp_path.iterdir()] == [one.id]


def many_ids(_: int) -> list[str]:
    return [new_id() for _ in range(500)]


def test_ids_of_several_processes_differ_and_sort_by_age() -> None:
    with FORK.Pool(3) as pool:
        made = pool.map(many_ids, range(6))
    assert len({i for ids in made for i in ids}) == 3000
    assert all([i[:22] for i in ids] == sorted(i[:22] for i in ids) for ids in made)


def test_a_damaged_trial_is_named(tmp_path: Path) -> None:
    path = save_trial(tmp_path, trial()) / FILE
    for text in ("{", "[]", "null", "{}", path.read_text(encoding="utf-8").replace('"correct": true', '"correct": false')):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=FILE):
            read_trials(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a"])
def test_an_id_is_the_name_of_a_folder(name: str) -> None:
    with pytest.raises(ValueError, match="name of a folder"):
        trial(id=name)


@pytest.mark.parametrize(
    "changes",
    [
        {"verdict": refused(), "tag": "kept"},
        {"verdict": verdict(correct=False) | {"latency_us": 5.0, "latency_kind": "predicted"}},
        {"verdict": verdict(correct=False), "tag": "revert", "record": record()},
        {"record": record(50.0)},
        {"record": record() | {"program_digest": "another"}},
        {"record": record() | {"latency_kind": "predicted"}},
    ],
)
def test_a_dishonest_trial_cannot_be_made(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        trial(**changes)


@pytest.mark.parametrize(
    ("data", "kept", "tag"),
    [
        (verdict(), True, "kept"),
        (verdict(), False, "revert"),
        (verdict(None), False, "tried"),
        (verdict(correct=False), False, "failed"),
        (refused(), False, "rejected"),
        (crashed(), False, "crash"),
        (crashed() | {"status": "timeout"}, False, "timeout"),
    ],
)
def test_every_end_has_its_tag(data: dict[str, Any], kept: bool, tag: str) -> None:
    assert tag_of(data, kept=kept) == tag
    assert Trial(**json.loads(json.dumps(vars(trial(data, kept=kept))))).row.tag == tag
