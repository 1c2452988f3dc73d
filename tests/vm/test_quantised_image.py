"""Quantised matrices as the bytes that the ring streams: nothing is lost, and warps that read them as the device does find the product."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, ChunkPlan, Machine, chunk_plan
from amk.isa.matvec import MatVec
from amk.isa.weight_format import FORMATS, WeightFormat
from amk.models.quantise import dequantise, quantise
from amk.models.quantised_weights import QuantisedWeights, with_weights
from amk.schedule.model import QuantisedMatrix
from amk.vm.image import pack_stream
from amk.vm.layout import quantised_rows
from amk.vm.quantised_image import pack_quantised, part_of, unpack_quantised

LANES = [(lane >> 2, lane & 3) for lane in range(32)]


def some_machine(make_program: Any, make_spec: Any, **fields: Any) -> Machine:
    return replace(make_program(make_spec("bf16")).machine, **fields)


def random_matrix(form: WeightFormat, rows: int, columns: int) -> QuantisedMatrix:
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(0, 1 << form.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, form.groups(columns), generator=generator).to(torch.float16 if form.scale == "fp16" else torch.bfloat16)
    zeros = torch.randint(0, 1 << form.bits, scales.shape, generator=generator, dtype=torch.uint8)
    return QuantisedMatrix(form, codes, scales, zeros if form.asymmetric else torch.full_like(zeros, form.zero))


def same(a: QuantisedMatrix, b: QuantisedMatrix) -> bool:
    return a.weights == b.weights and all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("codes", "scales", "zeros"))


@pytest.mark.parametrize("scale", ["bf16", "fp16"])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rows", "columns", "warps"), [(16, 64, 4), (33, 200, 8), (5, 1088, 4), (32, 2048, 8)])
def test_unpacking_is_the_inverse_of_packing(
    rows: int, columns: int, warps: int, name: str, scale: Any, make_spec: Any, make_program: Any
) -> None:
    machine, form = some_machine(make_program, make_spec, consumer_warps=warps, stage_bytes=19456), replace(FORMATS[name], scale=scale)
    plan, matrix = chunk_plan(machine, columns, form), random_matrix(form, rows, columns)
    packed = pack_quantised(matrix, plan)
    assert packed.shape == (-(-rows // TILE_ROWS), plan.tile_bytes)
    assert plan.tile_bytes == sum(plan.chunk_bytes(c) for c in range(plan.chunks)) and plan.chunk_bytes(0) <= machine.stage_bytes
    assert same(unpack_quantised(packed, plan, form, rows), matrix)


class Warp:
    """One consumer warp over one tile, lane by lane, by the definition of mma.m16n8k16: what isa/device/matvec_quantised.cuh computes.

    A lane (g, t) holds A rows g and g + 8 in k = 2t, 2t + 1 (registers 0 and 1) and k = 2t + 8, 2t + 9 (registers 2 and 3). Those rows
    of B come from the lanes with the same t. So a lane's registers meet the x that lanes with its t have loaded.
    """

    def __init__(self, form: WeightFormat, plan: ChunkPlan, x: np.ndarray) -> None:
        self.form, self.plan, self.x = form, plan, x
        self.rows = np.zeros(TILE_ROWS)

    def chunk(self, chunk: bytes, first: int, pieces: int, at: int) -> None:
        """Takes `pieces` pieces at byte `at` of a chunk; the first covers columns from `first`."""
        form, piece = self.form, self.plan.piece
        for number in range(pieces):
            own = chunk[at + number * piece.bytes : at + (number + 1) * piece.bytes]
            codes_bytes = piece.bytes // FRAGMENT_BYTES * FRAGMENT_BYTES
            beside = own[codes_bytes:] if form.group else chunk[-piece.tail :]
            for step in range(piece.columns // 32):
                column = first + number * piece.columns + 32 * step
                group = 32 * step // form.group if form.group else 0
                self._step(own, step, column, *self._group(beside, group, piece.columns // form.group if form.group else 1))

    def _group(self, beside: bytes, group: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Scales and zeros [8, 2] of rows g and g + 8."""
        raw = np.frombuffer(beside[32 * group : 32 * group + 32], dtype="<u2").reshape(8, 2)
        scales = raw.view(np.float16).astype(np.float64) if self.form.scale == "fp16" else (raw.astype(np.uint32) << 16).view(np.float32)
        if not self.form.asymmetric:
            return scales, np.full((8, 2), self.form.zero)
        start = 32 * groups + 16 * group
        return scales, np.frombuffer(beside[start : start + 16], dtype=np.uint8).reshape(8, 2)

    def _step(self, piece: bytes, step: int, column: int, scales: np.ndarray, zeros: np.ndarray) -> None:
        """32 columns: two products."""
        a_fragment = 256 // self.form.bits // 32  # steps of a fragment
        fragment = np.frombuffer(piece, dtype="<u4", count=128, offset=step // a_fragment * FRAGMENT_BYTES).reshape(32, 4)
        for lane, (g, t) in enumerate(LANES):
            x = self.x[column + 8 * t : column + 8 * t + 8]
            for half in (0, 1):
                for product in (0, 1):
                    for register in (0, 1):
                        pair = self._pair(fragment[lane], step % a_fragment, half, product, register)
                        columns = 4 * product + 2 * register
                        elements = (np.array(pair) - int(zeros[g, half])) * float(scales[g, half])
                        self.rows[g + 8 * half] += elements @ x[columns : columns + 2]

    def _pair(self, words: np.ndarray, part: int, half: int, product: int, register: int) -> tuple[int, int]:
        if self.form.bits == 8:
            word, shift, mask = int(words[2 * product + half]), 8 * register, 0xFF
        else:
            word, shift, mask = int(words[2 * part + half]), 8 * product + 4 * register, 0xF
        return word >> shift & mask, word >> (shift + 16) & mask


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("columns", "warps"), [(200, 8), (1152, 4)])
def test_warps_that_read_as_the_device_does_find_the_product(
    name: str, columns: int, warps: int, make_spec: Any, make_program: Any
) -> None:
    machine, form = some_machine(make_program, make_spec, consumer_warps=warps, stage_bytes=2432 * warps), FORMATS[name]
    plan, matrix = chunk_plan(machine, columns, form), random_matrix(form, 16, columns)
    rng = np.random.default_rng(columns)
    x = rng.standard_normal(columns)
    padded = np.concatenate([x, np.zeros(plan.tile_pieces * plan.piece.columns - columns)])
    stream, at = pack_quantised(matrix, plan)[0].numpy().tobytes(), 0
    sums = Warp(form, plan, padded)
    for c in range(plan.chunks):
        chunk = stream[at : at + plan.chunk_bytes(c)]
        at += len(chunk)
        offset = 0
        for w in range(warps):
            pieces = plan.pieces_in_chunk(c, w)
            sums.chunk(chunk, (plan.first(w) + c * plan.per_chunk) * plan.piece.columns, pieces, offset)
            offset += pieces * plan.piece.bytes
    np.testing.assert_allclose(sums.rows, dequantise(matrix).double().numpy() @ x, rtol=1e-9)


def halves(word: np.ndarray, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The two elements in 32-bit words."""
    low, high = (word & 0xFFFF).astype(np.uint32), (word >> 16).astype(np.uint32)
    if dtype == "fp16":
        return low.astype(np.uint16).view(np.float16).astype(np.float64), high.astype(np.uint16).view(np.float16).astype(np.float64)
    return (low << 16).view(np.float32).astype(np.float64), (high << 16).view(np.float32).astype(np.float64)


def holds(values: np.ndarray, dtype: str) -> bool:
    kind = torch.float16 if dtype == "fp16" else torch.bfloat16
    return bool((torch.from_numpy(values).to(kind).double().numpy() == values).all())


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_bits_beside_an_exponent_are_every_code_exactly_and_so_is_each_difference(bits: int, dtype: str) -> None:
    codes = np.arange(1 << bits, dtype=np.uint32)
    words = codes | codes[::-1] << 16 | 0xFFFFFFFF & ~np.uint32(((1 << bits) - 1) * 0x10001)  # whatever else is in the word
    bias = 0x64006400 if dtype == "fp16" else 0x43004300
    if bits == 8 and dtype == "bf16":
        lower, upper = halves((words & 0x007F007F) | bias, dtype), halves((words & 0x00800080) ^ np.uint32(0xC380C380), dtype)
        biased = [a + b for a, b in zip(lower, upper, strict=True)]
        middle = -128
    else:
        biased = list(halves((words & (0x000F000F if bits == 4 else 0x00FF00FF)) | bias, dtype))
        middle = 1024 if dtype == "fp16" else 128
    np.testing.assert_array_equal(biased[0], codes + np.float64(middle))
    np.testing.assert_array_equal(biased[1], codes[::-1] + np.float64(middle))
    assert holds(biased[0], dtype)
    assert holds((biased[0][:, None] - biased[0][None, :]).ravel(), dtype)


@pytest.mark.parametrize("name", ["int8", "int8-g32-asym", "int4-g64", "int4-asym"])
def test_the_stream_holds_the_tiles_of_quantised_matrices(name: str, make_spec: Any, make_program: Any, make_source: Any) -> None:
    spec = with_weights(make_spec("bf16", intermediate=90), FORMATS[name])
    source = QuantisedWeights(make_source(spec), spec)
    program = make_program(spec, n_tile=32)
    stream, starts = pack_stream(program, source)
    at, seen = 0, set()
    for sm, (queue, entries) in enumerate(zip(program.queues, program.streams, strict=True)):
        assert starts[sm] == at
        for task in (queue[index] for index in entries):
            if isinstance(task, MatVec):
                plan = task.plan(program.machine)
                assert sum(task.chunk_bytes(program.machine, 0)) == task.tiles * plan.tile_bytes
                packed = stream[at : at + task.tiles * plan.tile_bytes].view(task.tiles, -1)
                whole = quantised_rows(program.matrices[task.weight], source)
                expected = part_of(whole, slice(16 * task.tile0, 16 * (task.tile0 + task.tiles)))
                found = unpack_quantised(packed, plan, whole.weights, len(expected.codes))
                assert torch.equal(found.codes, expected.codes) and torch.equal(dequantise(found), dequantise(expected))
                at += packed.numel()
                seen.add(task.weight)
    assert at == len(stream) and len(seen) == len(program.matrices)


def test_a_source_of_another_format_is_refused(make_spec: Any, make_program: Any, make_source: Any) -> None:
    spec = with_weights(make_spec("bf16"), FORMATS["int8"])
    other = with_weights(make_spec("bf16"), FORMATS["int4"])
    with pytest.raises(ValueError, match="int4"):
        pack_stream(make_program(spec), QuantisedWeights(make_source(spec), other))


def test_rows_that_pad_mean_zero(make_spec: Any, make_program: Any) -> None:
    form = FORMATS["int4-g32-asym"]
    machine = some_machine(make_program, make_spec)
    plan = chunk_plan(machine, 96, form)
    packed = pack_quantised(quantise(torch.randn(5, 96).bfloat16(), form), plan)
    assert float(dequantise(unpack_quantised(packed, plan, form, 16))[5:].abs().max()) == 0
