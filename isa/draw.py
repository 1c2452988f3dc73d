"""draw: picks the next token from the candidates of draw_head tasks, and ends the launch at a stop token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amk.isa.sample import Sample


@dataclass(frozen=True, kw_only=True)
class Draw(Sample):
    """As Sample. Where the token is a stop token it publishes nothing: no task of the next token can begin."""

    stem: ClassVar[str] = "draw"
    draws: ClassVar[bool] = True
