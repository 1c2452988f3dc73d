"""Proves the import order of the packages by reading every import and `#include` as text; nothing is executed.

    isa < schedule < {models | vm} < eval < flywheel < harness < amk_cli

A module imports its own package and those below it, absolutely, at module level. torch and transformers may load lazily.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Layers of one rank do not know each other. The root re-exports the harness and is imported by users only.
RANK: dict[str, int] = {
    "isa": 0,
    "schedule": 1,
    "models": 2,
    "vm": 2,
    "eval": 3,
    "flywheel": 4,
    "harness": 5,
    "amk_cli": 6,
    "__init__": 7,
}
LAZY_EXPORTS = "__init__"

# Libraries that a layer may import, at any depth; a layer that is not listed may import any but transformers.
LIBRARIES: dict[str, frozenset[str]] = {
    "isa": frozenset({"numpy"}),
    "schedule": frozenset({"numpy"}),
    "models": frozenset({"numpy", "torch", "transformers", "safetensors", "gguf", "tokenizers", "huggingface_hub"}),
    "vm": frozenset({"numpy", "torch", "cuda"}),
    "eval": frozenset({"numpy", "torch", "cuda"}),
}
# Slow to load: never at module level of anything that `amk --help` imports.
SLOW_LIBRARIES = frozenset({"torch", "transformers"})

INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*[<"]([^">]+)[">]', re.MULTILINE)


@dataclass(frozen=True)
class Import:
    """One import as written: `name` is the dotted module, `lazy` that it stands inside a function, `guarded` under TYPE_CHECKING."""

    name: str
    line: int
    lazy: bool = False
    guarded: bool = False
    relative: bool = False


@dataclass(frozen=True)
class Violation:
    path: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


def violations(root: Path) -> list[Violation]:
    """Everything in the layers under `root` that breaks the order, by path and line."""
    found: list[Violation] = []
    for path in _files(root):
        where = path.relative_to(root)
        layer = _layer(where)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py":
            reasons = _python_reasons(root, layer, where, text)
        else:
            reasons = _include_reasons(root, layer, where, text)
        found += [Violation(str(where), line, reason) for line, reason in reasons]
    return sorted(found, key=lambda v: (v.path, v.line))


def _files(root: Path) -> Iterator[Path]:
    """Python and CUDA sources of every layer that exists."""
    for layer in RANK:
        if (root / f"{layer}.py").is_file():
            yield root / f"{layer}.py"
        for pattern in ("*.py", "*.cuh", "*.cu", "*.h"):
            yield from sorted((root / layer).rglob(pattern))


def _layer(where: Path) -> str:
    return where.parts[0].removesuffix(".py")


def imports(tree: ast.Module) -> list[Import]:
    """Every import of a module: statements at any depth, and `import_module` or `__import__` of a text known from its beginning."""
    found: list[Import] = []
    _collect(tree, Import("", 0), found)
    return found


def _collect(node: ast.AST, scope: Import, found: list[Import]) -> None:
    for child in ast.iter_child_nodes(node):
        found += _named_by(child, scope)
        _collect(child, _scope_inside(child, scope), found)


def _scope_inside(node: ast.AST, scope: Import) -> Import:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        return Import("", 0, lazy=True, guarded=scope.guarded)
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        return Import("", 0, lazy=scope.lazy, guarded=True)
    return scope


def _named_by(node: ast.AST, scope: Import) -> list[Import]:
    def found(name: str, line: int, relative: bool = False) -> Import:
        return Import(name, line, scope.lazy, scope.guarded, relative)

    if isinstance(node, ast.Import):
        return [found(alias.name, node.lineno) for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        if node.level:
            return [found("." * node.level + (node.module or ""), node.lineno, relative=True)]
        if node.module == "amk":  # `from amk import vm` names the module amk.vm
            return [found(f"amk.{alias.name}", node.lineno) for alias in node.names]
        return [found(node.module or "", node.lineno)]
    if isinstance(node, ast.Call) and ast.unparse(node.func).rsplit(".", 1)[-1] in ("import_module", "__import__") and node.args:
        name = _known_beginning(node.args[0])
        return [found(name, node.lineno, relative=name.startswith("."))] if name else []
    return []


def _known_beginning(argument: ast.expr) -> str:
    """The text that a string expression certainly begins with."""
    if isinstance(argument, ast.JoinedStr) and argument.values:
        argument = argument.values[0]
    if isinstance(argument, ast.BinOp) and isinstance(argument.op, ast.Add):
        return _known_beginning(argument.left)
    return argument.value if isinstance(argument, ast.Constant) and isinstance(argument.value, str) else ""


def _python_reasons(root: Path, layer: str, where: Path, text: str) -> Iterator[tuple[int, str]]:
    for found in imports(ast.parse(text, filename=str(where))):
        for rule in (_relative, _bare_name, _order, _lazy, _library):
            if reason := rule(layer, found):
                yield found.line, reason
                break


def _relative(layer: str, found: Import) -> str:
    return f"imports must be absolute, but got {found.name}; write amk.<package>" if found.relative else ""


def _bare_name(layer: str, found: Import) -> str:
    first = found.name.split(".")[0]
    return f"our packages are imported as amk.{first}, but got {found.name}" if first in RANK else ""


def _order(layer: str, found: Import) -> str:
    target = _own_layer(found)
    if target is None or _may_use(layer, target):
        return ""
    if target not in RANK:
        return f"{layer} may import only layers, but {found.name} is none of {', '.join(RANK)}"
    return f"{layer} must not import {target}: it is not below {layer}; move what is needed down"


def _own_layer(found: Import) -> str | None:
    parts = found.name.split(".")
    if parts[0] != "amk":
        return None
    return parts[1] if len(parts) > 1 else LAZY_EXPORTS


def _may_use(layer: str, target: str) -> bool:
    return target == layer or RANK.get(target, len(RANK)) < RANK[layer]


def _lazy(layer: str, found: Import) -> str:
    target = _own_layer(found)
    own_registry = target == layer and found.name.endswith(".")  # a package that finds its own modules by looking
    if target is None or not found.lazy or own_registry or layer == LAZY_EXPORTS:
        return ""
    return f"our own modules are imported at module level, but {found.name} is imported inside a function"


def _library(layer: str, found: Import) -> str:
    library = found.name.split(".")[0]
    if library in sys.stdlib_module_names or library in ("amk", ""):
        return ""
    if library == "amk_bootstrap":
        return "" if RANK[layer] > RANK["harness"] else "only scripts in the root may need amk_bootstrap"
    if library == "transformers" and layer != "models":
        return "only models imports transformers; ask it for what is needed"
    allowed = LIBRARIES.get(layer)
    if allowed is not None and library not in allowed:
        return f"{layer} may import {', '.join(sorted(allowed))} and the standard library, but got {found.name}"
    if library in SLOW_LIBRARIES and not (found.lazy or found.guarded):
        return f"{library} must load lazily, inside the function that needs it, so that `amk --help` starts without it"
    return ""


def _include_reasons(root: Path, layer: str, where: Path, text: str) -> Iterator[tuple[int, str]]:
    """Includes that name a file of a layer which is not below; names that no file has are the compiler's or generated."""
    for match in INCLUDE.finditer(text):
        target = _included(root, where, match[1])
        if target is None or (target in RANK and _may_use(layer, target)):
            continue
        yield text.count("\n", 0, match.start()) + 1, f"{layer} must not include {match[1]}: {target} is not below {layer}"


def _included(root: Path, where: Path, name: str) -> str | None:
    """The layer of the file that an include reaches: beside the includer, from the root, or from any folder of a layer."""
    for base in (root / where.parent, root, *(root / layer for layer in RANK)):
        target = (base / name.removeprefix("amk/")).resolve()
        if target.is_file() and target.is_relative_to(root.resolve()):
            return _layer(target.relative_to(root.resolve()))
    return None


def main(report: Callable[[str], None] = print) -> int:
    """Print every violation of this checkout; 1 if there is one."""
    found = violations(ROOT)
    for violation in found:
        report(str(violation))
    report(f"import order: {len(found)} violations in {sum(1 for _ in _files(ROOT))} files")
    return 1 if found else 0


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
