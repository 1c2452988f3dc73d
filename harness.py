"""propose / evaluate / loop / generate: the one API. The CLI and the MCP server are adapters over this module.

Every function returns plain JSON-able data. What a caller got wrong is raised as an exception with an `exit_code` (amk.eval.errors,
amk.models.errors); a config that is refused or wrong is a verdict, not an exception.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from amk.eval import worker
from amk.eval.artefacts import write_artefacts
from amk.eval.candidate import prepare
from amk.eval.card import Place, choose, live_card
from amk.eval.errors import EnvironmentProblem, UsageError
from amk.eval.session import Session
from amk.eval.soundness.verify import run_verify
from amk.eval.verdict import Facts, failed, rejected
from amk.flywheel.search import run_loop
from amk.models.cache import cache_root
from amk.models.registry import describe
from amk.schedule.config import config_dict
from amk.schedule.knobs import KNOBS, Config
from amk.schedule.render import search_space
from amk.vm.build import BuildFailed, compiler_version

SCHEMA_PATH = "schemas/schedule_config.json"
EDIT_SURFACE = "the ScheduleConfig with its kernel_knobs; everything else is frozen"
REGIME = "single-stream"
Progress = Callable[[str], None]


def propose(model_id: str, gpu: str | None = None, *, incumbent: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The incumbent config (default: the model's default) with its id, and everything that may be changed about it."""
    spec, place = describe(model_id), choose(gpu, "auto")
    config = dict(incumbent) if incumbent is not None else config_dict(Config())
    candidate = prepare(spec, place, config)
    if candidate.program is None:
        raise UsageError("incumbent: " + "; ".join(candidate.rejections))
    return {
        "model": model_id,
        "gpu": place.target.name,
        "schedule_config": config,
        "effective_config": candidate.effective,
        "schedule_id": candidate.facts.schedule_id,
        "search_space": search_space(spec),
        "schema": SCHEMA_PATH,
        "edit_surface": EDIT_SURFACE,
    }


def evaluate(
    model_id: str, gpu: str | None = None, config_dict: Any = None, device: str = "auto", *, progress: Progress | None = None
) -> dict[str, Any]:
    """One verdict (eval.verdict.Verdict as JSON). Bad configs are refused here, before a worker or a checkpoint is touched."""
    place, config = choose(gpu, device), {} if config_dict is None else config_dict
    spec = describe(model_id)
    candidate = prepare(spec, place, config)
    if candidate.program is None:
        return rejected(candidate.facts, candidate.rejections).to_json()
    return _answer(model_id, place, "evaluate", {"config": config}, candidate.facts, progress)


def _answer(
    model_id: str,
    place: Place,
    verb: str,
    arguments: dict[str, Any],
    facts: Facts | None,
    progress: Progress | None,
    on_token: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Runs a session's request: here on the CPU, in the card's worker process otherwise."""
    tell, token = progress or (lambda _: None), on_token or (lambda *_: None)
    if place.device == "cpu":
        result: dict[str, Any] = worker.run(_cpu_session(model_id, place, tell), verb, arguments, token)
        return result
    shared = worker.Worker.shared()
    try:
        answer: dict[str, Any] = shared.call(verb, model_id, place, arguments, lambda kind, v: token(*v) if kind == "token" else tell(v))
        return answer
    except worker.WorkerDied as death:
        shared.kill()
        if facts is None:
            raise
        return failed(facts, "timeout" if death.kind == "timeout" else "crash", str(death)).to_json()


_SESSIONS: dict[tuple[str, Place], Session] = {}


def _cpu_session(model_id: str, place: Place, progress: Progress) -> Session:
    """The last CPU session: a loop judges many configs of one model."""
    key = (model_id, place)
    if key not in _SESSIONS:
        _SESSIONS.clear()
        _SESSIONS[key] = Session(model_id, place, progress)
    _SESSIONS[key].progress = progress  # the last caller's, not that of the call before
    return _SESSIONS[key]


def generate(
    model_id: str,
    gpu: str | None = None,
    *,
    prompt: str | None = None,
    prompt_ids: Sequence[int] | None = None,
    max_tokens: int = 64,
    stop: Sequence[str] = (),
    verify: bool = False,
    config_dict: Any = None,
    device: str = "auto",
    on_token: Callable[[int, int, str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Greedy tokens from the megakernel; `verify` compares them with the source model."""
    arguments = {"prompt": prompt, "prompt_ids": prompt_ids, "max_tokens": max_tokens, "stop": list(stop)}
    arguments |= {"verify": verify, "config": config_dict}
    describe(model_id)
    return _answer(model_id, choose(gpu, device), "generate", arguments, None, progress, on_token)


def bench(
    model_id: str,
    gpu: str | None = None,
    *,
    positions: Sequence[int] = (16, 128, 1024),
    baselines: bool = False,
    config_dict: Any = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A latency a position, after the program has been judged: {model, gpu, device, verdict, rows}.

    `baselines` measures transformers under a CUDA graph and torch.compile in turns with it; EnvironmentProblem without a card.
    """
    place = choose(gpu, device)
    if not positions:
        raise UsageError("positions: must be at least one, but got none")
    if baselines and place.device != "cuda":
        raise EnvironmentProblem(f"baselines: must be measured on the live card, but {_why_cpu(place, device)}; leave them out")
    arguments = {"config": {} if config_dict is None else config_dict, "positions": list(positions), "baselines": baselines}
    result = _answer(model_id, place, "bench", arguments, None, progress)
    return {"model": model_id, "gpu": place.target.name, "device": place.device, **result}


def trace(
    model_id: str,
    out: Path | str,
    gpu: str | None = None,
    *,
    position: int = 128,
    config_dict: Any = None,
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Where the time of one token goes (eval.shapes.Trace), and its timeline in the file `out`; EnvironmentProblem without a card."""
    place, folder = choose(gpu, device), Path(out).resolve().parent
    if not os.access(folder, os.W_OK):
        raise UsageError(f"out: must lie in a folder that can be written to, but {folder} is none")
    if place.device != "cuda":
        raise EnvironmentProblem(f"trace: must run on the live card, but {_why_cpu(place, device)}")
    arguments = {"config": {} if config_dict is None else config_dict, "position": position, "out": str(Path(out).resolve())}
    result = _answer(model_id, place, "trace", arguments, None, progress)
    return {"model": model_id, "gpu": place.target.name, "device": place.device, **result}


def _why_cpu(place: Place, device: str) -> str:
    if device == "cpu":
        return "device cpu was asked for"
    return "there is none" if live_card() is None else f"it is not a {place.target.name}"


def compile_model(
    model_id: str,
    gpu: str | None = None,
    out: Path | str = "build",
    config_dict: Any = None,
    device: str = "auto",
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Import, lower, prove, judge, build, measure; writes the program's records, kernel source, cubin and report into `out`."""
    verdict = evaluate(model_id, gpu, config_dict, device, progress=progress)
    if not verdict["valid"]:
        return {"verdict": verdict, "files": []}
    candidate = prepare(describe(model_id), choose(gpu, device), {} if config_dict is None else config_dict)
    assert candidate.program is not None
    files = write_artefacts(Path(out), candidate, choose(gpu, device).target, verdict)
    return {"verdict": verdict, "regime": REGIME, "files": files}


def loop(
    model_id: str,
    gpu: str | None = None,
    budget: int = 8,
    device: str = "auto",
    *,
    seed: int = 0,
    results_path: Path | str | None = None,
    corpus_path: Path | str | None = None,
    explore_fraction: float = 0.35,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Keep or revert over `budget` configs, the default first; UsageError for a budget below 1."""
    if budget < 1:
        raise UsageError(f"budget: must be at least 1, but got {budget}")
    if not 0 <= explore_fraction <= 1:
        raise UsageError(f"explore_fraction: must be from 0 to 1, but got {explore_fraction}")
    place, spec = choose(gpu, device), describe(model_id)
    return run_loop(
        model_id,
        spec,
        place,
        budget,
        evaluate=lambda config: evaluate(model_id, gpu, config, device, progress=progress),
        seed=seed,
        results_path=Path(results_path or "workspace/results.tsv"),
        corpus_path=Path(corpus_path or "workspace/corpus.jsonl"),
        explore_fraction=explore_fraction,
        on_trial=on_trial,
    )


def doctor() -> dict[str, Any]:
    """What this machine offers: Python, packages, compiler, card."""
    card = live_card()
    packages = ("torch", "transformers", "numpy", "cuda-core", "cuda-bindings", "cuda-toolkit", "safetensors", "gguf", "typer")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in packages},
        "nvrtc": _nvrtc(),
        "card": None if card is None else {"device_name": card.device_name, **_facts(card.target)},
        "cache": str(_cache()),
        "ready": {"cpu": _version("torch") is not None, "cuda": card is not None and _nvrtc() is not None},
    }


def _facts(target: Any) -> dict[str, Any]:
    names = ("name", "arch", "sms", "shared_bytes", "bandwidth_gbs", "memory_bytes")
    return {name: getattr(target, name) for name in names}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvrtc() -> str | None:
    try:
        return compiler_version()
    except BuildFailed:
        return None


def _cache() -> Path:
    return cache_root()


def knobs() -> list[dict[str, Any]]:
    """The knob table: name, type, choices, default, meaning, unit and what consumes it."""
    config = config_dict(Config())
    found = []
    for knob in KNOBS:
        value: Any = config
        for part in knob.name.split("."):
            value = value[part]
        entry = {"name": knob.name, "type": knob.type, "choices": list(knob.values), "default": value}
        found.append(entry | {"meaning": knob.meaning, "unit": knob.unit, "consumer": knob.consumer})
    return found


def verify(
    *,
    programs: int = 2000,
    mutants: int = 400,
    seed: int = 0,
    minutes: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measures the validator against the explorer and the trace checker (eval.soundness)."""
    for name, value in (("programs", programs), ("mutants", mutants)):
        if value < 0:
            raise UsageError(f"{name}: must be at least 0, but got {value}")
    return run_verify(programs, mutants, seed, minutes, progress)
