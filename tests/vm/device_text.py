"""Reads constants out of the device code's text: `constexpr`, `#define`, enumerators and the fields of plain structs.

Expressions are those that the constants use: numbers, names, operators, `?:` and calls of `constexpr` functions of one `return`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np

from amk.isa.abi import C_TYPE, NUMPY_TYPE

ROOT = Path(__file__).resolve().parents[2]
COMMENT = re.compile(r"//[^\n]*")
DEFINE = re.compile(r"^#define (\w+) (\S.*)$", re.MULTILINE)
ENUM = re.compile(r"\benum (\w+)[^{;]*\{([^}]*)\}")
STRUCT = re.compile(r"\bstruct (\w+) \{([^}]*)\};")
CONSTANTS = re.compile(r"\bconstexpr (\w+) (\w+ = [^;{}]*);")
FUNCTION = re.compile(r"\bconstexpr \w+ (\w+)\(([^)]*)\) \{ return ([^;]*); \}")
SUFFIX = re.compile(r"\b(?:(0x[0-9A-Fa-f]+)u|([0-9.]+(?:e[+-]?\d+)?)[uf])\b")
NUMPY_OF = {C_TYPE[kind]: NUMPY_TYPE[kind] for kind in C_TYPE} | {"uint8_t": "u1"}
Environment = Mapping[str, Any]


def text_of(path: str) -> str:
    """A file of the checkout without its comments."""
    return COMMENT.sub("", (ROOT / path).read_text(encoding="utf-8"))


def enumerators(path: str, name: str) -> dict[str, int]:
    """What an enum's names are worth."""
    bodies = [body for found, body in ENUM.findall(text_of(path)) if found == name]
    assert len(bodies) == 1, f"{path} must define enum {name} once, but does {len(bodies)} times"
    return {word.strip(): int(value) for word, value in (part.split("=") for part in bodies[0].split(","))}


def struct_dtype(path: str, name: str) -> np.dtype[Any]:
    """A struct's numpy dtype, laid out as a C compiler does."""
    bodies = [body for found, body in STRUCT.findall(text_of(path)) if found == name]
    assert len(bodies) == 1, f"{path} must define struct {name} once, but does {len(bodies)} times"
    fields: list[tuple[str, Any]] = []
    for line in filter(None, (line.strip() for line in bodies[0].split(";"))):
        kind, _, names = line.partition(" ")
        for part in names.split(","):
            word, _, count = part.strip().rstrip("]").partition("[")
            fields.append((word, (NUMPY_OF[kind], int(count)) if count else NUMPY_OF[kind]))
    return np.dtype(fields, align=True)


@dataclass(frozen=True)
class Scope:
    """The constants of a file by name, then what is `given`, then the constants of other files that are compiled before it."""

    path: str
    given: Environment
    others: tuple[str, ...] = ()
    _known: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Any:
        own, functions = constants_of(self.path), functions_of(self.path)
        if name in own:
            kind, expression = own[name]
            if name not in self._known:
                value = evaluated(expression, self)
                self._known[name] = bool(value) if kind == "bool" else value
            return self._known[name]
        if name in functions:
            return _function(*functions[name], self)
        if name in self.given:
            return self.given[name]
        for path in self.others:
            if name in constants_of(path) or name in functions_of(path):
                return Scope(path, self.given, self.others)[name]
        raise KeyError(name)

    def __getattr__(self, name: str) -> Any:
        """`W::NAME`."""
        return self[name]

    def value(self, name: str) -> Any:
        """The constant that the file itself defines; AssertionError if it defines none of this name."""
        assert name in constants_of(self.path), f"{self.path} must define the constant {name}, but it is gone or has another name"
        return self[name]


@cache
def constants_of(path: str) -> dict[str, tuple[str, str]]:
    """Type and expression of each constant that the file's text defines once, whatever struct it stands in."""
    text = text_of(path)
    found = [("int", name, value) for name, value in DEFINE.findall(text)]
    found += [("int", name.strip(), value) for _, body in ENUM.findall(text) for name, value in (p.split("=") for p in body.split(","))]
    for kind, declared in CONSTANTS.findall(text):
        found += [(kind, *map(str.strip, part.split("=", 1))) for part in _parts(declared, ",") if "=" in part]
    names = [name for _, name, _ in found]
    return {name: (kind, value) for kind, name, value in found if names.count(name) == 1}


@cache
def functions_of(path: str) -> dict[str, tuple[list[str], str]]:
    """Parameters and result of each constexpr function of one `return`."""
    found = FUNCTION.findall(text_of(path))
    return {name: ([part.split()[-1] for part in parameters.split(",")], result) for name, parameters, result in found}


def _function(parameters: list[str], result: str, scope: Scope) -> Callable[..., Any]:
    return lambda *values: evaluated(result, Scope(scope.path, {**scope.given, **dict(zip(parameters, values, strict=True))}, scope.others))


def evaluated(expression: str, scope: Scope) -> Any:
    """What an expression is worth; whole numbers divide as in C, none is negative."""
    return eval(_in_python(expression), {"__builtins__": {}}, scope)


@cache
def _in_python(expression: str) -> CodeType:
    text = SUFFIX.sub(r"\1\2", expression.replace("::", "."))
    text = re.sub(r"!(?!=)", " not ", text.replace("&&", " and ").replace("||", " or ").replace("/", "//"))
    return compile(_choice(" ".join(text.split())), expression, "eval")


def _choice(text: str) -> str:
    """`a ? b : c` as Python has it."""
    condition, *rest = _parts(text, "?", 1)
    if not rest:
        return text
    chosen, otherwise = _parts(rest[0], ":", 1)
    return f"({chosen}) if ({condition}) else ({_choice(otherwise)})"


def _parts(text: str, separator: str, most: int = -1) -> list[str]:
    """The text between separators that stand in no parentheses, split at most so often."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == separator and not depth and most:
            parts.append("")
            most -= 1
        else:
            parts[-1] += character
    return parts
