"""The loop: propose, evaluate, keep or revert, write down; the default config first."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from amk.eval.candidate import Candidate, prepare
from amk.eval.card import Place
from amk.flywheel.decide import is_gain, keeps
from amk.flywheel.journal import Journal, trial_of
from amk.flywheel.proposer import Proposer
from amk.schedule.config import config_dict, parse_config
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
    """The best config so far (the default while none is), its candidate and verdict, and its lowest time in measurements after the first.

    Times that were measured minutes apart, in other places in memory, differ by more than their noise. So whoever would win must also be
    faster than the incumbent is right after it.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self._evaluate = evaluate
        self.config = Config()
        self.candidate: Candidate | None = None
        self.verdict: Json | None = None
        self._again_us: float | None = None

    @property
    def realised(self) -> Config | None:
        """The config as its program realises it; None while there is none."""
        parsed = parse_config(self.candidate.effective) if self.candidate else None
        return parsed if isinstance(parsed, Config) else None

    def challenged(self, config: Config, candidate: Candidate, verdict: Json) -> tuple[Json, bool]:
        """The challenger's verdict, with a note where the incumbent was measured again, and whether the challenger is the incumbent now."""
        kept = keeps(verdict, self.verdict)
        if kept and self.candidate and verdict["latency_kind"] == "measured-gpu":
            notes: list[str] = []
            if self._is_faster(verdict):
                notes += self._measured_again(self.candidate)
            kept = self._is_faster(verdict)
            if not kept and not notes:
                notes.append(f"the incumbent took {self._again_us:.1f} us when it was measured again earlier")
            verdict = verdict | {"notes": [*verdict["notes"], *notes]}
        if kept:
            self.config, self.candidate, self.verdict, self._again_us = config, candidate, verdict, None
        return verdict, kept

    def _is_faster(self, verdict: Json) -> bool:
        """Than the incumbent was, whenever it was measured again."""
        return self._again_us is None or is_gain(verdict["latency_us"], self._again_us)

    def _measured_again(self, incumbent: Candidate) -> list[str]:
        again = self._evaluate(incumbent)
        if again["correct"] is not True or again["latency_us"] is None:
            found = "correct, but without a latency," if again["correct"] else again["status"]
            return [f"the incumbent was measured again after this, but was {found} then"]
        self._again_us = again["latency_us"]  # the lowest yet, or the challenger wins: it has beaten the one before
        return [f"the incumbent took {again['latency_us']:.1f} us when it was measured again after this"]


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
    while len(rows) < budget and (proposal := proposer.propose(incumbent.config, incumbent.realised)) is not None:
        candidate = prepared.candidate(proposal.config)
        written = partial(trial_of, candidate, loop=LOOP, source=proposal.source, experiment=experiment)
        verdict = evaluate(candidate)
        try:
            verdict, kept = incumbent.challenged(proposal.config, candidate, verdict)
        except BaseException:
            journal.write(written(verdict, kept=None))  # finished, though nothing was decided
            raise
        trial = written(verdict, kept=kept)
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
