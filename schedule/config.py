"""Configs from and to plain JSON data: all problems at once, the canonical form, and the configs one step away."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amk.schedule.knobs import FIELD_OF, KNOBS, RULES, Assignment, Config, Knob
from amk.schedule.rejection import Rejection, label, reject, show


def _tree() -> dict[str, Any]:
    """The nested form of a config with its knob at each leaf."""
    tree: dict[str, Any] = {}
    for knob in KNOBS:
        *groups, leaf = knob.name.split(".")
        node = tree
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = knob
    return tree


TREE = _tree()


def parse_config(obj: Any) -> Config | list[Rejection]:
    """The config that JSON data describes (missing keys take their defaults), or every problem it has; never raises."""
    values: dict[str, Any] = {}
    problems: list[Rejection] = []
    _parse_node(TREE, "", obj, values, problems)
    config, misread = Config(**values), [problem.key for problem in problems]
    judged = [rule for rule in RULES if not any(_concerns(key, knob) for key in misread for knob in rule.knobs)]
    problems += [problem for rule in judged if (problem := rule.check(config)) is not None]
    return problems or config


def _concerns(key: str, knob: str) -> bool:
    """Whether what is wrong with `key` leaves the knob's value unknown: it is the knob, a group around it, or an entry of its map."""
    return key == knob or knob.startswith(f"{key}.") or key.startswith(f"{knob}.")


def _parse_node(tree: dict[str, Any], at: str, obj: Any, values: dict[str, Any], problems: list[Rejection]) -> None:
    if type(obj) is not dict:
        problems.append(reject(at or "config", obj, f"an object with keys of {show(tuple(tree))}"))
        return
    for key, value in obj.items():
        name = f"{at}.{key}" if at and type(key) is str else key
        node = tree.get(key) if type(key) is str else None
        if node is None:
            problems.append(_unknown_key(tree, at, key, value))
        elif isinstance(node, Knob):
            values[FIELD_OF[node.name]], found = node.parse(value)
            problems += found
        else:
            _parse_node(node, name, value, values, problems)


def _unknown_key(tree: dict[str, Any], at: str, key: Any, value: Any) -> Rejection:
    shown = key if type(key) is str and len(key) <= 80 else show(key)
    where, allowed = f"{at}.{shown}" if at else shown, ", ".join(tree)
    group = label(at) if at else "config"
    return Rejection(where, show(value), allowed, f"{group}: unknown key {show(key)} ({show(value)}); allowed keys are {allowed}")


def config_dict(config: Config) -> dict[str, Any]:
    """The canonical JSON form: every key, nested, in the order of the table; `parse_config` inverts it."""
    result: dict[str, Any] = {}
    for knob in KNOBS:
        *groups, leaf = knob.name.split(".")
        node = result
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = _plain(knob, getattr(config, FIELD_OF[knob.name]))
    return result


def knob_value(config: Config, name: str) -> Any:
    """The value of the knob with this dotted name; KeyError if there is none."""
    return getattr(config, FIELD_OF[name])


def with_value(config: Config, name: str, value: Any) -> Config:
    """The config with one knob set to a canonical value; KeyError if no knob has the dotted name."""
    change: dict[str, Any] = {FIELD_OF[name]: value}
    return replace(config, **change)


def neighbours(config: Config, realised: Config | None = None) -> list[tuple[str, Config]]:
    """Configs one step away that break no rule, with the name of the knob that moved.

    A step of an ordered knob is to the next value up or down, of a set one entry in or out, of a choice to any other. Values are those of
    `realised`, the config as its program realises it (without it those of `config`): the step from an automatic value is to the next of
    what it came to be.
    """
    start = realised or config
    moved = [(knob.name, with_value(config, knob.name, value)) for knob in KNOBS for value in _steps(knob, knob_value(start, knob.name))]
    return [(name, other) for name, other in moved if other != config and all(rule.check(other) is None for rule in RULES)]


def _steps(knob: Knob, value: Any) -> list[Any]:
    if knob.type == "set":
        return [tuple(c for c in knob.choices if (c in value) != (c == toggled)) for toggled in knob.choices]
    if knob.type in ("choice", "assignment"):
        return [choice for choice in knob.choices if choice != value]
    below = [v for v in knob.values if v < value]
    above = [v for v in knob.values if v > value]
    return below[-1:] + above[:1]


def _plain(knob: Knob, value: Any) -> Any:
    if knob.type == "assignment":
        return _plain_assignment(value)
    return list(value) if knob.type == "set" else value


def _plain_assignment(value: Assignment) -> str | dict[str, list[int]]:
    return value if isinstance(value, str) else {op: list(sms) for op, sms in value}
