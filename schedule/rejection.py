"""A reason why a config cannot be used: a value that names the key, what was given and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Rejection:
    """`key` is the dotted knob (or "model...", "context") at fault, `value` what was given, `allowed` what must hold."""

    key: str
    value: str
    allowed: str
    text: str

    def __str__(self) -> str:
        return self.text


def label(key: str) -> str:
    """The key as people say it: `tiling.gemv.N_tile` is `gemv N_tile`."""
    parts = key.split(".")
    return " ".join(parts[1:] if parts[0] in ("tiling", "kernel_knobs") and len(parts) > 1 else parts)


def reject(key: str, value: Any, allowed: str) -> Rejection:
    """`key: must be ALLOWED, but got VALUE`; of a key, too, only what `show_name` shows."""
    key, shown = show_name(key), show(value)
    return Rejection(key, shown, allowed, f"{label(key)}: must be {allowed}, but got {shown}")


def show(value: Any) -> str:
    """`value` in at most 80 characters; never raises, whatever the value is."""
    try:
        text = repr(value)
    except Exception:  # a number of 5000 digits, 10,000 nested lists, or whatever a class of the caller's raises
        text = f"a {type(value).__name__} that cannot be shown"
    return show_name(text)


def show_name(text: str) -> str:
    """The same of a text that needs no quotes: on one line, without what a terminal would act on."""
    plain = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: SHOWN_CHARACTERS + 1])
    return plain if len(plain) <= SHOWN_CHARACTERS else plain[: SHOWN_CHARACTERS - 3] + "..."
