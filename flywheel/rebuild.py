"""The log and the corpus made anew from the trials: `python -m amk.flywheel.rebuild workspace/results.tsv`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from amk.flywheel import corpus
from amk.flywheel.append import locked
from amk.flywheel.journal import journal_at
from amk.flywheel.log import write_rows
from amk.flywheel.trials import read_trials


def rebuild(results_path: Path | str, runs: Path | str, corpus_path: Path | str | None = None) -> int:
    """Rewrites the log, and the corpus if given, from the trials alone; how many there are.

    Lines that no trial stands behind are gone from the files, and in what is kept beside them (append.replace). Writers may go on
    meanwhile: what they saved is in, what they append comes after. ValueError, and nothing is changed, for no trial or a damaged one.
    """
    results_path = Path(results_path)
    with locked(results_path):
        trials = read_trials(runs)
        if not trials:
            raise ValueError(f"{runs} must hold trials, but has none; {results_path} stays as it is")
        write_rows(results_path, [trial.row for trial in trials])
    if corpus_path is not None:
        with locked(Path(corpus_path)):
            corpus.write_records(Path(corpus_path), [trial.record for trial in read_trials(runs) if trial.record is not None])
    return len(trials)


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes a log, and the corpus beside it, anew from the trials in runs/ beside it.")
    parser.add_argument("results", type=Path, help="the log, such as workspace/results.tsv")
    journal = journal_at(parser.parse_args().results)
    try:
        found = rebuild(journal.results, journal.runs, journal.corpus)
    except (OSError, ValueError) as problem:
        sys.exit(str(problem))
    print(f"{journal.results} and {journal.corpus} are made of {found} trials; what else stood there is kept beside them as NAME.before-*")


if __name__ == "__main__":
    main()
