"""Measures the validator in full (50,000 random programs, 5,000 mutants of lowerings) and writes results/soundness.json.

python amk_bootstrap.py amk.dev.verify_full [--programs N] [--mutants N] [--seed N] [--processes N] [--out FILE]

Of fewer cases nothing is written unless --out names a file: what is published is the full run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from amk.dev.asked import at_least, writable
from amk.dev.provenance import write_results
from amk.eval.soundness.verify import run_verify

FULL = {"programs": 50_000, "mutants": 5_000}
LEAST = {"programs": 0, "mutants": 0, "processes": 1}
OUTPUT = Path(__file__).resolve().parents[1] / "results" / "soundness.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**FULL, "seed": 0, "processes": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="the results file; results/soundness.json for a full run")
    asked = parser.parse_args()
    for name, least in LEAST.items():
        at_least(parser, name, getattr(asked, name), least)
    writable(parser, asked.out)
    if asked.programs + asked.mutants == 0:
        parser.error("--programs and --mutants: must be at least one case together, but got none")
    full = all(getattr(asked, name) >= count for name, count in FULL.items())
    out = asked.out or (OUTPUT if full else None)
    result = run_verify(asked.programs, asked.mutants, asked.seed, progress=_tell, processes=asked.processes)
    if out:
        write_results(out, result)
    print(f"\n{'passed' if result['passed'] else 'FAILED'} in {result['seconds']} s; {f'see {out}' if out else 'nothing is written'}")
    return 0 if result["passed"] else 1


def _tell(done: int, wanted: int) -> None:
    print(f"\r{done} of {wanted} cases", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
