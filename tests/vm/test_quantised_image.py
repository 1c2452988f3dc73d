"""Quantised matrices as the bytes that the ring streams: nothing is lost, and warps that read them as the device does find the product."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product as product_of
from typing import Any

import numpy as np
import pytest
import torch

from amk.isa.machine import FRAGMENT_BYTES, TILE_ROWS, ChunkPlan, Machine, chunk_plan, quantised_piece
from amk.isa.matvec import MatVec
from amk.isa.rounding import fixed_point, round_to, scaled_halves, two_part
from amk.isa.weight_format import FORMATS, FP8, FP8_GROUPS, WeightFormat
from amk.models.quantise import dequantise, quantise
from amk.models.quantised_weights import QuantisedWeights, with_weights
from amk.schedule.model import QuantisedMatrix
from amk.vm.image import pack_stream
from amk.vm.layout import quantised_rows
from amk.vm.quantised_image import pack_quantised, part_of, unpack_quantised

LANES = [(lane >> 2, lane & 3) for lane in range(32)]
MINUS_ONES = np.full((32, 4), 0xFFFFFFFF, dtype=np.uint32)  # codes of -1


def some_machine(make_program: Any, make_spec: Any, **fields: Any) -> Machine:
    return replace(make_program(make_spec("bf16")).machine, **fields)


def random_matrix(form: WeightFormat, rows: int, columns: int) -> QuantisedMatrix:
    generator = torch.Generator().manual_seed(rows * columns)
    codes = torch.randint(0, 1 << form.bits, (rows, columns), generator=generator, dtype=torch.uint8)
    if form.floating:
        codes = torch.where(codes & 127 == 127, codes ^ 1, codes)  # not what is no number
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


def permuted(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """__byte_perm: byte i of a result is the byte of b:a that digit i of the selector names."""
    source = np.stack([a >> 8 * i & 0xFF for i in range(4)] + [b >> 8 * i & 0xFF for i in range(4)]).astype(np.uint32)
    return sum((source[selector >> 4 * i & 7] << 8 * i for i in range(4)), np.zeros_like(a))


def fixed_integers(x: np.ndarray) -> tuple[np.ndarray, float]:
    """FixedPointScale of fixed_point.cuh, in its arithmetic: `integer` of each x, and `down`."""
    x = x.astype(np.float32)
    exponent = max(int(np.abs(x).max(initial=0).astype(np.float32).view(np.uint32)) >> 23, 64)
    up, down = (np.uint32(e << 23).view(np.float32) for e in (275 - exponent, exponent - 21))
    shifted = (x.astype(np.float64) * np.float64(up) + 12582912.0).astype(np.float32)
    return shifted.view(np.uint32) - np.uint32(0x4B400000 - 0x8080), float(down)


def digit_planes(x: np.ndarray, pairs: bool) -> tuple[np.ndarray, float]:
    """int8 [3, columns] as FixedPointSlice::write leaves them in scratch, four columns at a time or two; and what the lowest is worth."""
    v, down = fixed_integers(x)
    if pairs:
        a, b, c, d = v.reshape(-1, 4).T
        ab, cd = permuted(a, b, 0x5140), permuted(c, d, 0x5140)
        upper = permuted(permuted(a, b, 0x0062), permuted(c, d, 0x0062), 0x5410)
        words = [upper, permuted(ab, cd, 0x7632) ^ np.uint32(0x80808080), permuted(ab, cd, 0x5410) ^ np.uint32(0x80808080)]
        return np.stack([np.ascontiguousarray(w).view(np.int8) for w in words]), down
    a, b = v.reshape(-1, 2).T
    ab = permuted(a, b, 0x5140) ^ np.uint32(0x80808080)
    halves_of = [permuted(a, b, 0x0062), ab >> 16, ab]
    return np.stack([h.astype(np.uint16).view(np.int8) for h in halves_of]), down


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-3, 1.0, 300.0, 3e38])
def test_three_digits_hold_x_to_2_22_of_the_largest(magnitude: float, pairs: bool) -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(4096) * rng.choice([1, 1e-3, 1e-8], 4096)).clip(-1, 1).astype(np.float32)
    x[:4] = 1, -1, np.nextafter(np.float32(2), np.float32(0)) / 2, 0
    x *= np.float32(magnitude)
    digits, down = digit_planes(x, pairs)
    value = (digits[0].astype(np.float64) * 65536 + digits[1] * 256.0 + digits[2]) * down
    largest = float(np.abs(x).max())
    assert np.abs(digits[0].astype(int)).max() <= 64  # so that sums of both columns do not overflow
    assert np.abs(value - x).max() <= max(largest * 2**-22, 2.0**-84)
    np.testing.assert_array_equal(value.astype(np.float32), fixed_point(x))


def test_a_16_bit_x_keeps_every_bit_down_to_a_share_of_the_largest() -> None:
    rng = np.random.default_rng(4)
    x = round_to(rng.standard_normal(4096) * np.exp2(rng.integers(-13, 1, 4096)), "bf16")
    near = np.abs(x) >= np.abs(x).max() * 2**-14
    np.testing.assert_array_equal(fixed_point(x)[near], x[near])
    assert near.sum() > 2000


def signed_bytes(words: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(words.astype(np.uint32)).view(np.int8).reshape(*words.shape, 4).astype(np.int64)


def accumulators(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[32, 4] of 16 rows by 8 columns, by the definition of mma.m16n8kK: registers [32, 4, K / 8] of A and [32, 2, K / 8] of B."""
    n = a.shape[2]
    rows, columns = np.zeros((16, 8 * n), dtype=a.dtype), np.zeros((8 * n, 8), dtype=b.dtype)
    for lane, (g, t) in enumerate(LANES):
        for register in range(4):
            k = n * t + 4 * n * (register >> 1)
            rows[g + 8 * (register & 1), k : k + n] = a[lane, register]
        for register in range(2):
            k = n * t + 4 * n * register
            columns[k : k + n, g] = b[lane, register]
    d = rows @ columns
    return np.array([[d[g, 2 * t], d[g, 2 * t + 1], d[g + 8, 2 * t], d[g + 8, 2 * t + 1]] for g, t in LANES])


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mma.m16n8k32 of signed bytes: registers [32, 4] and [32, 2] of A and B, accumulators [32, 4]."""
    return accumulators(signed_bytes(a), signed_bytes(b))


def quarter(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """mma.m8n8k16 of signed bytes by its definition: a register [32] of A and of B, accumulators [32, 2]."""
    rows, columns = signed_bytes(a).reshape(8, 16), signed_bytes(b).reshape(8, 16).T
    d = rows @ columns
    return np.array([d[g, 2 * t : 2 * t + 2] for g, t in LANES])


def test_four_quarters_are_the_product() -> None:
    a, b = (np.random.default_rng(n).integers(0, 1 << 32, (32, n), dtype=np.uint32) for n in (4, 2))
    quarters = [quarter(a[:, half], b[:, 0]) + quarter(a[:, half + 2], b[:, 1]) for half in (0, 1)]
    np.testing.assert_array_equal(np.concatenate(quarters, axis=1), product(a, b))


def bytes_of(form: WeightFormat, fragments: np.ndarray, step: int) -> np.ndarray:
    """[32, 4] registers of A, 32 columns of fragments [n, 32, 4]."""
    if form.bits == 8:
        return fragments[step]
    low, high = fragments[step // 2][:, 2 * (step % 2)], fragments[step // 2][:, 2 * (step % 2) + 1]
    upper = np.uint32(0xF0F0F0F0)
    return np.stack([low << 4 & upper, high << 4 & upper, low & upper, high & upper], axis=1)


class Warp:
    """One consumer warp over one tile, lane by lane: what isa/device/matvec_quantised.cuh computes."""

    def __init__(self, form: WeightFormat, plan: ChunkPlan, x: np.ndarray, narrow: bool) -> None:
        """`x`: the warp's slice."""
        self.form, self.plan = form, plan
        self.digits, self.down = digit_planes(x, narrow)
        self.low, self.high = np.zeros(32), np.zeros(32)
        self.row = np.zeros((32, 4), dtype=np.int64)

    def operand(self, step: int) -> np.ndarray:
        """[32, 2] words: eight columns of the plane of the lane's digit."""
        at = [(min(g, 2), 32 * step + 8 * t) for g, t in LANES]
        return np.array([self.digits[plane, c : c + 8].copy().view(np.uint32) for plane, c in at])

    def chunk(self, chunk: bytes, first: int, pieces: int, at: int) -> None:
        """Takes `pieces` pieces at byte `at` of a chunk; the first is number `first` of the slice."""
        form, piece = self.form, self.plan.piece
        steps, group_steps = piece.columns // 32, (form.group or piece.columns) // 32
        for number in range(pieces):
            own = chunk[at + number * piece.bytes : at + (number + 1) * piece.bytes]
            codes_bytes = piece.bytes // FRAGMENT_BYTES * FRAGMENT_BYTES
            fragments = np.frombuffer(own[:codes_bytes], dtype="<u4").reshape(-1, 32, 4)
            for group in range(steps // group_steps):
                sums, less_x = np.zeros((32, 4), dtype=np.int64), np.zeros((32, 4), dtype=np.int64)
                for step in range(group * group_steps, (group + 1) * group_steps):
                    b = self.operand((first + number) * steps + step)
                    sums += product(bytes_of(self.form, fragments, step), b)
                    less_x += product(MINUS_ONES, b)
                if form.group:
                    assert np.abs(sums[:, [0, 2]]).max() * 256 + np.abs(sums[:, [1, 3]]).max() < 2**31
                    self._scale(sums, less_x, own[codes_bytes:], group, steps // group_steps)
                else:
                    self.row += sums

    def end(self, last_chunk: bytes) -> np.ndarray:
        """The tile's 16 rows, after its last chunk."""
        if not self.form.group:
            total = np.zeros((32, 4), dtype=np.int64)
            for step in range(self.digits.shape[1] // 32):
                total += product(MINUS_ONES, self.operand(step))
            self._scale(self.row, total, last_chunk[-self.plan.piece.tail :], 0, 1)
        code_unit = 1 / 16 if self.form.bits == 4 else 1
        unit = np.array([self.down * code_unit * (256 if t == 0 else 1 / 257) for _, t in LANES])
        low, high = self.low * unit, self.high * unit
        return np.concatenate([low[0::4] + low[1::4], high[0::4] + high[1::4]])

    def _scale(self, sums: np.ndarray, less_x: np.ndarray, beside: bytes, group: int, groups: int) -> None:
        raw = np.frombuffer(beside[32 * group : 32 * group + 32], dtype="<u2").reshape(8, 2)
        scales = raw.view(np.float16).astype(np.float64) if self.form.scale == "fp16" else (raw.astype(np.uint32) << 16).view(np.float32)
        zeros = np.zeros((8, 2))
        if self.form.asymmetric:
            start = 32 * groups + 16 * group
            zeros = np.frombuffer(beside[start : start + 16], dtype=np.int8).reshape(8, 2)
        for lane, (g, _) in enumerate(LANES):
            s, minus_x = sums[lane], 256 * less_x[lane, 0] + less_x[lane, 1]
            self.low[lane] += float(scales[g, 0]) * (256 * s[0] + s[1] + int(zeros[g, 0]) * minus_x)
            self.high[lane] += float(scales[g, 1]) * (256 * s[2] + s[3] + int(zeros[g, 1]) * minus_x)


def halves_by_bits(codes: np.ndarray, first: int) -> np.ndarray:
    """The function of isa/device/matvec_fp8.cuh, [..., 2] as float64."""
    apart = permuted(codes, np.zeros_like(codes), 0x3424 if first else 0x1404)
    small = apart & np.uint32(0x80008000) | apart >> 1 & np.uint32(0x3F803F80)
    halves = np.stack([small & 0xFFFF, small >> 16], axis=-1).astype(np.uint16).view(np.float16)
    return (halves * np.float16(256)).astype(np.float64)


def halves_of(codes: np.ndarray) -> np.ndarray:
    """The same for all four codes of words, [..., 4]: what the conversion that newer cards have makes of them."""
    numbers = torch.from_numpy(np.ascontiguousarray(codes).view(np.uint8).copy()).view(torch.float8_e4m3fn)
    return numbers.double().numpy().reshape(*codes.shape, 4)


def test_every_fp8_code_becomes_the_fp16_that_it_is_wherever_it_stands() -> None:
    """By bits as by the conversion, beside whatever other codes."""
    numbers = np.array([code for code in range(256) if code & 127 != 127], dtype=np.uint8)
    codes = np.stack([np.random.default_rng(column).permutation(numbers) for column in range(4)], axis=1)  # [254, 4]
    codes = np.concatenate([codes, np.stack([numbers, 254 - numbers, numbers ^ 128, numbers ^ 1], axis=1) % 127])
    row = torch.from_numpy(np.pad(codes, ((0, 512 - len(codes)), (0, 0)))).reshape(16, -1)  # 32 words a row
    plan = ChunkPlan(row.shape[1], 1, 4, 4, 0, 4, 1, quantised_piece(FP8))
    packed = pack_quantised(QuantisedMatrix(FP8, row, torch.ones(16, 1, dtype=torch.bfloat16), torch.zeros(16, 1, dtype=torch.uint8)), plan)
    words = packed[0, : 4 * FRAGMENT_BYTES].numpy().view("<u4").reshape(4, 32, 2, 2)  # fragment, lane, word pair, row half
    by_bits = np.concatenate([halves_by_bits(words, 0), halves_by_bits(words, 2)], axis=-1)
    np.testing.assert_array_equal(by_bits, halves_of(words))
    np.testing.assert_array_equal(np.signbit(by_bits), np.signbit(halves_of(words)))
    expected = row.view(torch.float8_e4m3fn).double().numpy()
    for fragment, (lane, (g, t)), pair, half in product_of(range(4), list(enumerate(LANES)), (0, 1), (0, 1)):
        columns = expected[g + 8 * half, 32 * fragment + 16 * pair + 4 * t :][:4]
        np.testing.assert_array_equal(by_bits[fragment, lane, pair, half], columns)


def half_scale(x: np.ndarray) -> tuple[np.float32, np.float32]:
    """HalfScale of isa/device/matvec_fp8.cuh, in its arithmetic: `up` and `down`."""
    exponent = max(int(np.abs(x).max(initial=0).astype(np.float32).view(np.uint32)) >> 23, 64)
    up, down = (np.uint32(e << 23).view(np.float32) for e in (268 - exponent, exponent - 14))
    return up, down


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 2.0**-63, 1e-3, 1.0, 65520.0, 3e38])
def test_two_fp16_hold_x_to_2_22_of_it_and_2_39_of_the_largest(magnitude: float) -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal(4096) * rng.choice([1, 1e-3, 1e-8], 4096)).clip(-1, 1).astype(np.float32)
    x[:4] = 1, -1, np.nextafter(np.float32(2), np.float32(0)) / 2, 0
    x *= np.float32(magnitude)
    up, down = half_scale(x)
    assert up * down == 1
    taken = two_part(x * up, "fp16") * down
    np.testing.assert_array_equal(taken, scaled_halves(x))
    assert (np.abs(taken.astype(np.float64) - x) <= np.maximum(np.abs(x) * 2.0**-22, max(np.abs(x).max() * 2.0**-39, 2.0**-101))).all()
    if 0 < magnitude < 2**-63:
        return
    assert not magnitude or 2**14 <= np.abs(x * up).max() < 2**15
    narrow = round_to(x, "bf16")
    near = np.abs(narrow) >= np.abs(narrow).max() * 2**-29
    np.testing.assert_array_equal((round_to(narrow * up, "fp16") * down)[near], narrow[near])


@pytest.mark.parametrize("x", [np.inf, -np.inf, np.nan])
def test_an_x_that_is_no_number_is_nothing_else_in_halves(x: float) -> None:
    assert np.isnan(scaled_halves(np.array([1.0, x], dtype=np.float32))).all()


class NumbersWarp:
    """The same for weights in fp8: what isa/device/matvec_fp8.cuh computes."""

    def __init__(self, plan: ChunkPlan, x: np.ndarray, narrow: bool) -> None:
        self.plan, self.narrow = plan, narrow
        up, self.down = half_scale(x)
        rounded = round_to(x * up, "fp16")
        self.parts = [rounded] if narrow else [rounded, round_to(x * up - rounded, "fp16")]
        self.sums, self.low, self.high = np.zeros((32, 4)), np.zeros(8), np.zeros(8)

    def operand(self, step: int) -> np.ndarray:
        """[32, 2, 2]: four columns of the part of the lane's column; columns that nobody looks at have the first."""
        at = [(self.parts[1 if g == 1 and not self.narrow else 0], 16 * step + 4 * t) for g, t in LANES]
        return np.array([part[c : c + 4].reshape(2, 2) for part, c in at])

    def chunk(self, chunk: bytes, first: int, pieces: int, at: int) -> None:
        piece = self.plan.piece
        for number in range(pieces):
            own = chunk[at + number * piece.bytes : at + (number + 1) * piece.bytes]
            codes = own[: piece.columns * TILE_ROWS]
            fragments = halves_of(np.frombuffer(codes, dtype="<u4").reshape(-1, 32, 4))
            for i in range(2 * len(fragments)):
                low, high = (fragments[i // 2][:, 2 * (i % 2) + half] for half in (0, 1))
                a = np.stack([low[:, :2], high[:, :2], low[:, 2:], high[:, 2:]], axis=1)
                self.sums += accumulators(a, self.operand(2 * len(fragments) * (first + number) + i))
            if not piece.tail:
                self._scale(own[len(codes) :])

    def end(self, last_chunk: bytes) -> np.ndarray:
        if tail := self.plan.piece.tail:
            self._scale(last_chunk[-tail:])
        return np.concatenate([self.low, self.high]) * self.down

    def _scale(self, beside: bytes) -> None:
        scales = (np.frombuffer(beside, dtype="<u2").reshape(8, 2).astype(np.uint32) << 16).view(np.float32)
        columns = [0] if self.narrow else [0, 1]
        low, high = (self.sums[0::4][:, [2 * half + c for c in columns]].sum(axis=1) for half in (0, 1))
        self.low, self.high = self.low + low * scales[:, 0], self.high + high * scales[:, 1]
        self.sums = np.zeros((32, 4))


@pytest.mark.parametrize("form", [FP8, FP8_GROUPS], ids=["fp8", "fp8-g128"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(("columns", "warps", "narrow"), [(200, 8, True), (1152, 4, False), (2048, 8, False)])
def test_warps_that_read_numbers_as_the_device_does_find_the_product(
    form: WeightFormat, dtype: str, columns: int, warps: int, narrow: bool, make_spec: Any, make_program: Any
) -> None:
    machine = some_machine(make_program, make_spec, consumer_warps=warps, stage_bytes=2432 * warps)
    plan, matrix = chunk_plan(machine, columns, form), random_matrix(form, 16, columns)
    x = np.random.default_rng(columns).standard_normal(columns).astype(np.float32)
    x = round_to(x, dtype) if narrow else x
    padded = np.concatenate([x, np.zeros(plan.tile_pieces * plan.piece.columns - columns, dtype=np.float32)])
    own = slices_of(plan)
    found = found_by(plan, matrix, [NumbersWarp(plan, padded[s], narrow) for s in own])
    taken = x if narrow else np.concatenate([scaled_halves(padded[s]) for s in own])[:columns]
    weights = dequantise(matrix).double().numpy()
    np.testing.assert_allclose(found, weights @ taken, rtol=1e-9, atol=1e-9 * np.abs(weights @ x).max())


def slices_of(plan: ChunkPlan) -> list[slice]:
    """Columns of x of each warp, padding at the end among them."""
    width = plan.piece.columns
    return [slice(plan.first(w) * width, (plan.first(w) + plan.pieces(w)) * width) for w in range(plan.warps)]


def found_by(plan: ChunkPlan, matrix: QuantisedMatrix, consumers: Sequence[Warp | NumbersWarp]) -> np.ndarray:
    """What the warps make of the matrix's one tile, chunk after chunk."""
    stream, at, chunk = pack_quantised(matrix, plan)[0].numpy().tobytes(), 0, b""
    for c in range(plan.chunks):
        chunk = stream[at : at + plan.chunk_bytes(c)]
        at += len(chunk)
        offset = 0
        for w, consumer in enumerate(consumers):
            pieces = plan.pieces_in_chunk(c, w)
            consumer.chunk(chunk, c * plan.per_chunk, pieces, offset)
            offset += pieces * plan.piece.bytes
    return np.asarray(sum(consumer.end(chunk) for consumer in consumers))


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.floating])
@pytest.mark.parametrize(("columns", "warps", "narrow"), [(200, 8, True), (1152, 4, False)])
def test_warps_that_read_as_the_device_does_find_the_product(
    name: str, columns: int, warps: int, narrow: bool, make_spec: Any, make_program: Any
) -> None:
    machine, form = some_machine(make_program, make_spec, consumer_warps=warps, stage_bytes=2432 * warps), FORMATS[name]
    plan, matrix = chunk_plan(machine, columns, form), random_matrix(form, 16, columns)
    x = np.random.default_rng(columns).standard_normal(columns).astype(np.float32)
    padded = np.concatenate([x, np.zeros(plan.tile_pieces * plan.piece.columns - columns, dtype=np.float32)])
    own = slices_of(plan)
    found = found_by(plan, matrix, [Warp(form, plan, padded[s], narrow) for s in own])
    weights, taken = dequantise(matrix).double().numpy(), np.concatenate([fixed_point(padded[s]) for s in own])[:columns]
    np.testing.assert_allclose(found, weights @ taken, rtol=1e-9, atol=1e-9 * np.abs(weights @ x).max())


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_less_its_zero_is_the_difference_of_their_bytes(bits: int) -> None:
    """A fragment of every code, beside every zero: what `bytes_of` and the zero's byte are of, in the stream's own order."""
    form, lanes = FORMATS[f"int{bits}-asym"], np.arange(1 << bits)
    codes = torch.arange(1 << bits, dtype=torch.uint8).repeat(512 // bits)[: 16 * 256 // bits].view(16, -1)
    plan = ChunkPlan(codes.shape[1], 1, 1, 1, 0, 1, 1, quantised_piece(form))
    zeros = torch.from_numpy(lanes[:16].astype(np.uint8))[:, None]
    packed = pack_quantised(QuantisedMatrix(form, codes, torch.ones(16, 1, dtype=torch.bfloat16), zeros), plan)[0].numpy()
    words = packed[:FRAGMENT_BYTES].view("<u4").reshape(1, 32, 4)
    a = np.concatenate([signed_bytes(bytes_of(form, words, step)) for step in range(8 // bits)], axis=2)
    scale = 16 if bits == 4 else 1
    for lane, (g, t) in enumerate(LANES):
        for half in (0, 1):
            expected = [codes[g + 8 * half, 32 * step + 8 * t + i] for step in range(8 // bits) for i in range(8)]
            taken = [a[lane, half + 2 * (i // 4), 4 * step + i % 4] for step in range(8 // bits) for i in range(8)]
            zero = int(packed[-16:].view(np.int8).reshape(8, 2)[g, half])
            assert [v - zero for v in taken] == [scale * (int(c) - int(zeros[g + 8 * half, 0])) for c in expected]


@pytest.mark.parametrize("name", ["int8", "int8-g32-asym", "int4-g64", "int4-asym", "fp8"])
def test_the_stream_holds_the_tiles_of_quantised_matrices(name: str, make_spec: Any, make_program: Any, make_source: Any) -> None:
    spec = with_weights(make_spec("bf16", intermediate=92), FORMATS[name])
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
