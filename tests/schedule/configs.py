"""Configs for tests: the one of the guide, and random ones."""

from __future__ import annotations

import random
from typing import Any

from amk.schedule.config import parse_config, with_value
from amk.schedule.knobs import KNOBS, Config

GUIDE: dict[str, Any] = {
    "tiling": {"gemv": {"N_tile": 128}, "attention": {"kv_block": 128}},
    "fusion_grouping": [],
    "sm_assignment": "load_balance",
    "pipelining_depth": 3,
    "page_allocation": "graph_color",
    "threads_per_block": 256,
    "smem_bytes_per_block": 0,
}


def config_of(obj: Any) -> Config:
    """The config of JSON data that must have no problem."""
    config = parse_config(obj)
    assert isinstance(config, Config), config
    return config


def random_config(seed: int) -> Config:
    """Any value for every knob."""
    rng = random.Random(seed)
    config = Config()
    for knob in KNOBS:
        value = tuple(c for c in knob.choices if rng.random() < 0.5) if knob.type == "set" else rng.choice(knob.values)
        config = with_value(config, knob.name, value)
    return config
