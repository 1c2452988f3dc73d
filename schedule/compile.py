"""The compiler: a model, a config and a card in, one program out. Each line of `compile_program` is a pass."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from amk.isa.instruction import Instruction
from amk.isa.machine import KV_STREAM_LAG, Machine, chunk_plan
from amk.isa.stretch import runs, slot_bytes
from amk.schedule.collector import collector_paused
from amk.schedule.config import config_dict
from amk.schedule.emit import Queues, buffers_of, emit
from amk.schedule.fuse import fuse
from amk.schedule.fuse_stretch import fuse_stretch
from amk.schedule.graph import Graph, MatVecOp, StretchMatMulOp
from amk.schedule.knobs import NO_PAUSE, SPLIT_CHOICES, STAGE_CHOICES, Config
from amk.schedule.memory import Arena, allocate
from amk.schedule.model import ModelSpec
from amk.schedule.names import matvec_shapes, resolve_names
from amk.schedule.place import Placement, assignment_problems, kept_bytes, place, sized_candidates, with_kept_inputs
from amk.schedule.program import DeviceKnobs, KvCache, Program
from amk.schedule.rejection import Rejection, reject
from amk.schedule.resources import SharedNeeds, shared_layout
from amk.schedule.settings import Chooser, Settings, least_stage_bytes, resolve, splits_of, stage_bytes_with_scales
from amk.schedule.share_rows import share_rows
from amk.schedule.synchronise import Sync, synchronise
from amk.schedule.targets import Target
from amk.schedule.throttle import never, throttled
from amk.schedule.tile import tile


class ConfigRejected(ValueError):
    """`lower` was given a config that does not go with the model and the card; `rejections` says why."""

    def __init__(self, rejections: list[Rejection]) -> None:
        super().__init__("; ".join(map(str, rejections)))
        self.rejections = rejections


def lower(
    spec: ModelSpec,
    config: Config,
    target: Target,
    *,
    context: int | None = None,
    chooser: Chooser = "greedy",
    batch: int = 1,
    prefill: bool = False,
) -> Program:
    """`compile_program` for callers that know the config to be good; ConfigRejected if it is not."""
    result = compile_program(spec, config, target, context=context, chooser=chooser, batch=batch, prefill=prefill)
    if isinstance(result, Program):
        return result
    raise ConfigRejected(result)


@collector_paused()
def compile_program(
    spec: ModelSpec,
    config: Config,
    target: Target,
    *,
    context: int | None = None,
    chooser: Chooser = "greedy",
    batch: int = 1,
    prefill: bool = False,
) -> Program | list[Rejection]:
    """The program, or every reason why there is none. `context` KV rows (rounded up to 16); None: the model's, up to 16384.

    A program of a `batch` of tokens streams the very bytes that the program of one token streams (schedule/stream.py). One for `prefill`
    takes the batch as consecutive positions of one sequence and makes their KV rows, without logits, from the same bytes in another order.
    """
    settings = resolve(spec, config, target, context, batch, chooser, prefill)
    if isinstance(settings, list):
        return settings
    one: Program | None = None
    if settings.batch > 1:  # its stages are those of one token, for they share the weights
        found = compile_program(spec, config, target, context=context)
        if isinstance(found, list):
            return found
        one, settings = found, replace(settings, stage_sizes=(found.machine.stage_bytes,))
    graph = fuse_stretch(spec, settings, one.machine) if one and prefill else fuse(spec, settings)
    tilings = tile(spec, graph, settings)
    assignment = "round_robin" if prefill else config.sm_assignment  # the config's is of the units of one token
    problems = list(assignment_problems(graph, tilings, assignment, target.sms))
    if problems:
        return problems
    placement = place(graph, tilings, assignment, target.sms, _products_of_one(spec, settings))
    graph = with_kept_inputs(sized_candidates(graph, placement), placement, kept_bytes(target.shared_bytes))
    arena = allocate(graph, config.page_allocation)
    sync = synchronise(graph, placement, settings.consumer_warps, config.sync)
    queues = emit(graph, placement, resolve_names(graph, sync, config.kv_block), target.sms)
    machine = _machine(spec, settings, graph, sync, queues)
    return machine if isinstance(machine, list) else share_rows(_assemble(spec, settings, graph, arena, sync, queues, machine))


def _products_of_one(spec: ModelSpec, settings: Settings) -> Placement:
    """Where the products of a batch go: where those of one token are, for they share the stream. A stretch takes tiles from anywhere."""
    if settings.batch == 1 or settings.prefill:
        return {}
    one = replace(settings, batch=1, splits=splits_of(spec, settings.config, settings.target, settings.context, 1))
    graph = fuse(spec, one)
    placement = place(graph, tile(spec, graph, one), one.config.sm_assignment, one.target.sms)
    return {op.name: placement[op.name] for op in graph.ops if isinstance(op, MatVecOp)}


def _assemble(spec: ModelSpec, settings: Settings, graph: Graph, arena: Arena, sync: Sync, queues: Queues, machine: Machine) -> Program:
    config = settings.config
    return Program(
        machine=machine,
        device=DeviceKnobs(config.cache_hint, config.sync, settings.poll_sleep_ns, config.release_early, settings.feed),
        buffers=buffers_of(graph, arena),
        arena_packets=arena.packets,
        matrices=graph.matrices,
        shapes=matvec_shapes(graph),
        constants=graph.constants,
        kv=KvCache(settings.sequences * spec.layers, spec.kv_heads, settings.context),
        counters=sync.counters,
        queues=queues.queues,
        streams=_streams(queues.queues),
        scratch_bytes=_scratch_bytes(queues, machine),
    )


def _machine(spec: ModelSpec, settings: Settings, graph: Graph, sync: Sync, queues: Queues) -> Machine | list[Rejection]:
    """The machine with as many ring stages as fit beside everything else, of the first stage size of which four (or else two, or one) do.

    Four: the copies under way by default, and a stage that is used up meanwhile.
    """
    drafts = [_draft(spec, settings, graph, sync, stage_bytes) for stage_bytes in settings.stage_sizes]
    fitted = [replace(draft, stages=_stages(draft, settings, graph, queues)) for draft in drafts]
    chosen = next((m for least in (4, 2, 1) for m in fitted if m.stages >= least), None)
    if chosen is None:
        return _no_ring(drafts[-1], _most_stage_bytes(spec, settings, graph, sync, queues), settings, graph, queues)
    asked = chosen.stages if settings.prefill else settings.config.pipelining_depth
    depth = 1 if settings.feed == "plain" else asked
    return throttled(replace(chosen, inflight=min(depth, chosen.stages)), settings.throttle)


def _draft(spec: ModelSpec, settings: Settings, graph: Graph, sync: Sync, stage_bytes: int) -> Machine:
    """The machine before its ring is sized."""
    draft = Machine(
        sms=settings.target.sms,
        consumer_warps=settings.consumer_warps,
        stages=0,
        stage_bytes=stage_bytes,
        inflight=0,
        reduction_slots=settings.reduction_slots,
        kv_lag=KV_STREAM_LAG,
        dtype=spec.dtype,
        hidden=spec.hidden,
        vocab=spec.vocab,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        rms_eps=spec.rms_eps,
        context=settings.context,
        tags=len(sync.tags),
        qk_norm=spec.qk_norm,
        batch=settings.batch,
        prefill=settings.prefill,
    )
    cols = {op.cols for op in graph.ops if isinstance(op, StretchMatMulOp)}
    fragments = max((run.count for each in cols for run in runs(chunk_plan(draft, each))), default=0)
    return replace(draft, slot=slot_bytes(draft, fragments))


def _stages(draft: Machine, settings: Settings, graph: Graph, queues: Queues) -> int:
    """Stages that fit, or that were asked for, which was of one token: of a stretch the fewer. 0 if what was asked for does not fit."""
    fit = _most_stages(_needs(draft, graph, queues), settings.target)
    asked = settings.config.smem_bytes_per_block // draft.slot_bytes
    if settings.config.smem_bytes_per_block == 0:
        return fit
    if settings.prefill:
        return min(asked, fit)
    return asked if asked <= fit else 0


def _needs(draft: Machine, graph: Graph, queues: Queues) -> SharedNeeds:
    """What shared memory must hold besides the ring."""
    return SharedNeeds(
        stages=0,
        slot_bytes=draft.slot_bytes,
        scratch_bytes=_scratch_bytes(queues, draft),
        consumer_warps=draft.consumer_warps,
        reduction_slots=draft.reduction_slots,
        tasks=max(map(len, queues.queues)),
        stream_entries=max(map(len, _streams(queues.queues))),
        buffers=sum(1 if value.seats == 1 else 1 + value.seats for value in graph.values),
        batch=draft.batch,
        gated=graph.gated,
    )


def _most_stages(needs: SharedNeeds, target: Target) -> int:
    """Stages that fit beside `needs`. What lies behind the ring is aligned, so a ring may move it by more than its own bytes."""
    most = max(0, target.shared_bytes - shared_layout(needs).total) // needs.slot_bytes
    while most and shared_layout(replace(needs, stages=most)).total > target.shared_bytes:
        most -= 1
    return most


def _most_stage_bytes(spec: ModelSpec, settings: Settings, graph: Graph, sync: Sync, queues: Queues) -> int:
    """The largest value below the config's stage_bytes of which one stage fits; 0 if there is none, or if the config leaves the choice."""
    least = least_stage_bytes(spec, settings.consumer_warps)
    smaller = [size for size in STAGE_CHOICES if least <= size < settings.config.stage_bytes]
    drafts = {size: _draft(spec, settings, graph, sync, stage_bytes_with_scales(spec, size)) for size in smaller}
    return max((size for size, draft in drafts.items() if _most_stages(_needs(draft, graph, queues), settings.target)), default=0)


def _no_ring(draft: Machine, most_stage_bytes: int, settings: Settings, graph: Graph, queues: Queues) -> list[Rejection]:
    """Why there is no ring of the draft's stages, by the knobs at fault; one stage of `most_stage_bytes` would fit, if that is not 0."""
    needs, target, config = _needs(draft, graph, queues), settings.target, settings.config
    taken = f"{shared_layout(needs).total} of the {target.shared_bytes} bytes on {target.name}"
    rest = f"{needs.tasks} tasks, scratch and reduction slots take {taken}"
    stage, fewer = draft.slot_bytes, "" if settings.prefill else "; a larger N_tile makes fewer tasks"  # of a stretch tasks are groups
    if most := _most_stages(needs, target):
        allowed = f"at least one stage of {stage} bytes and at most {most * stage} ({rest})"
    else:
        allowed = f"such that one stage of {stage} bytes fits ({rest}{fewer})"
    ring = reject("smem_bytes_per_block", config.smem_bytes_per_block, allowed)
    if most or not most_stage_bytes:
        return [ring]
    smaller = reject("kernel_knobs.stage_bytes", config.stage_bytes, f"at most {most_stage_bytes} for one stage to fit ({rest}{fewer})")
    return [ring, smaller] if config.smem_bytes_per_block else [smaller]


def _scratch_bytes(queues: Queues, machine: Machine) -> int:
    """Scratch is shared by all tasks of an SM in turn; all tasks of an op need the same."""
    return max(task.shared_bytes(machine) for task in queues.samples)


def _streams(queues: tuple[tuple[Instruction, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(i for i, task in enumerate(queue) if task.streamed) for queue in queues)


def effective_config(config: Config, program: Program) -> dict[str, Any]:
    """The config in its JSON form with every automatic or clipped value as the program realises it: compiled, it makes this program again.

    (A stretch takes as many stages as fit, which may be more than `pipelining_depth` can name.)
    """
    result, m = config_dict(config), program.machine
    result["pipelining_depth"] = m.inflight
    result["smem_bytes_per_block"] = m.stages * m.slot_bytes
    stage_bytes = max(size for size in STAGE_CHOICES if size <= m.stage_bytes)
    throttle = {"throttled_depth": m.throttled or m.inflight, "high_watermark": m.watermark}
    sizes = {"stage_bytes": stage_bytes, "reduction_slots": m.reduction_slots, "kv_splits": _effective_splits(config, program)}
    device = {"weight_feed": program.device.weight_feed, "poll_sleep_ns": program.device.poll_sleep_ns or NO_PAUSE}
    result["kernel_knobs"] |= device | sizes | throttle
    return result


def _effective_splits(config: Config, program: Program) -> int:
    """The least value of the knob that gives the splits of `program`.

    A batch shares out its weights by the automatic splits of one token, its attention by fewer. Only the automatic value stands for both.
    """
    if program.machine.batch > 1 and not config.kv_splits:
        return 0
    return min(choice for choice in SPLIT_CHOICES if choice >= _most_splits(program))


def _most_splits(program: Program) -> int:
    """Tasks that share the KV rows of a head, in the layer with the most."""
    return max((getattr(task, "splits", 1) for queue in program.queues for task in queue), default=1)


def notes(config: Config, program: Program) -> list[str]:
    """Where the program does less than the config asked for, one sentence each."""
    found, asked, realised = [], config_dict(config), effective_config(config, program)
    depth, inflight = asked["pipelining_depth"], realised["pipelining_depth"]
    if depth > inflight:
        why = "plain loads fill one after another" if program.device.weight_feed == "plain" else "the ring has no more"
        found.append(f"pipelining_depth: {depth} stages asked for, {inflight} used: {why}")
    if why_not := never(config, program.machine):
        found.append(why_not)
    if config.kv_splits > (used := _most_splits(program)):
        found.append(f"kv_splits: {config.kv_splits} asked for, {used} used: the context has no more blocks of {config.kv_block} rows")
    ring = asked["smem_bytes_per_block"]
    if ring > realised["smem_bytes_per_block"]:
        found.append(f"smem_bytes_per_block: {ring} asked for, {realised['smem_bytes_per_block']} used: the ring is whole stages")
    return found
