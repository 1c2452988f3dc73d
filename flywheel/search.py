"""The loop: propose, evaluate, keep or revert, write down; the default config first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from amk.eval.candidate import Candidate, prepare
from amk.eval.card import Place
from amk.flywheel.decide import keeps
from amk.flywheel.journal import Journal, trial_of
from amk.flywheel.proposer import Proposer
from amk.schedule.config import config_dict
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec

LOOP = "loop"
Evaluate = Callable[[Candidate], dict[str, Any]]
OnTrial = Callable[[dict[str, Any]], None]


class LastPrepared:
    """Prepares configs for one model and place. The proposer asks for a config's id right before it is judged: once is enough."""

    def __init__(self, spec: ModelSpec, place: Place) -> None:
        self._spec, self._place = spec, place
        self._last: tuple[Config, Candidate] | None = None

    def candidate(self, config: Config) -> Candidate:
        if self._last is None or self._last[0] != config:
            self._last = config, prepare(self._spec, self._place, config_dict(config))
        return self._last[1]

    def schedule_id(self, config: Config) -> str | None:
        return self.candidate(config).facts.schedule_id


def run_loop(
    spec: ModelSpec,
    place: Place,
    budget: int,
    *,
    evaluate: Evaluate,
    seed: int,
    journal: Journal,
    experiment: str,
    explore_fraction: float,
    on_trial: OnTrial | None = None,
) -> dict[str, Any]:
    """Tries up to `budget` configs; `rows` are verdicts with trial, source and tag. Ends early where nothing new is left to try."""
    prepared = LastPrepared(spec, place)
    proposer = Proposer(seed, explore_fraction, prepared.schedule_id)
    incumbent, best, best_verdict = Config(), None, None
    rows: list[dict[str, Any]] = []
    while len(rows) < budget and (proposal := proposer.propose(incumbent)) is not None:
        candidate = prepared.candidate(proposal.config)
        verdict = evaluate(candidate)
        kept = keeps(verdict, best_verdict)
        if kept:
            incumbent, best, best_verdict = proposal.config, candidate.asked, verdict
        trial = trial_of(candidate, verdict, kept=kept, loop=LOOP, source=proposal.source, experiment=experiment)
        journal.write(trial)
        rows.append(verdict | {"trial": len(rows), "source": proposal.source, "tag": trial.tag, "trial_id": trial.id})
        if on_trial:
            on_trial(rows[-1])
    return {
        "best_verdict": best_verdict,
        "best_config": best,
        "rows": rows,
        "n_trials": len(rows),
        "n_valid": sum(row["valid"] for row in rows),
        "n_correct": sum(row["correct"] is True for row in rows),
        "results_tsv": str(journal.results),
    }
