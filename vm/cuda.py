"""The CUDA machine: a proven program, its binary and its weights on the live card, launched through the driver."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import numpy as np

from amk.isa.abi import NONE, TASK_BYTES
from amk.isa.attention import Attention
from amk.isa.instruction import Instruction
from amk.isa.machine import FRAGMENT_BYTES, KV_BLOCK_ROWS
from amk.isa.registry import encode
from amk.isa.sampling import GREEDY, STOP_TOKENS, Sampling
from amk.isa.stretch_matmul import StretchMatMul
from amk.schedule.model import WeightSource
from amk.schedule.program import Program
from amk.schedule.proven import ValidProgram
from amk.schedule.resources import PLACE_BYTES, block_threads, shared_layout
from amk.schedule.stream import stream_of
from amk.vm.abort import ACTORS, END_WORD, FAILURES, WAITS
from amk.vm.build import Binary, compile_kernel
from amk.vm.image import pack_stream, tile_places
from amk.vm.interface import (
    Decoded,
    DecodedBatch,
    LaunchFailed,
    OnStep,
    check_sampling,
    checked_rows,
    require_decoder,
    stretches,
)
from amk.vm.kv import plane, require_rows, require_same_rows
from amk.vm.kv_blocks import element_dtype, pack_rows, unpack_rows
from amk.vm.layout import constants, embedding
from amk.vm.params import param_dtype, sampling_words
from amk.vm.source import IMAGE_HEAD_BYTES, abi_hash, image_bytes, image_places, kernel_source

SPIN_LIMIT = 1 << 22  # polls of one wait; a poll takes 20 ns to 1 us
LAST_EPOCH = 2**32 - 1
NO_TOKEN = -1
LISTEN_S = 1e-4  # between two looks at the tokens of a running launch


def check(result: tuple[Any, ...]) -> Any:
    """The values of a driver call; LaunchFailed("crash") if it returned an error."""
    from cuda.bindings import driver

    error, *values = result
    if error != driver.CUresult.CUDA_SUCCESS:
        _, name = driver.cuGetErrorName(error)
        text = name.decode() if isinstance(name, bytes) else str(error)
        raise LaunchFailed("crash", f"a CUDA driver call must succeed, but it returned {text}")
    return values[0] if len(values) == 1 else values


class Kernel:
    """A loaded binary. The hash it carries must be the program's: LaunchFailed("mismatch") otherwise."""

    def __init__(self, binary: Binary, program: Program) -> None:
        from cuda.bindings import driver

        self.binary = binary
        self.module = check(driver.cuModuleLoadData(binary.cubin))
        self.function = check(driver.cuModuleGetFunction(self.module, b"megakernel"))
        address, _ = check(driver.cuModuleGetGlobal(self.module, b"amk_abi"))
        found = np.zeros(1, dtype=np.uint32)
        check(driver.cuMemcpyDtoH(found.ctypes.data, address, 4))
        expected = abi_hash(program)
        if int(found[0]) != expected:
            text = f"the binary must be built for this program (hash {expected:08x}), but it carries {int(found[0]):08x}"
            raise LaunchFailed("mismatch", text)
        self.grid, self.threads = program.machine.sms, block_threads(program.machine)
        self.shared_bytes = shared_layout(program).total
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        check(driver.cuFuncSetAttribute(self.function, attribute, self.shared_bytes))

    def launch(self, params: np.ndarray[Any, Any], stream: int) -> None:
        """Starts one cooperative launch with `params` (a record of vm.params.param_dtype) on a CUDA stream."""
        from cuda.bindings import driver

        record = np.ascontiguousarray(params)
        arguments = (ctypes.c_void_p * 1)(record.ctypes.data)
        check(
            driver.cuLaunchCooperativeKernel(
                self.function, self.grid, 1, 1, self.threads, 1, 1, self.shared_bytes, stream, ctypes.addressof(arguments)
            )
        )

    def close(self) -> None:
        from cuda.bindings import driver

        driver.cuModuleUnload(self.module)


def program_image(program: Program, weights: DeviceWeights) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Every SM's head, task records and stream entries as the kernel copies them; for prefill also where each entry's tiles lie."""
    offsets = weights.offsets.tolist()
    size = image_bytes(program)
    records = max(map(len, program.queues), default=0)
    image = np.zeros((len(program.queues), size), dtype=np.uint8)
    for sm, (queue, entries) in enumerate(zip(program.queues, program.streams, strict=True)):
        appends = any(isinstance(task, Attention) and task.split == 0 for task in queue)
        image[sm, :8].view(np.uint32)[:] = (len(queue), len(entries))
        image[sm, 8:16].view(np.int64)[:] = offsets[sm]
        image[sm, 16:20].view(np.uint32)[:] = int(appends)
        body = np.frombuffer(b"".join(map(encode, queue)), dtype=np.uint8)
        image[sm, IMAGE_HEAD_BYTES : IMAGE_HEAD_BYTES + len(body)] = body
        at = IMAGE_HEAD_BYTES + TASK_BYTES * records
        image[sm, at : at + 2 * len(entries)] = np.asarray(entries, dtype="<u2").view(np.uint8)
        if program.machine.prefill:
            places = b"".join(_places_of(queue[entry], weights) for entry in entries)
            image[sm, image_places(program) :][: len(places)] = np.frombuffer(places, dtype=np.uint8)
    return image


def _places_of(task: Instruction, weights: DeviceWeights) -> bytes:
    """Where the tiles of a stretch's product begin, in fragments, with zeros for those that its group lacks."""
    assert isinstance(task, StretchMatMul)
    places = np.zeros(PLACE_BYTES // 4, dtype="<u4")
    places[: task.tiles] = [weights.tiles[task.weight, task.tile0 + tile] // FRAGMENT_BYTES for tile in range(task.tiles)]
    return places.tobytes()


class DeviceWeights:
    """What a program reads and never writes: packed streams, constants, RoPE table and embedding, in card memory.

    It serves every program with the same context that reads the same bytes or the first of them: of one config those of one token,
    of a batch and for prefill.
    """

    def __init__(self, program: Program, source: WeightSource, device: str = "cuda") -> None:
        self.holds = stream_of(program)
        self.stream, self.offsets = pack_stream(program, source, device)
        self._program = program
        self.constants = constants(program, source, device)
        self.rope = source.rope_table(program.kv.rows, device).float().contiguous()
        self.embedding = embedding(program, source, device).to(element_dtype(program.machine)).contiguous()

    @cached_property
    def tiles(self) -> dict[tuple[int, int], int]:
        """The byte of the stream at which each tile (matrix, number) begins, which only programs for prefill ask for."""
        return tile_places(self._program)


def _is_over(end: Any) -> bool:
    """Whether the launch before an event has ended, in order or not."""
    try:
        return bool(end.query())
    except RuntimeError:  # `finish` says what it was
        return True


class UnprovenCudaVM:
    """A DecodeMachine on the live card for any program, proven or not: what tests of hangs and mutants use.

    `binary` may be shared between machines of one program, `weights` (DeviceWeights) between those of one stream.
    `spin_limit` is the polls after which a wait gives up, `max_steps` the most tokens of one launch. `macros` select test builds
    (vm.source.TEST_MACROS). A machine `beside` another has its weights and KV rows: one for prefill beside the one that decodes.
    """

    program: Program
    weights: DeviceWeights
    kv: Any

    def __init__(
        self,
        program: Program,
        source: WeightSource,
        *,
        arch: str,
        weights: DeviceWeights | None = None,
        binary: Binary | None = None,
        spin_limit: int = SPIN_LIMIT,
        max_steps: int = 512,
        macros: dict[str, int] | None = None,
        beside: UnprovenCudaVM | None = None,
    ) -> None:
        import torch

        if beside is not None:
            require_same_rows(program, beside.program)
            weights = beside.weights
        m = program.machine
        self.program, self.context, self.batch = program, m.context, m.batch
        torch.zeros(1, device="cuda")  # the primary context that driver calls below use
        if weights is None and m.prefill:
            raise ValueError("beside: must be the machine that decodes, whose weights a program for prefill reads, but got none")
        self.weights = weights or DeviceWeights(program, source)
        if not self.weights.holds.begins_with(stream_of(program)):
            raise LaunchFailed("mismatch", "the program must stream the bytes that its weights were packed as, but they are another's")
        self.kernel = Kernel(binary or compile_kernel(kernel_source(program, **(macros or {})), arch), program)
        self.max_steps, self.logit_rows = max_steps, 1
        self.arena = torch.zeros(program.arena_packets, dtype=torch.int32 if m.prefill else torch.int64, device="cuda")
        blocks = (program.kv.layers, program.kv.heads, program.kv.rows // KV_BLOCK_ROWS, m.kv_block_bytes)
        self.kv = beside.kv if beside else torch.zeros(blocks, dtype=torch.uint8, device="cuda")
        self.counters = torch.zeros(len(program.counters) + 1, dtype=torch.int32, device="cuda")
        self.claims = torch.zeros(m.sms, dtype=torch.int32, device="cuda")
        self.abort = torch.zeros(8, dtype=torch.int32, device="cuda")
        self.host_abort = torch.zeros(1, dtype=torch.int32).pin_memory()
        self.tokens_in = torch.zeros((max_steps, m.batch), dtype=torch.int32, device="cuda")
        self.tokens_out = torch.full((max_steps, m.batch), NO_TOKEN, dtype=torch.int32).pin_memory()  # the host looks while the launch runs
        self.stops = torch.zeros(STOP_TOKENS, dtype=torch.int32, device="cuda")
        self.positions = torch.zeros(m.batch, dtype=torch.int32, device="cuda")
        self.logits = torch.empty((1, m.batch, 0 if m.prefill else m.vocab), dtype=torch.float32, device="cuda")
        self.image = torch.from_numpy(program_image(program, self.weights)).to("cuda")
        self.buffers = torch.tensor([b.offset for b in program.buffers], dtype=torch.int32, device="cuda")
        self.epoch, self.launches = 0, 0
        self.ended: int | None = None  # tokens of the last launch, where a stop token ended it
        cards = torch.cuda.get_device_properties("cuda").multi_processor_count
        if m.sms > cards:
            raise LaunchFailed("mismatch", f"the program needs {m.sms} SMs, but the card has {cards}; compile it for this card")
        self.params = np.zeros(1, dtype=param_dtype(m.batch, program.draws, m.prefill))
        self._fixed_params(spin_limit, m.sms == cards)

    def _fixed_params(self, spin_limit: int, by_smid: bool) -> None:
        writers = sum(any(isinstance(t, Attention) and t.split == 0 for t in queue) for queue in self.program.queues)
        tensors = {
            "arena": self.arena, "image": self.image, "buffers": self.buffers, "weights": self.weights.stream, "kv": self.kv,
            "constants": self.weights.constants, "rope": self.weights.rope, "embedding": self.weights.embedding,
            "tokens_in": self.tokens_in, "tokens_out": self.tokens_out, "counters": self.counters, "claims": self.claims,
            "abort": self.abort, "host_abort": self.host_abort,
        }  # fmt: skip
        if self.batch > 1:
            tensors["positions"] = self.positions
        for name, tensor in tensors.items():
            self.params[0][name] = tensor.data_ptr()
        if self.program.draws:
            self.params[0]["stops"] = self.stops.data_ptr()
        for name, value in {"spin_limit": spin_limit, "kv_writers": writers, "by_smid": int(by_smid)}.items():
            self.params[0][name] = value

    def move_arena(self, to: Any) -> None:
        """The arena lies in `to` from now on, a tensor like it on the device; it and the counters start afresh."""
        if to.dtype != self.arena.dtype or to.shape != self.arena.shape:
            raise ValueError(f"arena: must be {list(self.arena.shape)} of {self.arena.dtype}, but got {list(to.shape)} of {to.dtype}")
        self.arena = to
        self.params[0]["arena"] = to.data_ptr()
        self._reset()

    def seed_kv(self, layer: int, keys: Any, values: Any, row: int = 0) -> None:
        """Sets KV rows 0..n-1 of a layer: tensors [kv_heads, n, head_dim], K after norm and RoPE. `row` of a batch."""
        at = plane(self.program, layer, row)
        require_rows(layer, self.program.layers, keys.shape[1], self.context)
        blocks = pack_rows(self.program.machine, keys.to("cuda"), values.to("cuda"))
        self.kv[at, :, : blocks.shape[1]] = blocks

    def read_kv(self, layer: int, stop: int, row: int = 0) -> tuple[Any, Any]:
        """KV rows 0..stop-1 of a layer, in the form of `seed_kv`: fp32 tensors on the CPU."""
        at = plane(self.program, layer, row)
        require_rows(layer, self.program.layers, stop, self.context)
        blocks = self.kv[at, :, : -(-stop // KV_BLOCK_ROWS)]
        keys, values = unpack_rows(self.program.machine, blocks, stop)
        return keys.float().cpu(), values.float().cpu()

    def decode(
        self,
        tokens: Sequence[int],
        position: int,
        *,
        steps: int | None = None,
        logits: bool = False,
        sampling: Sampling = GREEDY,
        on_token: OnStep | None = None,
    ) -> Decoded:
        """One launch (vm.interface.DecodeMachine.decode); elapsed_us is between CUDA events around it."""
        import torch

        require_decoder(self.program.machine, "decode")
        steps = len(tokens) if steps is None else steps
        self._check_range(tokens, position, steps)
        self.choose_by(sampling)
        self._logit_rows(steps if logits else 1)
        self.tokens_in[: len(tokens), 0] = torch.tensor(list(tokens), dtype=torch.int32)
        elapsed_us = self._timed(len(tokens), position, steps, on_token)
        made = self.ended or steps
        chosen = tuple(self.tokens_out[:made, 0].tolist())
        return Decoded(chosen, self.logits[:made, 0].cpu() if logits else None, elapsed_us)

    def choose_by(self, sampling: Sampling) -> None:
        """How the launches from now on choose tokens; ValueError where the program cannot."""
        import torch

        check_sampling(self.program, sampling)
        if self.program.draws:
            self.stops[: len(sampling.stop_tokens)] = torch.tensor(sampling.stop_tokens, dtype=torch.int32)
            for name, value in sampling_words(sampling).items():
                self.params[0][name] = value

    def decode_batch(
        self, tokens: Sequence[Sequence[int]], positions: Sequence[int], *, steps: int | None = None, logits: bool = False
    ) -> DecodedBatch:
        """One launch of a machine of a batch (vm.interface.BatchMachine.decode_batch)."""
        import torch

        every, places, steps = checked_rows(self.program.machine, tokens, positions, steps)
        if steps > self.max_steps:
            raise ValueError(f"decode_batch: one launch takes at most {self.max_steps} steps, but got {steps}")
        self._logit_rows(steps if logits else 1)
        forced, rows = max(map(len, every)), len(tokens)
        padded = [[*given, *[-1] * (forced - len(given))] for given in every]  # -1: the row's own choice
        self.tokens_in[:forced] = torch.tensor(padded, dtype=torch.int32).T
        self.positions[:] = torch.tensor(places, dtype=torch.int32)
        elapsed_us = self._timed(forced, places[0], steps)
        chosen = tuple(map(tuple, self.tokens_out[:steps, :rows].T.tolist()))
        return DecodedBatch(chosen, self.logits[:steps, :rows].cpu() if logits else None, elapsed_us)

    def prefill(self, tokens: Sequence[int], position: int) -> float:
        """vm.interface.PrefillMachine.prefill: a launch for each stretch, one behind the other."""
        import torch

        parts = stretches(self.program.machine, tokens, position)
        padded = torch.zeros((len(parts), self.batch), dtype=torch.int32)
        padded.view(-1)[: len(tokens)] = torch.tensor(list(tokens), dtype=torch.int32)
        seats = padded.to("cuda")

        def launch_all() -> None:
            for row, (own, start) in enumerate(parts):
                self.tokens_in[0] = seats[row]
                self.params[0]["active"] = len(own)
                self.launch(1, start, 1)

        return self._between_events(launch_all)

    def _timed(self, forced: int, position: int, steps: int, on_token: OnStep | None = None) -> float:
        """Microseconds of one launch; its tokens are in `tokens_out`."""
        self.tokens_out[:steps] = NO_TOKEN
        listen = (lambda end: self._listen(steps, end, on_token)) if on_token else None
        return self._between_events(lambda: self.launch(forced, position, steps), listen)

    def _between_events(self, start: Callable[[], None], listen: Callable[[Any], None] | None = None) -> float:
        """Microseconds of the launches that `start` makes, between CUDA events; `listen` is called with the last while they run."""
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        start()
        end.record()
        if listen is not None:
            try:
                listen(end)
            except BaseException:
                self._cancel()
                raise
        self.finish()
        return float(begin.elapsed_time(end) * 1e3)

    def _listen(self, steps: int, end: Any, on_token: OnStep) -> None:
        """Tells of tokens as the running launch writes them, until it has written all or has ended."""
        tokens, told, over = self.tokens_out.numpy()[:, 0], 0, False
        while told < steps and not over:
            over = _is_over(end)  # asked first: what is not there after the end never comes
            while told < steps and tokens[told] != NO_TOKEN:
                on_token(told, int(tokens[told]))
                told += 1
            time.sleep(0 if over else LISTEN_S)

    def launch(self, forced: int, position: int, steps: int) -> None:
        """Starts one launch on torch's current stream and returns at once; call `finish` to learn how it ended."""
        import torch

        self._begin_epochs(steps)
        self.launches += 1
        record = self.params[0]
        record["position"], record["steps"], record["epoch"], record["forced"] = position, steps, self.epoch, forced
        record["logits"], record["logit_rows"], record["launch"] = self.logits.data_ptr(), self.logit_rows, self.launches
        self.epoch += steps
        self.kernel.launch(self.params, torch.cuda.current_stream().cuda_stream)

    def finish(self) -> None:
        """Waits for the launches so far; LaunchFailed if one gave up, after which arena and counters start afresh."""
        import torch

        try:
            torch.cuda.synchronize()
        except RuntimeError as problem:
            raise LaunchFailed("crash", f"the launch must end without a CUDA error, but it ended with: {problem}") from problem
        code, where, sm, task, step, *rest = (int(v) & 0xFFFFFFFF for v in self.abort.tolist())
        self.ended = rest[END_WORD - 5] or None
        if self.ended and not code:
            self._reset()  # counters of the token that did not come about are nobody's
        if code:
            self._reset()
            actor = f"{ACTORS.get(where >> 8, 'an actor')} {WAITS.get(where & 255, '')}".rstrip()
            where_text = f"{actor} on SM {sm}, task {task} of its queue, step {step}"
            raise LaunchFailed(FAILURES.get(code, "crash"), f"the launch gave up: {where_text}")

    def _cancel(self) -> None:
        """Asks the launches so far to end, and waits for it. Who waits looks up at every 256th poll: one that runs smoothly ends late."""
        self.host_abort.fill_(1)
        with suppress(LaunchFailed):
            self.finish()
        self.host_abort.zero_()

    def arrivals(self) -> list[int]:
        """How much each counter grows in one token: the program's counters, then the ends of token."""
        totals = [0] * (len(self.program.counters) + 1)
        for task in (task for queue in self.program.queues for task in queue):
            if task.done_counter != NONE:
                totals[task.done_counter] += task.arrivals(self.program.machine)
        totals[-1] = int(self.params[0]["kv_writers"])
        return totals

    def _begin_epochs(self, steps: int) -> None:
        """A launch never crosses the end of the tags: arena and counters start afresh before it would."""
        if (self.epoch + steps + 1) * self.program.machine.tags + self.program.machine.tags > LAST_EPOCH:
            self._reset()

    def _reset(self) -> None:
        for tensor in (self.arena, self.counters, self.abort, self.host_abort):
            tensor.zero_()
        self.epoch = 0

    def _logit_rows(self, rows: int) -> None:
        import torch

        if rows > len(self.logits):
            self.logits = torch.empty((rows, self.batch, self.program.machine.vocab), dtype=torch.float32, device="cuda")
        self.logit_rows = rows
        self.logits.fill_(float("nan"))

    def _check_range(self, tokens: Sequence[int], position: int, steps: int) -> None:
        if not tokens or steps < len(tokens):
            raise ValueError(f"decode: must have at least one token and a step for each, but got {len(tokens)} tokens and {steps} steps")
        if position < 0 or position + steps > self.context:
            raise ValueError(f"decode: positions must lie in 0..{self.context - 1}, but got {position}..{position + steps - 1}")
        if steps > self.max_steps:
            raise ValueError(f"decode: one launch takes at most {self.max_steps} steps, but got {steps}")
        bad = [t for t in tokens if not 0 <= t < self.program.machine.vocab]
        if bad:
            raise ValueError(f"decode: tokens must lie in 0..{self.program.machine.vocab - 1}, but got {bad[0]}")

    def close(self) -> None:
        self.kernel.close()


class CudaVM(UnprovenCudaVM):
    """A DecodeMachine on the live card for proven programs; see UnprovenCudaVM for the options."""

    def __init__(self, program: ValidProgram, source: WeightSource, *, arch: str, **options: Any) -> None:
        super().__init__(program.program, source, arch=arch, **options)
