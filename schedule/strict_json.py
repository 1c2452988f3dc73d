"""What JSON allows and AMK does not: a key that stands twice in one object would silently hide a value that somebody set."""

from __future__ import annotations

from collections import Counter
from typing import Any


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of json.loads. ValueError for a repeated key."""
    for key, count in Counter(key for key, _ in pairs).items():
        if count > 1:
            raise ValueError(f"key {key!r} stands there twice")
    return dict(pairs)
