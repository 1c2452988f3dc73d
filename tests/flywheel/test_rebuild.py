"""The log and the corpus made anew from the trials: nothing that stands in them is lost, and errors name the command that does it."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from amk.flywheel.append import locked
from amk.flywheel.corpus import append_record, read_records
from amk.flywheel.log import append_row, read_rows
from amk.flywheel.rebuild import rebuild
from amk.flywheel.trials import FILE, Trial, save_trial
from amk.tests.flywheel.examples import crashed, record, refused, trial, verdict


def kept(path: Path) -> list[bytes]:
    """What stood in the file before it was rebuilt, each time."""
    return [before.read_bytes() for before in sorted(path.parent.glob(f"{path.name}.before-*"))]


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

    monkeypatch.setattr("amk.flywheel.rebuild.locked", late)
    rebuild(results, runs, corpus)
    assert read_rows(results) == [one.row for one in written] and len(written) == 2
    assert read_records([corpus]) == [one.record for one in written]


def test_a_writer_whose_trial_was_rebuilt_does_not_log_it_twice(tmp_path: Path) -> None:
    save_trial(tmp_path / "runs", one := trial())
    rebuild(tmp_path / "results.tsv", tmp_path / "runs")
    append_row(tmp_path / "results.tsv", one.row)
    assert read_rows(tmp_path / "results.tsv") == [one.row]


def test_what_stood_there_is_kept_beside_the_rebuilt_file_unless_it_is_the_same(tmp_path: Path) -> None:
    results, runs, corpus = tmp_path / "results.tsv", tmp_path / "runs", tmp_path / "corpus.jsonl"
    save_trial(runs, trial(record=record()))
    rebuild(results, runs, corpus)
    rebuild(results, runs, corpus)
    assert kept(results) == kept(corpus) == []
    for damaged in (b"\xff broken\n", b"other\tcolumns\n1\t2"):
        results.write_bytes(damaged)
        corpus.write_bytes(damaged)
        rebuild(results, runs, corpus)
    assert kept(results) == kept(corpus) == [b"\xff broken\n", b"other\tcolumns\n1\t2"]
    assert len(read_rows(results)) == len(read_records([corpus])) == 1


def test_without_whole_trials_nothing_is_changed(tmp_path: Path) -> None:
    results, runs = tmp_path / "results.tsv", tmp_path / "runs"
    append_row(results, trial().row)
    before = results.read_bytes()
    with pytest.raises(ValueError, match="runs must hold trials, but has none"):
        rebuild(results, runs)
    (save_trial(runs, trial()) / FILE).write_bytes(b"{")
    with pytest.raises(ValueError, match=f"{FILE} must be a trial"):
        rebuild(results, runs)
    assert results.read_bytes() == before and kept(results) == []


def test_the_command_that_the_error_names_mends_the_file(tmp_path: Path) -> None:
    results = tmp_path / "some where" / "results.tsv"
    for one in (trial(record=record()), trial(refused())):
        save_trial(results.parent / "runs", one)
        append_row(results, one.row)
    rows = read_rows(results)
    results.write_bytes(results.read_bytes() + b"what\n")
    with pytest.raises(ValueError, match="line 4 must be a row") as caught:
        read_rows(results)
    python, *command = shlex.split(str(caught.value).split("rebuild the file from the trials: ")[1])
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert (python, done.returncode, done.stderr) == ("python", 0, "")
    assert str(results) in done.stdout and "2 trials" in done.stdout
    assert read_rows(results) == rows and read_records([results.parent / "corpus.jsonl"]) == [record()]
    refused_ = subprocess.run([sys.executable, *command[:2], str(tmp_path / "none.tsv")], capture_output=True, text=True)
    assert refused_.returncode == 1 and "must hold trials" in refused_.stderr and "Traceback" not in refused_.stderr
