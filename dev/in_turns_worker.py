"""One checkout's program on the live card, for dev/in_turns.py: says that it is ready, then takes a sample for each line that it is sent.

It runs as a file, with another checkout's `amk` on the path, and says everything in JSON, a line each. It does not take the card's lock,
which in_turns.py holds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO

from amk.dev.bench_gpu import dry_machine
from amk.dev.judged import NotCorrect, judged
from amk.eval.bench import launch_start, launch_us
from amk.eval.card import choose
from amk.eval.errors import EvalError
from amk.eval.session import Session
from amk.models.errors import ModelError
from amk.vm.build import BuildFailed
from amk.vm.cuda import CudaVM
from amk.vm.interface import LaunchFailed

FACTS = ("program_digest", "binary_digest", "outputs_sha256", "tolerance_used", "registers")


def made(asked: argparse.Namespace) -> tuple[CudaVM, dict[str, Any]]:
    """The machine that is timed, and what is known of it: of a program that was judged, or of a build without memory traffic."""
    session = Session(asked.model, choose(None, "cuda"))
    candidate = session.prepare(json.loads(asked.config), asked.context)
    if not asked.chain:
        entry = judged(session, candidate, asked.config)
        assert isinstance(entry.machine, CudaVM)
        return entry.machine, {name: entry.facts[name] for name in FACTS}
    if candidate.program is None:
        raise NotCorrect("; ".join(candidate.rejections))
    machine = dry_machine(session, candidate.program)
    binary = machine.kernel.binary
    return machine, {"program_digest": candidate.facts.program_digest, "binary_digest": binary.digest, "registers": binary.registers}


def serve(make: Callable[[], tuple[Callable[[], float], dict[str, Any]]], asked: TextIO, told: TextIO) -> None:
    """Tells what `make` says of its sampler, or why there is none; then a sample in microseconds for each line of `asked`."""

    def tell(**what: Any) -> None:
        print(json.dumps(what), file=told, flush=True)

    try:
        sample, facts = make()
        tell(facts=facts)
        for _ in asked:
            tell(us=sample())
    except (NotCorrect, LaunchFailed, BuildFailed, EvalError, ModelError) as problem:  # of dev/on_card, which older checkouts lack
        tell(problem=str(problem))


def sampler(asked: argparse.Namespace) -> tuple[Callable[[], float], dict[str, Any]]:
    machine, facts = made(asked)
    return partial(launch_us, machine, *launch_start(asked.position, machine.context)), facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--config", default="{}")
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--position", type=int, required=True)
    parser.add_argument("--chain", action="store_true")
    asked = parser.parse_args()
    told, sys.stdout = sys.stdout, sys.stderr  # whatever else prints must not be taken for an answer
    serve(partial(sampler, asked), sys.stdin, told)


if __name__ == "__main__":
    main()
