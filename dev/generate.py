"""Writes the files that are rendered from a table in the code; `--check` only says which would change.

To add a generated file, add its path and the function that renders it to GENERATED.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from amk.dev import draw_machine, knob_page, readme_table
from amk.eval.shapes import SHAPES, result_schema
from amk.schedule.render import config_schema, knob_table_markdown

ROOT = Path(__file__).resolve().parents[1]
Render = Callable[[], str]


def _schema_file(schema: Callable[[], dict[str, Any]]) -> Render:
    def render() -> str:
        return json.dumps(schema(), indent=2) + "\n"

    source = schema.func if isinstance(schema, partial) else schema
    render.__module__, render.__qualname__ = source.__module__, source.__qualname__
    return render


# Path from the root -> the whole text of that file.
GENERATED: dict[str, Render] = {
    "README.md": readme_table.render,
    "docs/images/machine.svg": draw_machine.render,
    "docs/knob-effects.md": knob_page.render,
    "docs/knobs.md": knob_table_markdown,
    "schemas/schedule_config.json": _schema_file(config_schema),
    **{f"schemas/{name}.json": _schema_file(partial(result_schema, name)) for name in SHAPES},
}
# Folders that hold generated files only: one without an entry above has lost its maker.
GENERATED_FOLDERS = ("schemas",)


def outdated(root: Path, generated: Mapping[str, Render]) -> list[str]:
    """One sentence for each generated file that is missing, differs from what its function renders, or has no function."""
    found = []
    for name, render in generated.items():
        path = root / name
        if not path.is_file():
            found.append(f"{name} must exist: run `make generate` and commit it")
        elif path.read_text(encoding="utf-8") != render():
            found.append(f"{name} must be what {render.__module__}.{render.__qualname__} renders: run `make generate` and commit it")
    return found + [f"{name} must have an entry in dev/generate.py, or be deleted" for name in _orphans(root, generated)]


def _orphans(root: Path, generated: Mapping[str, Render]) -> list[str]:
    files = (path for folder in GENERATED_FOLDERS for path in sorted((root / folder).rglob("*")))
    return [name for path in files if path.is_file() and (name := path.relative_to(root).as_posix()) not in generated]


def write(root: Path, generated: Mapping[str, Render]) -> None:
    """Render every file into `root`."""
    for name, render in generated.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """1 if `--check` finds a file that differs, else 0."""
    parser = argparse.ArgumentParser(prog="python -m amk.dev.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file would change")
    if not parser.parse_args(arguments).check:
        write(ROOT, GENERATED)
    found = outdated(ROOT, GENERATED)
    for sentence in found:
        print(sentence)
    print(f"generated files: {len(found)} of {len(GENERATED)} outdated")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
