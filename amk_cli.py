"""`amk VERB`: the harness on the command line. stdout carries JSON, stderr everything else, the exit code the outcome.

0 done (for a judged program: valid and correct), 1 judged and failed, 2 usage, 3 environment, 130 interrupted, 141 whoever read
stdout is gone.
"""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import amk_bootstrap

    amk_bootstrap.register()

import sys

try:  # starting takes a second, most of it the harness: an interrupt may come before there is a verb to end
    import json
    import math
    import os
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import contextmanager, nullcontext, redirect_stdout
    from pathlib import Path
    from typing import Annotated, Any, NoReturn, TextIO

    import typer
    from rich.console import Console
    from rich.table import Table

    from amk import harness
    from amk.models.cache import cache_root
    from amk.schedule.strict_json import unique_keys
except KeyboardInterrupt:
    print('{"error": "interrupted"}', flush=True)
    print("interrupted", file=sys.stderr)
    sys.exit(130)

OK, FAILED, USAGE, ENVIRONMENT, INTERRUPTED, READER_GONE = 0, 1, 2, 3, 130, 141
MOST_CONFIG_BYTES, MOST_DIGITS = 1 << 24, 1000
Answer = Callable[[Any], None]

app = typer.Typer(
    name="amk",
    help="Compiles a decoder model into one persistent CUDA megakernel, proves it, checks it and measures it.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

MODEL_HELP = "a built-in name, checkpoint folder, GGUF file or HuggingFace id; with @int8, @int4-g128, ... quantised, with @fp16 converted"
Model = Annotated[str, typer.Argument(help=MODEL_HELP, show_default=False)]
Gpu = Annotated[str | None, typer.Option(help="the target; the live card, else h200, where none is named", show_default=False)]
Device = Annotated[str, typer.Option(help="where to judge: auto, cuda or cpu")]
ConfigFile = Annotated[
    str | None, typer.Option("--config", metavar="FILE|-", help="the ScheduleConfig as JSON; - reads stdin", show_default=False)
]
Batch = Annotated[int, typer.Option(help="rows that are decoded side by side, each at a position of its own: 1, 8 or 16")]
Results = Annotated[str, typer.Option("--results", metavar="FILE", help="results.tsv to add to; trials and corpus lie beside it")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON instead of a table")]


@app.command()
def propose(model: Model, gpu: Gpu = None) -> int:
    """The incumbent config, its id and the search space."""
    with _answers() as answer:
        answer(harness.propose(model, gpu))
    return OK


@app.command("eval")
def evaluate(
    model: Model,
    gpu: Gpu = None,
    config: ConfigFile = None,
    device: Device = "auto",
    batch: Batch = 1,
    results: Results = harness.RESULTS_PATH,
) -> int:
    """One verdict, of a single stream also written down as a trial; exits 0 only for a program that is valid and correct."""
    data = _read_config(config)
    with _answers() as answer:
        verdict = harness.evaluate(model, gpu, data, device, batch=batch, results_path=results, progress=_say)
        answer(verdict)
    return _judged(verdict)


@app.command()
def loop(
    model: Model,
    gpu: Gpu = None,
    budget: Annotated[int, typer.Option(help="configs to try")] = 8,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="seed of the search")] = 0,
    results: Results = harness.RESULTS_PATH,
) -> int:
    """Keep or revert over several configs; exits 0 if any of them is correct."""
    with _answers() as answer:
        found = harness.loop(
            model, gpu, budget, device, seed=seed, results_path=results, on_trial=lambda row: _say(_trial_line(row, budget)), progress=_say
        )
        answer(found)
    return OK if found["n_correct"] else FAILED


@app.command("compile")
def compile_model(
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", metavar="DIR", help="folder for program, kernel and report", show_default=False)],
    gpu: Gpu = None,
    config: ConfigFile = None,
    device: Device = "auto",
) -> int:
    """Import, lower, prove, judge, build and measure; writes program, kernel and report."""
    data = _read_config(config)
    with _answers() as answer:
        built = harness.compile_model(model, gpu, out, data, device, progress=_say)
        answer(built)
    return _judged(built["verdict"])


@app.command()
def generate(
    model: Model,
    gpu: Gpu = None,
    prompt: Annotated[str | None, typer.Option(help="text to continue", show_default=False)] = None,
    prompt_ids: Annotated[str | None, typer.Option(metavar="1,2,3", help="token ids to continue", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(help="new tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token; above, tokens are drawn")] = 0.0,
    top_k: Annotated[int, typer.Option(help="draw from the k most likely tokens; 0 from all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the fewest tokens that have this probability together")] = 1.0,
    min_p: Annotated[float, typer.Option(help="draw from tokens at least this much as likely as the likeliest")] = 0.0,
    seed: Annotated[int, typer.Option(help="of the draws: the same seed gives the same tokens")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="text to stop at; may be given again", show_default=False)] = None,
    verify: Annotated[bool, typer.Option("--verify", help="compare the tokens with the source model's")] = False,
    stream: Annotated[bool, typer.Option("--stream", help="one JSON line a token, then the result")] = False,
    config: ConfigFile = None,
    device: Device = "auto",
) -> int:
    """Tokens from the megakernel; with --verify exits 1 where they differ from the source model's choice."""
    ids, data = _whole_numbers(prompt_ids, "--prompt-ids"), _read_config(config)
    with _answers() as answer:

        def on_token(index: int, token: int, text: str) -> None:
            answer({"index": index, "token": token, "text": text})

        result = harness.generate(
            model,
            gpu,
            prompt=prompt,
            prompt_ids=ids,
            max_tokens=max_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            stop=stop or (),
            verify=verify,
            config_dict=data,
            device=device,
            on_token=on_token if stream else None,
            progress=_say,
        )
        answer(result)
    return FAILED if result["matches_eager"] is False else OK


@app.command()
def bench(
    model: Model,
    gpu: Gpu = None,
    positions: Annotated[str, typer.Option(metavar="P,P,...", help="token positions to measure at")] = "16,128,1024",
    batch: Batch = 1,
    baselines: Annotated[bool, typer.Option("--baselines", help="with CUDA-graphed transformers and torch.compile beside it")] = False,
    config: ConfigFile = None,
    device: Device = "auto",
) -> int:
    """A latency at each position, of a program found correct in the same run."""
    places, data = _whole_numbers(positions, "--positions"), _read_config(config)
    with _answers() as answer:
        table = harness.bench(
            model, gpu, positions=places or (), batch=batch, baselines=baselines, config_dict=data, device=device, progress=_say
        )
        answer(table)
    _print_latencies(table)
    return _judged(table["verdict"])


@app.command()
def trace(
    model: Model,
    out: Annotated[str, typer.Option("--out", "-o", metavar="FILE", help="the timeline, for ui.perfetto.dev", show_default=False)],
    position: Annotated[int, typer.Option(min=0, help="position of the token that is traced")] = 128,
    gpu: Gpu = None,
    config: ConfigFile = None,
    device: Device = "auto",
) -> int:
    """A timeline of every SM's actors in one token, and where its time went; needs a card."""
    data = _read_config(config)
    with _answers() as answer:
        found = harness.trace(model, out, gpu, position=position, config_dict=data, device=device, progress=_say)
        answer(found)
    _print_phases(found)
    return _judged(found["verdict"])


@app.command()
def doctor(as_json: AsJson = False) -> int:
    """What this machine offers: packages, compiler, card."""
    with _answers() as answer:
        facts = harness.doctor()
        if as_json:
            answer(facts)
    if not as_json:
        _print_facts(facts)
    return OK if facts["ready"]["cpu"] else ENVIRONMENT


@app.command()
def knobs(as_json: AsJson = False) -> int:
    """Every knob of the config: choices, default, meaning and what consumes it."""
    with _answers() as answer:
        table = harness.knobs()
        if as_json:
            answer(table)
    if not as_json:
        _print_knobs(table)
    return OK


@app.command()
def verify(
    programs: Annotated[int, typer.Option(help="random small programs")] = 2000,
    mutants: Annotated[int, typer.Option(help="mutants of real lowerings")] = 400,
    seed: Annotated[int, typer.Option(help="seed of the programs")] = 0,
    minutes: Annotated[float | None, typer.Option(help="stop after this time", show_default=False)] = None,
) -> int:
    """Measures the validator against what programs really do; exits 1 for any false accept, too many false rejects, or no case at all."""
    with _answers() as answer:
        result = harness.verify(programs=programs, mutants=mutants, seed=seed, minutes=minutes, progress=_tenths())
        answer(result)
    if not (result["programs"]["cases"] or result["mutants"]["cases"]):
        _say("no case was judged" + ("" if minutes is None else f" in {minutes:g} minutes: give more of them"))
    return OK if result["passed"] else FAILED


def _judged(verdict: dict[str, Any]) -> int:
    if verdict["valid"] and verdict["correct"]:
        return OK
    _say(f"{verdict['status']}: {verdict['rejected_reason'] or '; '.join(verdict['notes'])}")
    return FAILED


def _read_config(source: str | None) -> dict[str, Any] | None:
    """The config in a file, or on stdin for "-"; a usage error for anything but one JSON object without repeated keys."""
    if source is None:
        return None
    try:
        data = _read_bytes(source).decode("utf-8-sig")
        config = json.loads(
            data, parse_constant=_no_constant, parse_float=_finite_number, parse_int=_short_number, object_pairs_hook=unique_keys
        )
    except OSError as problem:
        _refuse("--config", f"must be a readable file, but {source!r} is not: {problem.strerror}")
    except (ValueError, RecursionError) as problem:
        where = "stdin" if source == "-" else source
        _refuse("--config", f"must be JSON, but {where} is not: {problem}")
    if not isinstance(config, dict):
        _refuse("--config", f"must be a JSON object, but got {json.dumps(config)[:60]}")
    return config


def _read_bytes(source: str) -> bytes:
    """The file's content, or stdin's; a usage error for one that is closed or has no end."""
    if source == "-" and sys.stdin is None:
        _refuse("--config", "must come on stdin for -, but stdin is closed")
    with nullcontext(sys.stdin.buffer) if source == "-" else open(source, "rb") as file:
        data = file.read(MOST_CONFIG_BYTES + 1)
    if len(data) > MOST_CONFIG_BYTES:
        _refuse("--config", f"must be at most {MOST_CONFIG_BYTES >> 20} MiB of JSON, but {source} is longer")
    return data


def _short_number(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"{text[:20]}... has {len(text)} digits")
    return int(text)


def _finite_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _whole_numbers(text: str | None, option: str) -> list[int] | None:
    """ "1,2,3" as numbers; a usage error names the first piece that is none."""
    if text is None:
        return None
    numbers = []
    for piece in text.split(","):
        if not (piece.strip().isascii() and piece.strip().isdigit()):
            _refuse(option, f"must be whole numbers with commas between them, but got {piece.strip()!r}")
        if len(piece) > MOST_DIGITS:
            _refuse(option, f"must be whole numbers that are token ids, but got one of {len(piece)} digits")
        numbers.append(int(piece))
    return numbers


class BadOption(Exception):
    """The value of an option is not what it must be."""

    exit_code = USAGE


def _refuse(option: str, sentence: str) -> NoReturn:
    raise BadOption(f"{option}: {sentence}")


def _say(text: str) -> None:
    """Progress, tables and errors. Work does not end because nobody listens to it."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")


def _tenths() -> Callable[[int, int], None]:
    """Progress of many cases: a line whenever another tenth of them is done."""
    said = 0

    def tell(done: int, wanted: int) -> None:
        nonlocal said
        if wanted and done * 10 // wanted > said:
            said = done * 10 // wanted
            _say(f"judged {done} of {wanted} cases")

    return tell


def _trial_line(row: dict[str, Any], budget: int) -> str:
    latency = "" if row["latency_us"] is None else f", {row['latency_us']:.1f} us {row['latency_kind']}"
    return f"trial {row['trial'] + 1}/{budget} ({row['source']}): {row['status']}{latency}, {row['tag']}"


@contextmanager
def _answers() -> Iterator[Answer]:
    """Gives the one writer to stdout. What libraries, compilers and child processes write there meanwhile goes to stderr."""
    own: TextIO = sys.stdout
    if own is not sys.__stdout__:  # but a caller's stream, which no descriptor reaches
        with redirect_stdout(sys.stderr):
            yield lambda value: print(_json(value), file=own, flush=True)
        return
    own.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)
    try:
        yield lambda value: _write_all(descriptor, _json(value, os.isatty(descriptor)).encode() + b"\n")
    finally:
        own.flush()
        os.dup2(descriptor, 1)
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    """Nothing is kept back that a later write would try again."""
    while data:
        data = data[os.write(descriptor, data) :]


def _json(value: Any, spread: bool = False) -> str:
    """One line, so that a stream of values is one value a line; spread out where a person reads it."""
    return json.dumps(_finite(value), indent=2 if spread else None, allow_nan=False)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity, which errors of a diverged program may be: they become null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_facts(facts: dict[str, Any]) -> None:
    table = Table("what", "found", title="amk doctor")
    for name, value in facts.items():
        if not isinstance(value, dict):
            table.add_row(name, "none" if value is None else str(value))
            continue
        for part, found in value.items():
            table.add_row(f"{name}: {part}", {None: "missing", True: "yes", False: "no"}.get(found, str(found)))
    Console().print(table)


def _print_knobs(rows: list[dict[str, Any]]) -> None:
    table = Table(title="knobs of the ScheduleConfig", show_lines=True)
    table.add_column("knob", no_wrap=True)
    for title in ("values", "default", "meaning"):
        table.add_column(title, overflow="fold")
    for row in rows:
        values = ", ".join(map(json.dumps, row["choices"])) or row["type"]
        unit = f" ({row['unit']})" if row["unit"] else ""
        table.add_row(row["name"], values, json.dumps(row["default"]), f"{row['meaning']}{unit}; read by {row['consumer']}")
    Console().print(table)


def _print_latencies(result: dict[str, Any]) -> None:
    """The latency table on stderr, one column a baseline, and what became of those without a time."""
    rows = result["rows"]
    names = list(dict.fromkeys(b["name"] for row in rows for b in row["baselines"]))
    if not rows:
        return
    batch = result["verdict"]["batch"]
    table = Table(
        "position", "us/token" if batch == 1 else "us/step", "share of floor", *names, title=f"{result['model']} on {result['gpu']}"
    )
    for row in rows:
        cells = {b["name"]: _baseline_cell(b) for b in row["baselines"]}
        share = "" if row["pct_of_roofline"] is None else f"{row['pct_of_roofline']:.1f} %"
        table.add_row(str(row["position"]), _latency_cell(row), share, *(cells[name] for name in names))
    Console(stderr=True).print(table)
    for row in rows:
        for baseline in row["baselines"]:
            _say(f"position {row['position']}, {baseline['name']}: {baseline['reason'] or baseline['form']}")


def _print_phases(found: dict[str, Any]) -> None:
    """Where the traced token's time went, on stderr."""
    phases = ("wait", "load", "compute", "publish")
    if found["file"] is None:
        return
    title = f"{found['model']}, position {found['position']}: us of {found['traced_us']:.1f} traced (not a latency)"
    table = Table("task", "actor", *phases, title=title)
    for row in [*({"task": "all"} | row for row in found["by_actor"]), *found["by_task"]]:
        table.add_row(row["task"], row["actor"], *(f"{row[f'{phase}_us']:.1f}" for phase in phases))
    Console(stderr=True).print(table)
    if found["lost_events"]:
        _say(f"{found['lost_events']} events found no room: the timeline has gaps")
    _say(f"timeline: {found['file']}")


def _latency_cell(row: dict[str, Any]) -> str:
    if row["latency_us"] is None:
        return "under the floor"
    return f"{row['latency_us']:.1f}" + (" (predicted)" if row["latency_kind"] == "predicted" else "")


def _baseline_cell(baseline: dict[str, Any]) -> str:
    if baseline["latency_us"] is None:
        return str(baseline["status"])
    ratio = "" if baseline["ratio"] is None else f" ({baseline['ratio']:.2f}x)"
    return f"{baseline['latency_us']:.1f}{ratio}"


def _outcome_of(error: Exception) -> tuple[int, str]:
    """Exit code and sentence for what a verb raised."""
    if isinstance(code := getattr(error, "exit_code", None), int):
        own = getattr(error, "format_message", None)
        return code, _usage(own()) if own else str(error)
    if isinstance(error, ImportError):
        return ENVIRONMENT, f"a package is missing or broken: {error}; install automegakernel with its dependencies"
    if isinstance(error, OSError):
        return ENVIRONMENT, f"a file or the system failed: {error}{_cache_hint(error)}"
    if isinstance(error, MemoryError):
        return ENVIRONMENT, f"out of memory: {error}"
    return ENVIRONMENT, f"internal error: {type(error).__name__}: {error}; AMK_DEBUG=1 shows where"


def _cache_hint(error: OSError) -> str:
    """What to do where it is the cache that cannot be used."""
    root = cache_root()
    if not (isinstance(error.filename, str) and Path(error.filename).is_relative_to(root)):
        return ""
    return f"; the cache {root} must be a folder that can be written: set AMK_CACHE to one"


def _usage(message: str) -> str:
    """What Typer says of a command line, as one sentence."""
    plain = message.removeprefix("Invalid value for ").replace(". Did you mean", ", did you mean").rstrip(".?")
    return f"{plain}; see amk --help"


def _fail(code: int, text: str) -> int:
    sentence = " ".join(text.split())
    print(_json({"error": sentence}, sys.stdout.isatty()), flush=True)
    _say(sentence)
    return code


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line (the process's own where None is given) and returns its exit code; nothing is raised."""
    try:
        return _run(arguments)
    except BrokenPipeError:
        return READER_GONE
    except OSError as problem:
        _say(f"stdout must take the answer, but does not: {problem.strerror}")
        return ENVIRONMENT


def _run(arguments: Sequence[str] | None) -> int:
    """As `run`; OSError where stdout cannot be written."""
    try:
        code = app(args=arguments, prog_name="amk", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except SystemExit as ended:  # Typer and Rich end so where stdout is a pipe that nobody reads
        raise BrokenPipeError from ended
    except Exception as error:  # the edge: whatever went wrong ends as one sentence
        code, sentence = _outcome_of(error)
        if os.environ.get("AMK_DEBUG") == "1" and not hasattr(error, "exit_code"):
            raise
        return _fail(code, sentence)
    if code == INTERRUPTED:
        return _fail(INTERRUPTED, "interrupted")
    return int(code or OK)


def main() -> NoReturn:
    sys.stdout = sys.stdout or open(os.devnull, "w")  # None where the caller has closed it
    sys.stderr = sys.stderr or open(os.devnull, "w")
    # Before torch is loaded: where two commands share the cores, its threads would spin for each other. amk_bootstrap does the same.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run()
    try:
        sys.stdout.flush()
    except OSError:  # or Python would try again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


if __name__ == "__main__":
    main()
