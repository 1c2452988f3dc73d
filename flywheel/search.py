"""The loop: propose, evaluate, keep or revert, write down; the default config first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from amk.eval.candidate import prepare
from amk.eval.card import Place
from amk.flywheel.corpus import append_record, record_of
from amk.flywheel.decide import keeps
from amk.flywheel.log import append_row
from amk.flywheel.proposer import Proposal, Proposer
from amk.flywheel.provenance import point_provenance
from amk.flywheel.trials import Trial, save_trial, tag_of, utc_now
from amk.schedule.config import config_dict
from amk.schedule.knobs import Config
from amk.schedule.model import ModelSpec

LOOP = "loop"
REGIME = "single-stream"
Evaluate = Callable[[dict[str, Any]], dict[str, Any]]
OnTrial = Callable[[dict[str, Any]], None]


def run_loop(
    model_id: str,
    spec: ModelSpec,
    place: Place,
    budget: int,
    *,
    evaluate: Evaluate,
    seed: int,
    results_path: Path,
    corpus_path: Path,
    explore_fraction: float,
    on_trial: OnTrial | None,
) -> dict[str, Any]:
    """Tries up to `budget` configs; `rows` are verdicts with trial, source and tag. Ends early where nothing new is left to try."""

    def identify(config: Config) -> str | None:
        return prepare(spec, place, config_dict(config)).facts.schedule_id

    proposer = Proposer(seed, explore_fraction, identify)
    incumbent, best, best_verdict = Config(), None, None
    rows: list[dict[str, Any]] = []
    for number in range(budget):
        proposal = proposer.propose(incumbent)
        if proposal is None:
            break
        verdict = evaluate(config_dict(proposal.config))
        kept = keeps(verdict, best_verdict)
        if kept:
            incumbent, best, best_verdict = proposal.config, config_dict(proposal.config), verdict
        trial = _write_down(spec, place, proposal, verdict, kept, results_path, corpus_path, f"{model_id} seed {seed}")
        rows.append(verdict | {"trial": number, "source": proposal.source, "tag": trial.tag, "trial_id": trial.id})
        if on_trial:
            on_trial(rows[-1])
    return {
        "best_verdict": best_verdict,
        "best_config": best,
        "rows": rows,
        "n_trials": len(rows),
        "n_valid": sum(row["valid"] for row in rows),
        "n_correct": sum(row["correct"] is True for row in rows),
        "results_tsv": str(results_path),
    }


def _write_down(
    spec: ModelSpec, place: Place, proposal: Proposal, verdict: dict[str, Any], kept: bool, results: Path, corpus: Path, experiment: str
) -> Trial:
    """The trial's folder first, then the files that can be rebuilt from it."""
    config, now = config_dict(proposal.config), utc_now()
    record = None
    if verdict["latency_kind"] == "measured-gpu":
        effective = prepare(spec, place, config).effective
        record = record_of(verdict, point_provenance(effective, config, asdict(spec), REGIME, now))
    trial = Trial(
        experiment=experiment,
        tag=tag_of(verdict, kept=kept),
        loop=LOOP,
        regime=REGIME,
        source=proposal.source,
        description=_changes(config),
        config=config,
        verdict=verdict,
        record=record,
        ts=now,
    )
    save_trial(results.parent / "runs", trial)
    append_row(results, trial.row)
    if record is not None:
        append_record(corpus, record)
    return trial


def _changes(config: dict[str, Any], default: dict[str, Any] | None = None, at: str = "") -> str:
    """Where a config differs from the default, in words."""
    default = config_dict(Config()) if default is None else default
    parts = []
    for key, value in config.items():
        if isinstance(value, dict) and isinstance(default.get(key), dict):
            parts.append(_changes(value, default[key], f"{at}{key}."))
        elif value != default.get(key):
            parts.append(f"{at}{key}={value}")
    return ", ".join(filter(None, parts)) or ("" if at else "default")
