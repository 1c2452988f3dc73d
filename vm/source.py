"""The kernel's source for one program: its sizes as constants, the records, the dispatch, and the device code."""

from __future__ import annotations

import re
from pathlib import Path

from amk.isa.abi import TASK_BYTES, record_header, text_hash
from amk.isa.attention import Attention
from amk.isa.instruction import Instruction
from amk.isa.machine import KV_BLOCK_ROWS
from amk.isa.matmul import KEPT_SEAT_WORDS
from amk.isa.matvec import MatVec
from amk.isa.registry import headers, instructions
from amk.isa.stretch import MOST_SHARES
from amk.schedule.program import Program
from amk.schedule.resources import PLACE_BYTES, SharedLayout, shared_layout
from amk.vm.params import param_dtype, param_fields

ROOT = Path(__file__).parent.parent
INCLUDE = re.compile(r'^#include "([^"]+)"$', re.MULTILINE)
ELEMENT = {"bf16": 0, "fp16": 1, "fp32": 2}
IMAGE_HEAD_BYTES = 32
TEST_MACROS = {"DRY_FEED": 0, "STRESS": 0, "HANG_ACTOR": 0, "TURING": 0, "EVERY_LANE_ARRIVES": 0}


def image_bytes(program: Program) -> int:
    """Bytes of one SM's part of the program image, the same for every SM."""
    raw = image_places(program) + (PLACE_BYTES * _max_entries(program) if program.machine.prefill else 0)
    return raw + -raw % 16


def image_places(program: Program) -> int:
    """Where in an SM's part of the image the places of its tasks' tiles begin: behind head, task records and stream entries."""
    raw = IMAGE_HEAD_BYTES + _max_tasks(program) * TASK_BYTES + 2 * _max_entries(program)
    return raw + -raw % 16


def _max_tasks(program: Program) -> int:
    return max(map(len, program.queues), default=0)


def _max_entries(program: Program) -> int:
    return max(map(len, program.streams), default=0)


def group(program: Program) -> int:
    """Most query heads that one attention task of the program takes; at least 1."""
    return max((getattr(task, "nq", 1) for queue in program.queues for task in queue), default=1)


def constants(program: Program, layout: SharedLayout, macros: dict[str, int]) -> dict[str, int | float | bool]:
    """Compile-time constants of the device code by name."""
    m, d = program.machine, program.device
    return {
        "SMS": m.sms, "CONSUMER_WARPS": m.consumer_warps, "STAGES": m.stages, "STAGE_BYTES": m.stage_bytes, "SLOT_BYTES": m.slot_bytes,
        "INFLIGHT": m.inflight, "THROTTLED": m.throttled, "WATERMARK": 0 if macros["DRY_FEED"] else m.watermark,
        "REDUCTION_SLOTS": m.reduction_slots, "KV_LAG": m.kv_lag, "TAGS": m.tags,
        "HIDDEN": m.hidden, "VOCAB": m.vocab, "KV_HEADS": m.kv_heads, "HEAD_DIM": m.head_dim,
        "HEAD_DIM_PADDED": m.padded_head_dim, "KV_BLOCKS": program.kv.rows // KV_BLOCK_ROWS, "GROUP": group(program),
        "QK_NORM": m.qk_norm, "RMS_EPS": m.rms_eps, "COUNTERS": len(program.counters), "BUFFERS": len(program.buffers),
        "TASK_BYTES": TASK_BYTES, "MAX_TASKS": _max_tasks(program), "IMAGE_BYTES": image_bytes(program),
        "SCRATCH_BYTES": program.scratch_bytes,
        "SCRATCH_OFFSET": layout.scratch, "REDUCTION_OFFSET": layout.reduction, "TASKS_OFFSET": layout.tasks,
        "STREAM_OFFSET": layout.streams, "BUFFERS_OFFSET": layout.buffers, "BARRIER_OFFSET": layout.barriers,
        "BARRIER_BYTES": layout.barrier_bytes, "POLL_SLEEP_NS": d.poll_sleep_ns, "RELEASE_EARLY": d.release_early,
        "HANG_ACTOR": macros["HANG_ACTOR"], "EVERY_LANE_ARRIVES": macros["EVERY_LANE_ARRIVES"],
    }  # fmt: skip


def batch_constants(program: Program) -> dict[str, int]:
    """What only the device code of a batch reads."""
    machine = program.machine
    if machine.batch == 1:
        return {}
    layout = shared_layout(program)
    stretch = {
        "HEADS": machine.heads,
        "MOST_SHARES": MOST_SHARES,
        "PLACES_OFFSET": layout.places,
        "PLACE_BYTES": PLACE_BYTES,
        "IMAGE_PLACES": image_places(program),
    }
    return {"BATCH": machine.batch, "LAYERS": program.layers, "KEPT_SEAT_WORDS": KEPT_SEAT_WORDS} | (stretch if machine.prefill else {})


def _constant_line(name: str, value: int | float | bool) -> str:
    if isinstance(value, bool):
        return f"constexpr bool {name} = {str(value).lower()};"
    if isinstance(value, float):
        return f"constexpr float {name} = {value!r}f;"
    return f"constexpr int {name} = {value};"


def _prelude(program: Program, layout: SharedLayout, macros: dict[str, int]) -> str:
    batch, prefill = program.machine.batch, program.machine.prefill
    shapes = " ".join(f"X({i}, {s.cols}, {s.flags})" for i, s in enumerate(program.shapes))
    lines = [
        f"#define ELEMENT {ELEMENT[program.machine.dtype]}",
        f"#define EVICT_FIRST {int(program.device.cache_hint == 'evict_first')}",
        f"#define DRY_FEED {macros['DRY_FEED']}",
        f"#define STRESS {macros['STRESS']}",
        f"#define TURING {macros['TURING']}",
        f"#define GATED {int(program.machine.prefill)}",
        *(["#define DRAWS"] if program.draws else []),
        f"#define FOR_EACH_SHAPE(X) {shapes}",
        *(_constant_line(n, v) for n, v in (constants(program, layout, macros) | batch_constants(program)).items()),
        record_header("Params", param_fields(batch, program.draws, prefill), param_dtype(batch, program.draws, prefill)),
        headers(batched=batch > 1, draws=program.draws, by_rows=program.by_rows),
    ]
    return "\n".join(lines)


def _used(program: Program) -> list[str]:
    used = {type(task).stem for queue in program.queues for task in queue}
    return [stem for stem in instructions() if stem in used]


def _token(program: Program, cls: type, actor: str) -> str:
    """The token as a handler is given it: of a batch, attention is at the position of its own seat."""
    seated = program.machine.batch > 1 and cls is Attention
    return f"seat_token({actor}.b.p, t.layer, token)" if seated else "token"


def _dispatch(program: Program) -> str:
    """The switch from opcodes to handlers, for the instructions that the program uses."""
    used = [(stem, instructions()[stem]) for stem in _used(program)]
    includes = [f'#include "isa/{stem}.cuh"' for stem, _ in used]

    def case(ops: list[str], record: str, call: str) -> str:
        labels = "".join(f"case OP_{op.upper()}: " for op in ops)
        return f"    {labels}{{ const {record}Task& t = *reinterpret_cast<const {record}Task*>(task); {call}; }}"

    def cases(call: str, actor: str, which: list[tuple[str, type[Instruction]]]) -> str:
        calls = [(stem, cls.__name__, call.format(stem=stem, token=_token(program, cls, actor))) for stem, cls in which]
        return "\n".join(case([stem], record, text) for stem, record, text in calls)

    streamed = [(s, c) for s, c in used if c.streamed]
    stored = [(s, c) for s, c in used if c.stored]

    def shared_cases(call: str, actor: str, which: list[tuple[str, type[Instruction]]]) -> str:
        """All stored instructions are products, which differ to the storer alone: consumers and feeder have one code for them, but
        for those by rows, which are as others to the feeder alone.
        """
        product = call.format(stem="matmul" if program.machine.batch > 1 else "matvec", token="token")
        own = [(s, c) for s, c in which if not c.stored or (c.by_rows and actor == "c")]
        shared = [s for s, c in stored if (s, c) not in own]
        products = [case(shared, MatVec.__name__, product)] if shared else []
        return "\n".join([*products, cases(call, actor, own)])

    carried = " || ".join(f"op == OP_{s.upper()}" for s, c in used if c.carried) or "false"
    is_stored = " || ".join(f"op == OP_{s.upper()}" for s, _ in stored) or "false"
    rows = " || ".join(f"op == OP_{s.upper()}" for s, c in streamed if not (c.stored or c.gated)) or "false"
    op = "const uint16_t op = *reinterpret_cast<const uint16_t*>(task);"
    return "\n".join(
        [
            *includes,
            "__device__ __forceinline__ bool carried(uint16_t op) { return " + carried + "; }",
            "__device__ __forceinline__ bool stored(const uint8_t* task) { " + op + " return " + is_stored + "; }",
            "__device__ __forceinline__ bool streams_rows(const uint8_t* task) { " + op + " return " + rows + "; }",
            "__device__ __forceinline__ void consume(Consumer& c, const uint8_t* task, const Token& token) {",
            "  switch (*reinterpret_cast<const uint16_t*>(task)) {",
            shared_cases("consume_{stem}(c, t, {token}); return", "c", used),
            "  }\n}",
            "__device__ __forceinline__ bool stream(Feeder& f, const uint8_t* task, const uint8_t*& at, const Token& token) {",
            "  switch (*reinterpret_cast<const uint16_t*>(task)) {",
            shared_cases("return stream_{stem}(f, t, at, {token})", "f", streamed),
            "  }\n  return true;\n}",
            "__device__ __forceinline__ void store(Storer& s, const uint8_t* task, const Token& token) {",
            "  switch (*reinterpret_cast<const uint16_t*>(task)) {",
            cases("store_{stem}(s, t, {token}); return", "s", stored),
            "  }\n}",
        ]
    )


def _inline(text: str, generated: dict[str, str], seen: set[str]) -> str:
    """The text with every project include replaced by the file, once."""

    def replace(match: re.Match[str]) -> str:
        name = match.group(1)
        if name in seen:
            return ""
        seen.add(name)
        body = generated[name] if name in generated else (ROOT / name).read_text()
        return f"// ---- {name}\n" + _inline(body, generated, seen)

    return INCLUDE.sub(replace, text.replace("#pragma once\n", ""))


def abi_hash(program: Program) -> int:
    """What binary and program must agree on: records, sizes, layout and shapes."""
    return text_hash(_prelude(program, shared_layout(program), TEST_MACROS))


def traced_source(program: Program, events: int) -> str:
    """The source of a build that writes down up to `events` events a warp (isa/device/trace.cuh) and is the same otherwise."""
    return f"#define AMK_TRACE {events}u\n" + kernel_source(program)


def kernel_source(program: Program, **macros: int) -> str:
    """CUDA C++ of the megakernel for this program; `macros` are the test builds' (TEST_MACROS)."""
    unknown = set(macros) - set(TEST_MACROS)
    if unknown:
        raise ValueError(f"kernel_source: macros must be among {sorted(TEST_MACROS)}, but got {sorted(unknown)}")
    layout = shared_layout(program)
    types = (ROOT / "isa/device/types.cuh").read_text()
    seen = {"isa/device/types.cuh"}
    prelude = _prelude(program, layout, {**TEST_MACROS, **macros})
    feed = f'#include "isa/device/feed_{program.device.weight_feed}.cuh"'
    generated = {"vm/device/dispatch.cuh": _dispatch(program), "isa/device/feed.cuh": feed}
    if program.floating:
        generated["isa/device/matvec_quantised.cuh"] = '#include "isa/device/matvec_fp8.cuh"'
    body = _inline((ROOT / "vm/device/kernel.cu").read_text(), generated, seen)
    abi = f"constexpr uint32_t ABI_HASH = {abi_hash(program)}u;"
    return "\n".join([types.replace("#pragma once\n", ""), prelude, abi, body])
