"""What the knob table looks like to others: the JSON schema of configs, the search space, and the page of documentation."""

from __future__ import annotations

import json
from typing import Any

from amk.schedule.config import TREE, config_dict
from amk.schedule.knobs import KNOBS, RULES, Config, Knob
from amk.schedule.model import ModelSpec
from amk.schedule.settings import least_stage_bytes, weight_feeds
from amk.schedule.targets import Target

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config."""
    return {
        "$schema": DRAFT,
        "title": "ScheduleConfig",
        "description": "One schedule of AutoMegaKernel; every key may be left out.",
    } | _node(TREE)


def _node(tree: dict[str, Any]) -> dict[str, Any]:
    properties = {key: _leaf(node) if isinstance(node, Knob) else _node(node) for key, node in tree.items()}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _leaf(knob: Knob) -> dict[str, Any]:
    return {"description": _sentence(knob), "default": _default(knob)} | _value_schema(knob)


def _value_schema(knob: Knob) -> dict[str, Any]:
    if knob.type == "set":
        return {"type": "array", "items": {"enum": list(knob.choices)}, "uniqueItems": True}
    if knob.type == "assignment":
        units = {"type": "array", "items": {"type": "integer", "minimum": 0}}
        return {"anyOf": [{"enum": list(knob.choices)}, {"type": "object", "minProperties": 1, "additionalProperties": units}]}
    if knob.choices:
        return {"enum": list(knob.choices)}
    return {"type": "integer", "minimum": knob.minimum, "maximum": knob.maximum}


def search_space(spec: ModelSpec, target: Target) -> dict[str, dict[str, Any]]:
    """Every knob by its dotted name: type, choices (or min and max) that model and card allow, default, desc, unit, consumer."""
    return {knob.name: _entry(knob, spec, target) for knob in KNOBS}


def _entry(knob: Knob, spec: ModelSpec, target: Target) -> dict[str, Any]:
    choices = list(knob.choices)
    if knob.name == "kernel_knobs.stage_bytes":
        choices = [c for c in choices if c == 0 or c >= least_stage_bytes(spec, 4)]
    if knob.name == "kernel_knobs.weight_feed":
        choices = list(weight_feeds(target))
    domain = {"choices": choices} if choices else {"min": knob.minimum, "max": knob.maximum}
    return {"type": knob.type, **domain, "default": _default(knob), "desc": knob.meaning, "unit": knob.unit, "consumer": knob.consumer}


def knob_table_markdown() -> str:
    """docs/knobs.md."""
    rows = [f"| `{k.name}` | {_domain(k)} | `{json.dumps(_default(k))}` | {k.unit} | {k.meaning} | {k.consumer} |" for k in KNOBS]
    return "\n".join(
        [
            "# Knobs of a schedule",
            "",
            "Rendered from `schedule/knobs.py`. A config is a JSON object; keys that are left out take their defaults. Dots are nesting.",
            "",
            "| knob | values | default | unit | what it decides | read by |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            "Between knobs:",
            "",
            *(f"- {rule.meaning}" for rule in RULES),
            "",
            "The default config in full:",
            "",
            "```json",
            json.dumps(config_dict(Config()), indent=2),
            "```",
            "",
        ]
    )


def _domain(knob: Knob) -> str:
    listed = ", ".join(f"`{c}`" for c in knob.choices)
    if knob.type == "set":
        return f"any of {listed}"
    if knob.type == "assignment":
        return f"{listed}, or `{{op: [SM of each unit]}}`"
    return listed or f"{knob.minimum} to {knob.maximum}"


def _sentence(knob: Knob) -> str:
    return knob.meaning + (f" ({knob.unit})" if knob.unit else "")


def _default(knob: Knob) -> Any:
    return list(knob.default) if knob.type == "set" else knob.default
