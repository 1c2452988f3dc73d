"""Trials as they are written down: whatever the config, from however many processes, and refused in time where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amk.eval.candidate import prepare
from amk.eval.card import Place
from amk.eval.errors import UsageError
from amk.eval.verdict import rejected
from amk.flywheel.journal import changes, open_journal, trial_of
from amk.flywheel.log import read_rows
from amk.flywheel.trials import read_trials
from amk.models.registry import describe
from amk.schedule.config import config_dict
from amk.schedule.knobs import Config
from amk.schedule.targets import TARGETS

CPU = Place(TARGETS["h200"], "cpu", None)


@pytest.mark.parametrize("config", [[1], 7, "x", {"bogus": 1}, {"tiling": 3}, {"tiling": {"gemv": [1]}}, {"\t\n\\": "\ud800"}, {"a": {}}])
def test_a_config_of_any_form_is_written_down_and_read_again(tmp_path: Path, config: Any) -> None:
    candidate = prepare(describe("toy"), CPU, config)
    verdict = rejected(candidate.facts, candidate.rejections).to_json()
    journal = open_journal(tmp_path / "results.tsv")
    journal.write(trial := trial_of(candidate, verdict, kept=None, loop="eval", source="external", experiment="toy"))
    assert read_trials(journal.runs) == [trial] and trial.config == config
    assert [(row.tag, row.source, row.trial) for row in read_rows(journal.results)] == [("rejected", "external", trial.id)]


@pytest.mark.parametrize("config", [{"a": float("nan")}, {"a": {1, 2}}, {1: 2}, {"a": 10**5000}, {"a": object()}])
def test_a_config_that_is_no_json_is_written_down_as_it_looks(tmp_path: Path, config: Any) -> None:
    candidate = prepare(describe("toy"), CPU, config)
    verdict = rejected(candidate.facts, candidate.rejections).to_json()
    journal = open_journal(tmp_path / "results.tsv")
    journal.write(trial := trial_of(candidate, verdict, kept=None, loop="eval", source="external", experiment="toy"))
    assert read_trials(journal.runs) == [trial] and isinstance(trial.config, str)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "default"),
        (config_dict(Config()), "default"),
        ({"pipelining_depth": 5}, "pipelining_depth=5"),
        ({"tiling": {"gemv": {"N_tile": 512}}, "bogus": 1}, "tiling.gemv.N_tile=512, bogus=1"),
        ({"pipelining_depth": 3.0, "fusion_grouping": ["norm", "qkv", "gate_up"]}, "pipelining_depth=3.0"),
        ([], "no config: a list"),
        ({"k" * 500: 1, "a\nb": 2}, "k" * 77 + "...=1, a\\nb=2"),
    ],
)
def test_a_trial_is_described_by_what_it_changes(config: Any, words: str) -> None:
    assert changes(config) == words


@pytest.mark.parametrize("name", ["file/results.tsv", "folder", "other.tsv", "taken/results.tsv", "locked/results.tsv"])
def test_a_journal_that_cannot_be_written_is_a_usage_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "other.tsv").write_text("somebody\telse's\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "runs").write_text("")
    (tmp_path / "locked" / ".results.tsv.lock").mkdir(parents=True)
    with pytest.raises(UsageError, match="^results: "):
        open_journal(tmp_path / name)


def test_a_corpus_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="^corpus: "):
        open_journal(tmp_path / "results.tsv", tmp_path)


def test_somebody_elses_files_are_usage_errors_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text('{"my": "notes"}')
    (tmp_path / "corpus.jsonl").write_text("my notes")
    with pytest.raises(UsageError, match="^results: .*notes must begin with the columns"):
        open_journal(tmp_path / "notes", tmp_path / "new.jsonl")
    with pytest.raises(UsageError, match="^corpus: .*corpus.jsonl must hold corpus records"):
        open_journal(tmp_path / "results.tsv")
    assert (tmp_path / "notes").read_text() == '{"my": "notes"}' and (tmp_path / "corpus.jsonl").read_text() == "my notes"


def test_opening_a_journal_leaves_no_trace(tmp_path: Path) -> None:
    open_journal(tmp_path / "new" / "results.tsv")
    assert json.dumps(list(map(str, tmp_path.iterdir()))) == "[]"
