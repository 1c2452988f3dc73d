"""Measures the validator in full (50,000 random programs, 5,000 mutants of lowerings) and writes results/soundness.json.

python -m amk.dev.verify_full [--programs N] [--mutants N] [--seed N] [--processes N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from amk.dev.provenance import write_results
from amk.eval.soundness.verify import run_verify

OUTPUT = Path(__file__).resolve().parents[1] / "results" / "soundness.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("programs", 50_000), ("mutants", 5_000), ("seed", 0), ("processes", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    result = run_verify(asked.programs, asked.mutants, asked.seed, progress=_tell, processes=asked.processes)
    write_results(OUTPUT, result)
    print(f"\n{'passed' if result['passed'] else 'FAILED'} in {result['seconds']} s; see {OUTPUT}")
    return 0 if result["passed"] else 1


def _tell(done: int, wanted: int) -> None:
    print(f"\r{done} of {wanted} cases", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
