"""`amk`: a thin command line over the harness. stdout carries JSON, stderr what people read, the exit code the outcome."""

from __future__ import annotations

if __name__ == "__main__" and not __package__:
    import amk_bootstrap

    amk_bootstrap.register()

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from amk import harness

DONE, JUDGED_AND_FAILED, USAGE, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 130

HELP = "AutoMegaKernel: one model, one megakernel."
app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=HELP)

MODELS = "toy, toy-2L, small, smollm2-135m, a shape name, a HuggingFace id, a checkpoint folder or a GGUF file"
Model = Annotated[str, typer.Argument(help=MODELS)]
Gpu = Annotated[str | None, typer.Option(help="target GPU; default: the live card, else h200")]
Device = Annotated[str, typer.Option(help="auto, cuda or cpu")]
ConfigFile = Annotated[str | None, typer.Option("--config", help="ScheduleConfig as a JSON file, - for stdin; default: the default")]


class CommandFailed(Exception):
    """What the user got wrong, or what the machine lacks: one sentence and an exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)


def put(result: Any) -> None:
    """One JSON object on stdout."""
    print(json.dumps(result, allow_nan=False), flush=True)


def read_config(source: str | None) -> Any:
    """The config's JSON data; CommandFailed (usage) if it cannot be read or is not an object."""
    if source is None:
        return None
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise CommandFailed(f"config: must be a readable file, but {source} is not: {problem}", USAGE) from problem
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as problem:
        raise CommandFailed(f"config: must be JSON, but {source} is not: {problem}", USAGE) from problem
    if not isinstance(config, dict):
        raise CommandFailed(f"config: must be a JSON object, but {source} holds a {type(config).__name__}", USAGE)
    return config


def read_integers(name: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as problem:
        raise CommandFailed(f"{name}: must be integers separated by commas, but got {text!r}", USAGE) from problem


def finish(passed: bool) -> None:
    """Ends the command with the outcome of a judgement."""
    raise typer.Exit(DONE if passed else JUDGED_AND_FAILED)


def passed(verdict: dict[str, Any]) -> bool:
    return bool(verdict["valid"]) and verdict["correct"] is True


def tell_verdict(verdict: dict[str, Any]) -> None:
    """The verdict in a line or two, on stderr."""
    say(f"{verdict['model']} on {verdict['gpu']} ({verdict['device']}): {verdict['status']}")
    if verdict["latency_us"] is not None:
        share = verdict["pct_of_roofline"]
        where = f"at position {verdict['latency_position']} ({verdict['latency_kind']})"
        say(f"{verdict['latency_us']:.1f} us a token {where}, {share:.1f} % of the roofline")
    for reason in (*verdict["rejections"], *verdict["notes"]):
        say(f"  {reason}")


@app.command()
def propose(
    model: Model,
    gpu: Gpu = None,
    config: Annotated[str | None, typer.Option("--incumbent", help="config to start from (JSON file or -)")] = None,
) -> None:
    """The incumbent config and everything that may be changed about it."""
    put(harness.propose(model, gpu, incumbent=read_config(config)))


@app.command("eval")
def evaluate(model: Model, gpu: Gpu = None, config: ConfigFile = None, device: Device = "auto") -> None:
    """One verdict; exit code 0 if the config is valid and the program correct."""
    verdict = harness.evaluate(model, gpu, read_config(config), device, progress=say)
    tell_verdict(verdict)
    put(verdict)
    finish(passed(verdict))


@app.command()
def loop(
    model: Model,
    gpu: Gpu = None,
    budget: Annotated[int, typer.Option(help="configs to try")] = 8,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="seed of the proposals")] = 0,
    results: Annotated[Path, typer.Option(help="log of trials; their folders go beside it")] = Path("workspace/results.tsv"),
    explore: Annotated[float, typer.Option(help="share of proposals drawn from the whole space")] = 0.35,
) -> None:
    """Keep or revert over a budget of configs."""

    def tell(row: dict[str, Any]) -> None:
        latency = "" if row["latency_us"] is None else f" {row['latency_us']:.1f} us ({row['latency_kind']})"
        say(f"trial {row['trial']} {row['source']}: {row['tag']}{latency}")

    corpus = results.with_name("corpus.jsonl")
    paths: dict[str, Any] = {"results_path": results, "corpus_path": corpus}
    result = harness.loop(model, gpu, budget, device, seed=seed, explore_fraction=explore, on_trial=tell, progress=say, **paths)
    put(result)
    finish(result["n_correct"] > 0)


@app.command("compile")
def compile_command(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to write into")],
    gpu: Gpu = None,
    config: ConfigFile = None,
    device: Device = "auto",
    regime: Annotated[str, typer.Option(help="what the program is compiled for: single-stream")] = harness.REGIME,
) -> None:
    """Import, lower, prove, judge, build, measure; writes program, kernel and report."""
    if regime != harness.REGIME:
        raise CommandFailed(f"regime: must be {harness.REGIME}, but got {regime!r}", USAGE)
    result = harness.compile_model(model, gpu, out, read_config(config), device, progress=say)
    tell_verdict(result["verdict"])
    put(result)
    finish(passed(result["verdict"]))


@app.command()
def generate(
    model: Model,
    gpu: Gpu = None,
    prompt: Annotated[str | None, typer.Option(help="text to continue")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="token ids to continue, separated by commas")] = None,
    max_tokens: Annotated[int, typer.Option(help="new tokens at most")] = 64,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends generation (may be given again)")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="one JSON object a token, then the result")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="compare with the source model")] = False,
    config: ConfigFile = None,
    device: Device = "auto",
) -> None:
    """Greedy tokens from the megakernel."""
    result = harness.generate(
        model,
        gpu,
        prompt=prompt,
        prompt_ids=None if prompt_ids is None else read_integers("prompt-ids", prompt_ids),
        max_tokens=max_tokens,
        stop=stop or (),
        verify=verify,
        config_dict=read_config(config),
        device=device,
        on_token=(lambda index, token, text: put({"index": index, "token": token, "text": text})) if stream else None,
        progress=say,
    )
    put(result)
    finish(result["matches_eager"] is not False)


@app.command()
def bench(
    model: Model,
    gpu: Gpu = None,
    positions: Annotated[str, typer.Option(help="positions of the KV cache, separated by commas")] = "16,128,1024",
    config: ConfigFile = None,
    device: Device = "auto",
) -> None:
    """A latency a position, beside the roofline."""
    wanted = read_integers("positions", positions)
    result = harness.bench(model, gpu, positions=wanted, config_dict=read_config(config), device=device, progress=say)
    put(result)
    finish(passed(result["verdict"]))


AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of a table")]


@app.command()
def doctor(json_only: AsJson = False) -> None:
    """What this machine offers."""
    facts = harness.doctor()
    if json_only:
        put(facts)
        return
    table = Table("what", "found", title="AutoMegaKernel doctor")
    for name, value in facts.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(name, shown)
    Console().print(table)


@app.command()
def knobs(json_only: AsJson = False) -> None:
    """The knob table."""
    found = harness.knobs()
    if json_only:
        put(found)
        return
    table = Table("knob", "values", "default", "meaning", "read by", title="Everything a config may change")
    for knob in found:
        table.add_row(knob["name"], ", ".join(map(str, knob["choices"])), str(knob["default"]), knob["meaning"], knob["consumer"])
    Console().print(table)


@app.command()
def verify(
    programs: Annotated[int, typer.Option(help="random small programs")] = 2000,
    mutants: Annotated[int, typer.Option(help="mutants of real lowerings")] = 400,
    seed: Annotated[int, typer.Option(help="seed of the cases")] = 0,
    minutes: Annotated[float | None, typer.Option(help="stop after so many minutes")] = None,
) -> None:
    """Measures the validator against an exhaustive explorer and a trace checker."""
    result = harness.verify(
        programs=programs, mutants=mutants, seed=seed, minutes=minutes, progress=lambda done, wanted: say(f"{done} of {wanted} cases")
    )
    put(result)
    finish(bool(result["passed"]))


def fail(message: str, exit_code: int) -> int:
    """One JSON object on stdout, one sentence on stderr."""
    sentence = " ".join(message.split())
    put({"error": sentence})
    say(f"amk: {sentence}")
    return exit_code


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command; nothing escapes as a traceback (AMK_DEBUG=1 lets it)."""
    command: Callable[..., Any] = typer.main.get_command(app)
    try:
        code = command(args=None if arguments is None else list(arguments), prog_name="amk", standalone_mode=False)
        return code if isinstance(code, int) else DONE
    except typer.Exit as end:
        return end.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return fail("interrupted", INTERRUPTED)
    except Exception as problem:
        if os.environ.get("AMK_DEBUG") == "1":
            raise
        return _fail_with(problem)


def _fail_with(problem: Exception) -> int:
    formatter = getattr(problem, "format_message", None)
    if callable(formatter):  # click's own usage errors
        return fail(str(formatter()) or f"usage: {type(problem).__name__}; see amk --help", USAGE)
    code = getattr(problem, "exit_code", None)
    if isinstance(code, int):
        return fail(str(problem), code)
    return fail(f"internal error: {type(problem).__name__}: {problem}; run again with AMK_DEBUG=1 for the traceback", ENVIRONMENT)


def main() -> None:
    sys.exit(run())


if __name__ == "__main__":
    main()
