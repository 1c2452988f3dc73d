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
Json = dict[str, Any]
Evaluate = Callable[[Candidate], Json]
OnTrial = Callable[[Json], None]


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


class Incumbent:
    """The best config so far (the default while none is), its candidate and verdict, and the verdict that must be beaten."""

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self.config = Config()
        self.candidate: Candidate | None = None
        self.verdict: Json | None = None
        self._to_beat: Json | None = None

    def challenged(self, config: Config, candidate: Candidate) -> tuple[Json, bool]:
        """The challenger's verdict, and whether it is the incumbent now.

        Times that were measured minutes apart, in other places in memory, differ by more than their noise. So whoever would win has to beat
        the incumbent's time right after its own as well; a note says what that was.
        """
        verdict = self._evaluate(candidate)
        if self.candidate and keeps(verdict, self._to_beat) and verdict["latency_kind"] == "measured-gpu":
            verdict = self._measured_again(self.candidate, verdict)
        kept = keeps(verdict, self._to_beat)
        if kept:
            self.config, self.candidate, self.verdict, self._to_beat = config, candidate, verdict, verdict
        return verdict, kept

    def _measured_again(self, incumbent: Candidate, verdict: Json) -> Json:
        """The challenger's verdict with a note on the incumbent's time, which is to be beaten from now on if it is the lower one."""
        again = self._evaluate(incumbent)
        latency_us = again["latency_us"]
        if latency_us is None:
            return verdict
        if self._to_beat is None or latency_us < self._to_beat["latency_us"]:
            self._to_beat = again
        return verdict | {"notes": [*verdict["notes"], f"the incumbent took {latency_us:.1f} us when it was measured again after this"]}


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
) -> Json:
    """Tries up to `budget` configs; `rows` are verdicts with trial, source and tag. Ends early where nothing new is left to try."""
    prepared = LastPrepared(spec, place)
    proposer = Proposer(seed, explore_fraction, prepared.schedule_id)
    incumbent = Incumbent(evaluate)
    rows: list[Json] = []
    while len(rows) < budget and (proposal := proposer.propose(incumbent.config)) is not None:
        candidate = prepared.candidate(proposal.config)
        verdict, kept = incumbent.challenged(proposal.config, candidate)
        trial = trial_of(candidate, verdict, kept=kept, loop=LOOP, source=proposal.source, experiment=experiment)
        journal.write(trial)
        rows.append(verdict | {"trial": len(rows), "source": proposal.source, "tag": trial.tag, "trial_id": trial.id})
        if on_trial:
            on_trial(rows[-1])
    return {
        "best_verdict": incumbent.verdict,
        "best_config": incumbent.candidate.asked if incumbent.candidate else None,
        "rows": rows,
        "n_trials": len(rows),
        "n_valid": sum(row["valid"] for row in rows),
        "n_correct": sum(row["correct"] is True for row in rows),
        "results_tsv": str(journal.results),
    }
