"""Draws docs/images/machine.svg: the flow from config to verdict, and one SM of the machine with what it shares with the others.

The sizes in the picture are those of the program that the default config gives for Llama-3.2-1B's shape on an H200.

    python amk_bootstrap.py amk.dev.draw_machine [FILE]      FILE defaults to docs/images/machine.svg
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

from amk.models.registry import describe
from amk.schedule.compile import lower
from amk.schedule.knobs import Config
from amk.schedule.program import Program
from amk.schedule.resources import block_threads, shared_layout
from amk.schedule.targets import TARGETS

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "machine.svg"
MODEL, CARD = "llama-3.2-1b-shape", "h200"
WIDTH, HEIGHT = 1240, 790

INK, GREY, PAPER = "#1c2733", "#5d6b7a", "#ffffff"
MEMORY, SHARED, ACTOR, PROOF = "#e6eef8", "#fdf1d8", "#dff0e2", "#f3e3f1"
STREAM, VALUE, HINT = "#1f6fb2", "#2e7d4f", "#a15c00"

Anchor = Literal["start", "middle", "end"]
Point = tuple[float, float]


@dataclass
class Drawing:
    """SVG elements in the order in which they are painted."""

    elements: list[str] = field(default_factory=list)

    def box(self, x: float, y: float, w: float, h: float, fill: str, *, stroke: str = INK, radius: float = 6, dash: str = "") -> None:
        style = f' stroke-dasharray="{dash}"' if dash else ""
        self.elements.append(f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="{radius}" fill="{fill}" stroke="{stroke}"{style}/>')

    def text(
        self, x: float, y: float, words: str, *, size: int = 12, anchor: Anchor = "middle", fill: str = INK, bold: bool = False
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        where = f'x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}"'
        self.elements.append(f'<text {where} fill="{fill}"{weight}>{escape(words)}</text>')

    def lines(self, x: float, y: float, words: str, *, size: int = 11, anchor: Anchor = "middle", fill: str = GREY) -> None:
        """One line of text for each line of `words`, from y downwards."""
        for i, line in enumerate(words.splitlines()):
            self.text(x, y + i * (size + 4), line, size=size, anchor=anchor, fill=fill)

    def arrow(self, points: list[Point], colour: str, *, width: float = 1.8, dash: str = "") -> None:
        path = " ".join(f"{x},{y}" for x, y in points)
        style = f' stroke-dasharray="{dash}"' if dash else ""
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{style} marker-end="url(#{_marker(colour)})"/>'
        )

    def svg(self) -> str:
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            'font-family="Helvetica, Arial, DejaVu Sans, sans-serif">'
        )
        markers = "\n".join(_arrow_head(colour) for colour in (INK, STREAM, VALUE, HINT))
        paper = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>'
        return "\n".join([head, "<defs>", markers, "</defs>", paper, *self.elements, "</svg>"]) + "\n"


def _marker(colour: str) -> str:
    return "head" + colour.removeprefix("#")


def _arrow_head(colour: str) -> str:
    shape = f'<path d="M0,0 L8,4 L0,8 z" fill="{colour}"/>'
    attributes = 'markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="9" refX="7" refY="4" orient="auto"'
    return f'<marker id="{_marker(colour)}" {attributes}>{shape}</marker>'


# Each stage of the flow: the type, where it is defined, its colour, and the step that leads to the next stage.
FLOW = (
    ("Config", "schedule/knobs.py", MEMORY, "fuse"),
    ("Graph", "schedule/graph.py", MEMORY, "lower"),
    ("Program", "schedule/program.py", MEMORY, "validate"),
    ("ValidProgram", "schedule/proven.py", PROOF, "pack"),
    ("Image", "vm/image.py", MEMORY, "run"),
    ("outputs", "vm/interface.py", MEMORY, "judge"),
    ("Verdict", "eval/verdict.py", PROOF, ""),
)


def draw_flow(d: Drawing, left: float, top: float) -> None:
    """The stages from left to right, each step above its arrow, and the way back to the next config below."""
    w, h, gap = 116, 40, 54
    d.text(left, top - 22, "The flow", size=16, anchor="start", bold=True)
    for i, (name, where, fill, step) in enumerate(FLOW):
        x = left + i * (w + gap)
        d.box(x, top, w, h, fill)
        d.text(x + w / 2, top + 25, name, size=14, bold=True)
        d.text(x + w / 2, top + h + 16, where, size=10, fill=GREY)
        if step:
            d.arrow([(x + w + 3, top + h / 2), (x + w + gap - 4, top + h / 2)], INK)
            d.text(x + w + gap / 2, top + h / 2 - 7, step, size=11, fill=GREY)
    first, last = left + w / 2, left + (len(FLOW) - 1) * (w + gap) + w / 2
    low = top + h + 46
    d.arrow([(last, top + h + 24), (last, low), (first, low), (first, top + h + 25)], INK, dash="5 4")
    d.text((first + last) / 2, low + 16, "an agent or the search reads the verdict and edits the config, nothing else", fill=GREY)


def draw_memory(d: Drawing, x: float, y: float, h: float, program: Program) -> None:
    """The left column: what the SMs stream and what their watchers poll."""
    d.box(x, y, 222, h, "#f6f9fd", stroke=GREY)
    d.text(x + 111, y + 24, "Card memory", size=14, bold=True)
    d.box(x + 14, y + 42, 194, 124, MEMORY)
    d.text(x + 111, y + 62, "weight streams", size=13, bold=True)
    d.lines(x + 111, y + 80, "one for each SM, packed once\nin the order of use")
    for i, name in enumerate(("SM 0", "SM 1", f"… SM {program.machine.sms - 1}")):
        d.box(x + 26, y + 104 + i * 19, 170, 15, "#b9d3ee", stroke=STREAM, radius=2)
        d.text(x + 34, y + 115.5 + i * 19, name, size=10, anchor="start")
    d.box(x + 14, y + 196, 194, 84, MEMORY)
    d.text(x + 111, y + 216, "KV cache", size=13, bold=True)
    d.lines(x + 111, y + 234, "blocks of 16 rows;\nold rows are streamed\nlike weights")
    d.box(x + 14, y + 300, 194, 62, MEMORY)
    d.text(x + 111, y + 320, "read only", size=13, bold=True)
    d.lines(x + 111, y + 338, "embedding, norm gains,\nbiases, RoPE table")
    d.box(x + 14, y + 382, 194, 74, MEMORY)
    d.text(x + 111, y + 402, "counters", size=13, bold=True)
    d.lines(x + 111, y + 420, "arrivals of finished tasks:\nhints, never correctness")


def draw_sm(d: Drawing, x: float, y: float, h: float, program: Program) -> None:
    """The block of one SM: feeder, ring, consumers, reduction slots, storer, watcher, and the program in shared memory."""
    m = program.machine
    for shift in (12, 6, 0):
        d.box(x + shift, y - shift, 600, h, "#fbfbf7", stroke=GREY)
    shared = shared_layout(program).total
    title = f"One SM of {m.sms}: one block of {block_threads(m)} threads, {shared / 1024:.0f} KiB of shared memory"
    d.text(x + 300, y + 24, title, size=14, bold=True)
    d.box(x + 36, y + 42, 130, 36, ACTOR)
    d.text(x + 101, y + 58, "feeder", size=13, bold=True)
    d.text(x + 101, y + 72, "one thread", size=10, fill=GREY)
    most = max(map(len, program.queues))
    d.box(x + 270, y + 42, 306, 44, SHARED)
    d.text(x + 423, y + 60, "program of this SM", size=13, bold=True)
    d.text(x + 423, y + 77, f"up to {most} task records of 64 bytes, in queue order", size=11, fill=GREY)
    _draw_ring(d, x + 36, y + 118, program)
    _draw_products(d, x, y, program)


def _draw_ring(d: Drawing, x: float, y: float, program: Program) -> None:
    m, cell = program.machine, 540 / program.machine.stages
    words = f"ring: {m.stages} stages of {m.stage_bytes >> 10} KiB, first in, first out"
    d.text(x + 540, y - 8, words, size=12, anchor="end", bold=True)
    free = 1
    for i in range(m.stages):
        copying, empty = i < m.inflight, i >= m.stages - free
        fill = PAPER if copying or empty else "#b9d3ee"
        d.box(x + i * cell, y, cell - 3, 36, fill, stroke=GREY if empty else STREAM, radius=3, dash="4 3" if copying else "")
    d.text(x + m.inflight * cell / 2, y + 52, f"being copied (at most {m.inflight})", size=11, fill=GREY)
    d.text(x + (m.inflight + m.stages - free) * cell / 2, y + 52, "landed", size=11, fill=GREY)
    d.text(x + (m.stages - free / 2) * cell, y + 52, "free", size=11, fill=GREY)


def _draw_products(d: Drawing, x: float, y: float, program: Program) -> None:
    m = program.machine
    cell = 400 / m.consumer_warps
    d.text(x + 96, y + 212, f"{m.consumer_warps} consumer warps, each with its own K slice", size=12, anchor="start", bold=True)
    for i in range(m.consumer_warps):
        d.box(x + 96 + i * cell, y + 220, cell - 6, 52, ACTOR)
        d.text(x + 96 + i * cell + (cell - 6) / 2, y + 250, str(i), size=13)
    slots = m.reduction_slots
    d.text(x + 330, y + 326, "reduction slots", size=12, anchor="end", bold=True)
    for i in range(slots):
        d.box(x + 342 + i * 176 / slots, y + 310, 176 / slots - 6, 24, SHARED, radius=3)
    d.box(x + 342, y + 382, 172, 50, ACTOR)
    d.text(x + 428, y + 403, "storer", size=13, bold=True)
    d.text(x + 428, y + 420, "one warp: adds, publishes", size=10, fill=GREY)
    d.box(x + 36, y + 382, 150, 50, ACTOR)
    d.text(x + 111, y + 403, "watcher", size=13, bold=True)
    d.text(x + 111, y + 420, "one thread: polls", size=10, fill=GREY)


def draw_arena(d: Drawing, x: float, y: float, h: float, program: Program) -> None:
    """The right column: the packets through which all SMs talk."""
    d.box(x, y, 226, h, "#f6f9fd", stroke=GREY)
    d.text(x + 113, y + 24, "Arena, shared by all SMs", size=14, bold=True)
    kib = program.arena_packets * 8 / 1024
    words = f"{program.arena_packets} packets, {kib:.0f} KiB: fits in L2\na packet is one 64-bit store\nof a value and its tag"
    d.lines(x + 113, y + 46, words)
    for i, (value, tag) in enumerate((("0.131", "e·T+5"), ("-2.07", "e·T+5"), ("0.562", "e·T+5"), ("1.918", "old tag"))):
        fresh = tag != "old tag"
        d.box(x + 28, y + 106 + i * 26, 85, 22, "#cfe8d6" if fresh else PAPER, stroke=VALUE if fresh else GREY, radius=2)
        d.box(x + 113, y + 106 + i * 26, 85, 22, "#cfe8d6" if fresh else PAPER, stroke=VALUE if fresh else GREY, radius=2)
        d.text(x + 70, y + 121 + i * 26, value, size=12)
        d.text(x + 155, y + 121 + i * 26, tag, size=12)
    rule = "a reader polls until the tag fits:\nepoch e of the token × T tags\n+ the tag of the value; a stale\nvalue is never taken"
    d.lines(x + 113, y + 238, rule)
    d.lines(x + 113, y + 320, "residual stream, q k v, partials,\nattention, gate·up, candidates,\nthe token that was chosen")


def draw_arrows(d: Drawing, memory: float, sm: float, arena: float, y: float) -> None:
    """What moves: streams (blue), packets (green), hints (brown), the rest dark."""
    left, right = memory + 208, arena
    d.arrow([(left + 2, y + 136), (sm + 34, y + 136)], STREAM, width=5)
    d.arrow([(left + 2, y + 206), (sm - 4, y + 206), (sm - 4, y + 148), (sm + 34, y + 148)], STREAM, width=3)
    d.arrow([(sm + 101, y + 80), (sm + 101, y + 115)], STREAM)
    d.text(sm + 108, y + 101, "starts bulk copies", size=11, anchor="start", fill=STREAM)
    d.arrow([(sm + 440, y + 157), (sm + 440, y + 193)], STREAM, width=5)
    d.arrow([(sm + 94, y + 246), (left + 3, y + 246)], INK)
    d.lines(sm + 10, y + 264, "attention\nappends the\nnew row", anchor="start")
    d.arrow([(right - 2, y + 238), (sm + 496, y + 238)], VALUE)
    d.lines(sm + 503, y + 216, "reads inputs,\nchecks tags", anchor="start", fill=VALUE)
    d.arrow([(sm + 494, y + 258), (right - 4, y + 258)], VALUE)
    d.lines(sm + 503, y + 274, "publishes:\nembed, sample,\nattention", anchor="start", fill=VALUE)
    d.arrow([(sm + 428, y + 274), (sm + 428, y + 307)], INK)
    d.text(sm + 420, y + 296, "partial sums", size=11, anchor="end", fill=GREY)
    d.arrow([(sm + 428, y + 336), (sm + 428, y + 379)], INK)
    d.arrow([(sm + 516, y + 396), (right - 4, y + 396)], VALUE)
    d.text(sm + 524, y + 388, "publishes", size=11, anchor="start", fill=VALUE)
    d.arrow([(right - 2, y + 420), (sm + 518, y + 420)], VALUE)
    d.text(sm + 526, y + 436, "residual", size=11, anchor="start", fill=VALUE)
    d.arrow([(left + 2, y + 406), (sm + 34, y + 406)], HINT)
    d.arrow([(sm + 150, y + 380), (sm + 150, y + 275)], HINT)
    d.text(sm + 158, y + 362, "releases tasks", size=11, anchor="start", fill=HINT)
    d.arrow([(sm + 428, y + 434), (sm + 428, y + 448), (left + 3, y + 448)], HINT)
    d.text(sm + 260, y + 442, "arrives", size=11, fill=HINT)


def draw_legend(d: Drawing, x: float, y: float) -> None:
    entries = ((STREAM, "bytes streamed, ahead of need"), (VALUE, "packets: correct by their tags"), (HINT, "hints: when to look"))
    for i, (colour, words) in enumerate(entries):
        d.arrow([(x + i * 250, y), (x + i * 250 + 34, y)], colour, width=3)
        d.text(x + i * 250 + 42, y + 4, words, size=12, anchor="start", fill=GREY)


def render() -> str:
    """The picture as SVG text; it changes only with the default program."""
    program = lower(describe(MODEL), Config(), TARGETS[CARD])
    d = Drawing()
    draw_flow(d, 42, 60)
    memory, sm, arena, top, height = 24, 306, 990, 242, 470
    d.text(memory + 18, top - 30, "The machine", size=16, anchor="start", bold=True)
    d.text(memory + 150, top - 30, "every SM runs these actors on its own, for every token of the launch", anchor="start", fill=GREY)
    draw_memory(d, memory, top, height, program)
    draw_sm(d, sm, top, height, program)
    draw_arena(d, arena, top, height, program)
    draw_arrows(d, memory, sm, arena, top)
    draw_legend(d, memory + 250, top + height + 30)
    sizes = f"Sizes: default config, {MODEL} in {program.machine.dtype} on {CARD}."
    d.text(memory + 18, top + height + 60, sizes, size=11, anchor="start", fill=GREY)
    return d.svg()


def main(arguments: list[str]) -> int:
    """Write the picture; 0."""
    parser = argparse.ArgumentParser(prog="draw_machine", description="Draws the flow from config to verdict, and one SM of the machine.")
    parser.add_argument("file", nargs="?", type=Path, default=PICTURE, help="the SVG file to write; docs/images/machine.svg by default")
    path: Path = parser.parse_args(arguments).file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
