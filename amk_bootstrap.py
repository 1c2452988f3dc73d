"""Makes `import amk` mean this checkout, installed or not, whatever its folder is called.

A script in the root that may run uninstalled begins with

    if __name__ == "__main__" and not __package__:
        import amk_bootstrap

        amk_bootstrap.register()

and any module runs with `python amk_bootstrap.py MODULE [ARG...]`, for example `python amk_bootstrap.py pytest -m cuda`.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
STAND_IN = str(ROOT / "dev" / "checkout")


def register() -> None:
    """Put the stand-in package first on the path of this process and of every process that it starts.

    The root itself leaves this process's path: there `schedule`, `eval` and `vm` would be importable under those bare names. Threads of
    torch, which is loaded later, sleep while they wait, unless OMP_WAIT_POLICY is set: in processes that share cores they would spin.
    """
    sys.path[:] = [STAND_IN, *(entry for entry in sys.path if entry != STAND_IN and Path(entry).resolve() != ROOT)]
    inherited = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry not in ("", STAND_IN)]
    os.environ["PYTHONPATH"] = os.pathsep.join([STAND_IN, *inherited])
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: list[str]) -> int:
    """Run the module named by the first argument as `python -m` would; 2 when none is named."""
    if not arguments:
        print("usage: python amk_bootstrap.py MODULE [ARG...]", file=sys.stderr)
        return 2
    register()
    sys.argv[:] = arguments
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
