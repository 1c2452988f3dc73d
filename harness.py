"""propose / evaluate / loop / generate: the one API. The command line is an adapter over this module.

Every function returns plain JSON-able data. What a caller got wrong is raised as an exception with an `exit_code` (amk.eval.errors,
amk.models.errors); a config that is refused or wrong is a verdict, not an exception.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amk.eval import arguments, worker
from amk.eval.artefacts import artefact_names
from amk.eval.candidate import Candidate, prepare, require_program
from amk.eval.card import Place, choose, live_card
from amk.eval.errors import EnvironmentProblem, UsageError
from amk.eval.generation import check_request, chooser_for
from amk.eval.session import Session
from amk.eval.soundness.verify import run_verify
from amk.eval.trace import untraced
from amk.eval.verdict import failed, rejected
from amk.eval.writable import require_writable_file, require_writable_folder
from amk.flywheel.journal import REGIME, Journal, open_journal, trial_of
from amk.flywheel.search import run_loop
from amk.isa.sampling import Sampling
from amk.models.cache import cache_root
from amk.models.registry import describe
from amk.schedule.config import config_dict
from amk.schedule.knobs import KNOBS, Config
from amk.schedule.model import ModelSpec
from amk.schedule.render import search_space
from amk.schedule.settings import BATCHES, Chooser
from amk.vm.build import BuildFailed, compiler_version

SCHEMA_PATH = "schemas/schedule_config.json"
EDIT_SURFACE = "the ScheduleConfig with its kernel_knobs; everything else is frozen"
RESULTS_PATH = "workspace/results.tsv"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class _Subject:
    """The model and the place that a call is about; the token fetches the model and serves nothing else."""

    model_id: str
    spec: ModelSpec
    place: Place
    token: str | None = field(repr=False)
    progress: Progress

    def prepare(self, config: Any, chooser: Chooser = "greedy", batch: int = 1) -> Candidate:
        return prepare(self.spec, self.place, {} if config is None else config, chooser=chooser, batch=batch)


def _subject(model_id: str, gpu: str | None, device: str, token: str | None, progress: Progress | None = None) -> _Subject:
    model_id = arguments.text("model", model_id)
    arguments.function("progress", progress)
    place = choose(gpu, device)
    return _Subject(model_id, describe(model_id, token=token), place, token, progress or (lambda _: None))


def propose(
    model_id: str, gpu: str | None = None, *, incumbent: Mapping[str, Any] | None = None, token: str | None = None
) -> dict[str, Any]:
    """The incumbent config (default: the model's default) with its id, and everything that may be changed about it.

    Rejected for an incumbent that is refused.
    """
    subject = _subject(model_id, gpu, "auto", token)
    config: Any = config_dict(Config()) if incumbent is None else dict(incumbent) if isinstance(incumbent, Mapping) else incumbent
    candidate = subject.prepare(config)
    require_program(candidate, "incumbent")
    return {
        "model": model_id,
        "gpu": subject.place.target.name,
        "schedule_config": config,
        "effective_config": candidate.effective,
        "schedule_id": candidate.facts.schedule_id,
        "search_space": search_space(subject.spec, subject.place.target),
        "schema": SCHEMA_PATH,
        "edit_surface": EDIT_SURFACE,
    }


def evaluate(
    model_id: str,
    gpu: str | None = None,
    config_dict: Any = None,
    device: str = "auto",
    *,
    batch: int = 1,
    token: str | None = None,
    results_path: Path | str | None = None,
    corpus_path: Path | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """One verdict (eval.verdict.Verdict as JSON). Bad configs are refused here, before a worker or a checkpoint is touched.

    `batch` rows run side by side, each at a position of its own; such a verdict is not written down, for the log and the corpus compare
    single streams.
    `token` is a HuggingFace access token for a gated or private model. With `results_path` the trial is written down there and in the
    folders beside it (flywheel.journal); UsageError, before anything is judged, if that cannot be.
    """
    batch = arguments.one_of("batch", batch, BATCHES)
    journal = None if results_path is None or batch != 1 else _journal(results_path, corpus_path)
    subject = _subject(model_id, gpu, device, token, progress)
    candidate = subject.prepare(config_dict, batch=batch)
    verdict = _judge(subject, candidate)
    if journal is not None:
        journal.write(trial_of(candidate, verdict, kept=None, loop="eval", source="external", experiment=model_id))
    return verdict


def _journal(results_path: Path | str, corpus_path: Path | str | None) -> Journal:
    corpus = None if corpus_path is None else arguments.path("corpus", corpus_path)
    return open_journal(arguments.path("results", results_path), corpus)


def _judge(subject: _Subject, candidate: Candidate) -> dict[str, Any]:
    """The candidate's verdict, whatever became of its launches."""
    if candidate.program is None:
        return rejected(candidate.facts, candidate.rejections).to_json()
    try:
        verdict: dict[str, Any] = _answer(subject, "evaluate", candidate)
        return verdict
    except worker.WorkerDied as death:
        return _verdict_on(candidate, death)


def _verdict_on(candidate: Candidate, death: worker.WorkerDied) -> dict[str, Any]:
    return failed(candidate.facts, "timeout" if death.kind == "timeout" else "crash", str(death)).to_json()


def _answer(subject: _Subject, verb: str, candidate: Candidate, on_token: Callable[..., None] | None = None, **options: Any) -> Any:
    """Runs a session's request: here on the CPU, in the card's worker process otherwise. WorkerDied if that ends without an answer."""
    request = worker.Request(verb, subject.model_id, subject.place, candidate, options, subject.token)
    token = on_token or (lambda *_: None)
    if subject.place.device == "cpu":
        return worker.run(_cpu_session(subject), request, token)
    return worker.Worker.shared().call(request, lambda kind, value: token(*value) if kind == "token" else subject.progress(value))


_SESSIONS: dict[tuple[str, Place], Session] = {}


def _cpu_session(subject: _Subject) -> Session:
    """The last CPU session: a loop judges many configs of one model."""
    key = (subject.model_id, subject.place)
    if key not in _SESSIONS:
        _SESSIONS.clear()
        _SESSIONS[key] = Session(subject.model_id, subject.place, subject.progress, subject.token)
    _SESSIONS[key].progress = subject.progress  # the last caller's, not that of the call before
    return _SESSIONS[key]


def generate(
    model_id: str,
    gpu: str | None = None,
    *,
    prompt: str | None = None,
    prompt_ids: Sequence[int] | None = None,
    max_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    verify: bool = False,
    config_dict: Any = None,
    device: str = "auto",
    token: str | None = None,
    on_token: Callable[[int, int, str], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Tokens from the megakernel; `verify` compares them with the source model. Rejected for a config that is refused.

    A long prompt is prefilled where the model and the config have a program for that; `prefill` in the result says so, or why not.
    Greedy at temperature 0; else drawn with noise from `seed`, after the filters of transformers in its order (isa.sampling.Sampling).
    `on_token(index, token, text)` hears of each token as it is made. `token` as for `evaluate`.
    """
    ids = None if prompt_ids is None else arguments.wholes("prompt_ids", prompt_ids)
    if prompt is not None:
        prompt = arguments.text("prompt", prompt)
    arguments.function("on_token", on_token)
    max_tokens = arguments.whole("max_tokens", max_tokens)
    numbers = (arguments.number(name, value) for name, value in (("temperature", temperature), ("top_p", top_p), ("min_p", min_p)))
    temperature, top_p, min_p = numbers
    sampling = Sampling(temperature, arguments.whole("top_k", top_k), top_p, min_p, arguments.whole("seed", seed))
    check_request(prompt, ids, max_tokens, stop, sampling)
    subject = _subject(model_id, gpu, device, token, progress)
    candidate = subject.prepare(config_dict, chooser_for(sampling))
    require_program(candidate)
    stops = [arguments.text("stop", text) for text in stop]
    options = {"prompt": prompt, "prompt_ids": ids, "max_tokens": max_tokens, "stop": stops, "verify": verify}
    heard = on_token is not None
    result: dict[str, Any] = _answer(subject, "generate", candidate, on_token, stream=heard, sampling=sampling, **options)
    return result


def bench(
    model_id: str,
    gpu: str | None = None,
    *,
    positions: Sequence[int] = (16, 128, 1024),
    batch: int = 1,
    baselines: bool = False,
    config_dict: Any = None,
    device: str = "auto",
    token: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """A latency a position, after the program has been judged: {model, gpu, device, verdict, rows}. `token` and `batch` as for `evaluate`.

    `baselines` measures transformers under a CUDA graph and torch.compile in turns with it; EnvironmentProblem without a card, UsageError
    for quantised weights, which the baselines would run in 16 bits.
    """
    places, batch = arguments.wholes("positions", positions), arguments.one_of("batch", batch, BATCHES)
    if not places:
        raise UsageError("positions: must be at least one, but got none")
    if baselines and batch != 1:
        raise UsageError(f"batch: must be 1 beside the baselines, which run a single stream, but got {batch}")
    if baselines:
        _require_card("baselines", gpu, device)
    subject = _subject(model_id, gpu, device, token, progress)
    if baselines:
        _require_same_precision(subject.spec)
    candidate = subject.prepare(config_dict, batch=batch)
    if candidate.program is None:
        result = {"verdict": _judge(subject, candidate), "rows": []}
    else:
        result = _answer(subject, "bench", candidate, positions=places, baselines=baselines)
    return {"model": model_id, "gpu": subject.place.target.name, "device": subject.place.device, **result}


def trace(
    model_id: str,
    out: Path | str,
    gpu: str | None = None,
    *,
    position: int = 128,
    config_dict: Any = None,
    device: str = "auto",
    token: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Where the time of one token goes (eval.shapes.Trace), and its timeline in the file `out`; EnvironmentProblem without a card.

    UsageError, before anything is judged, if that file cannot be written. `token` as for `evaluate`.
    """
    file, position = arguments.path("out", out), arguments.whole("position", position)
    require_writable_file(file, "out")
    _require_card("trace", gpu, device)
    subject = _subject(model_id, gpu, device, token, progress)
    candidate = subject.prepare(config_dict)
    if candidate.program is None:
        result = untraced(_judge(subject, candidate), position)
    else:
        result = _answer(subject, "trace", candidate, position=position, out=file.resolve())
    return {"model": model_id, "gpu": subject.place.target.name, "device": subject.place.device, **result}


def _require_same_precision(spec: ModelSpec) -> None:
    """UsageError for a model whose weights the baselines would not run as ours are."""
    if spec.quantised:
        raise UsageError(f"baselines: must run weights in the same format, but those of {spec.name} are quantised and theirs would not be")


def _require_card(what: str, gpu: str | None, device: str) -> None:
    """EnvironmentProblem that names `what` unless it would run on the live card."""
    place = choose(gpu, device)
    if place.device != "cuda":
        raise EnvironmentProblem(f"{what}: must be measured on the live card, but {_why_cpu(place, device)}")


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
    token: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Import, lower, prove, judge, build, measure; writes the program's records, kernel source, cubin and report into `out`.

    UsageError, before anything is judged, if files cannot be written there. `token` as for `evaluate`.
    """
    folder = arguments.path("out", out)
    require_writable_folder(folder, "out")
    subject = _subject(model_id, gpu, device, token, progress)
    for name in artefact_names(subject.place.target.arch):
        require_writable_file(folder / name, "out")
    candidate = subject.prepare(config_dict)
    if candidate.program is None:
        return {"verdict": _judge(subject, candidate), "regime": REGIME, "files": []}
    try:
        result = _answer(subject, "compile", candidate, folder=folder)
    except worker.WorkerDied as death:
        result = {"verdict": _verdict_on(candidate, death), "files": []}
    return {"verdict": result["verdict"], "regime": REGIME, "files": result["files"]}


def loop(
    model_id: str,
    gpu: str | None = None,
    budget: int = 8,
    device: str = "auto",
    *,
    seed: int = 0,
    results_path: Path | str = RESULTS_PATH,
    corpus_path: Path | str | None = None,
    explore_fraction: float = 0.35,
    token: str | None = None,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Keep or revert over `budget` configs, the default first; the corpus is beside the results where no other is named.

    UsageError for a budget below 1 or, before anything is judged, for files that cannot be written. `token` as for `evaluate`.
    """
    budget, seed = arguments.whole("budget", budget), arguments.whole("seed", seed)
    for name, value, least in (("budget", budget, 1), ("seed", seed, 0)):
        if value < least:
            raise UsageError(f"{name}: must be at least {least}, but got {value}")
    if not 0 <= arguments.number("explore_fraction", explore_fraction) <= 1:
        raise UsageError(f"explore_fraction: must be from 0 to 1, but got {explore_fraction}")
    arguments.function("on_trial", on_trial)
    journal = _journal(results_path, corpus_path)
    subject = _subject(model_id, gpu, device, token, progress)
    return run_loop(
        subject.spec,
        subject.place,
        budget,
        evaluate=lambda candidate: _judge(subject, candidate),
        seed=seed,
        journal=journal,
        experiment=f"{model_id} seed {seed}",
        explore_fraction=explore_fraction,
        on_trial=on_trial,
    )


def doctor() -> dict[str, Any]:
    """What this machine offers: Python, packages, compiler, card, and the cache, with what keeps it from being used where anything does."""
    card, cache_problem = live_card(), _cache_problem()
    packages = ("torch", "transformers", "numpy", "cuda-core", "cuda-bindings", "cuda-toolkit", "safetensors", "gguf", "typer")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in packages},
        "nvrtc": _nvrtc(),
        "card": None if card is None else {"device_name": card.device_name, **_facts(card.target)},
        "cache": str(cache_root()),
        "cache_problem": cache_problem,
        "ready": {"cpu": _version("torch") is not None, "cuda": card is not None and _nvrtc() is not None and cache_problem is None},
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


def _cache_problem() -> str | None:
    """Kernels that are built and models that are fetched are kept there."""
    try:
        require_writable_folder(cache_root(), "cache")
    except UsageError as problem:
        return f"{problem}; set AMK_CACHE to one"
    return None


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
    programs, mutants, seed = (
        arguments.whole(name, value) for name, value in (("programs", programs), ("mutants", mutants), ("seed", seed))
    )
    for name, value in (("programs", programs), ("mutants", mutants), ("seed", seed)):
        if value < 0:
            raise UsageError(f"{name}: must be at least 0, but got {value}")
    if programs + mutants == 0:
        raise UsageError("programs and mutants: must be at least one case together, but got none")
    if minutes is not None and not 0 < arguments.number("minutes", minutes) < math.inf:
        raise UsageError(f"minutes: must be a positive number, but got {minutes}")
    arguments.function("progress", progress)
    return run_verify(programs, mutants, seed, None if minutes is None else float(minutes), progress)
