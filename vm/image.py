"""A program as the bytes that the device reads, and weights as the bytes that it streams; and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from amk.isa.abi import TASK_BYTES
from amk.isa.machine import TILE_ROWS, ChunkPlan, Machine
from amk.isa.matvec import MatVec
from amk.isa.registry import decode, encode
from amk.schedule.model import WeightSource
from amk.schedule.program import Matrix, Program
from amk.schedule.stream import stream_of
from amk.vm.layout import matrix_rows, quantised_rows
from amk.vm.quantised_image import pack_quantised, part_of

if TYPE_CHECKING:
    import torch

TORCH_NAME = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Image:
    """A program's bytes: 64-byte task records of each SM, its stream entries (u16 queue indices), and the buffers' offsets (u32)."""

    tasks: tuple[bytes, ...]
    streams: tuple[bytes, ...]
    buffers: bytes


def pack_program(program: Program) -> Image:
    """OverflowError if a number does not fit its field."""
    return Image(
        tasks=tuple(b"".join(map(encode, queue)) for queue in program.queues),
        streams=tuple(np.array(stream, dtype="<u2").tobytes() for stream in program.streams),
        buffers=np.array([buffer.offset for buffer in program.buffers], dtype="<u4").tobytes(),
    )


def unpack_program(image: Image, frame: Program) -> Program:
    """The program that `pack_program` made the image from; what the image does not hold comes from `frame`, whose queues are ignored."""
    offsets = np.frombuffer(image.buffers, dtype="<u4").tolist()
    return replace(
        frame,
        buffers=tuple(replace(buffer, offset=offset) for buffer, offset in zip(frame.buffers, offsets, strict=True)),
        queues=tuple(tuple(map(decode, _records(tasks))) for tasks in image.tasks),
        streams=tuple(tuple(np.frombuffer(stream, dtype="<u2").tolist()) for stream in image.streams),
    )


def _records(tasks: bytes) -> Iterator[bytes]:
    return (tasks[at : at + TASK_BYTES] for at in range(0, len(tasks), TASK_BYTES))


def pack_matrix(rows: torch.Tensor, plan: ChunkPlan, machine: Machine) -> torch.Tensor:
    """uint8 [tiles, tile_bytes] of a matrix [rows, plan.columns] on its device, in the order in which the ring streams a tile.

    A fragment is 512 bytes, 16 for each lane. 16-bit: with g = lane >> 2 and t = lane & 3 a lane owns (g, 4t), (g, 4t+1), (g+8, 4t),
    (g+8, 4t+1), (g, 4t+2), (g, 4t+3), (g+8, 4t+2), (g+8, 4t+3) of 16 rows by 16 columns: the A fragment of mma.m16n8k16 with its K columns
    permuted so that a lane's two B registers are one 8-byte word. fp32: lane l owns row l >> 1, columns 4 (l & 1) to 4 (l & 1) + 3.
    Rows and columns beyond the matrix are zero.
    """
    import torch

    columns, fragments = machine.fragment_columns, plan.tile_pieces
    padded = torch.nn.functional.pad(
        rows.to(getattr(torch, TORCH_NAME[machine.dtype])), (0, fragments * columns - rows.shape[1], 0, -rows.shape[0] % TILE_ROWS)
    )
    tiles = padded.shape[0] // TILE_ROWS
    if machine.element_bytes == 2:
        lanes = padded.view(tiles, 2, 8, fragments, 4, 2, 2).permute(0, 3, 2, 4, 5, 1, 6)
    else:
        lanes = padded.view(tiles, TILE_ROWS, fragments, 2, 4).permute(0, 2, 1, 3, 4)
    order = torch.tensor(_stream_order(plan), device=rows.device)
    return lanes.index_select(1, order).reshape(tiles, -1).view(torch.uint8)


def unpack_matrix(packed: torch.Tensor, plan: ChunkPlan, machine: Machine, rows: int) -> torch.Tensor:
    """The matrix [rows, plan.columns] in the machine's dtype that `pack_matrix` made `packed` from."""
    import torch

    order = torch.tensor(_stream_order(plan), device=packed.device)
    elements = packed.contiguous().view(getattr(torch, TORCH_NAME[machine.dtype])).view(packed.shape[0], len(order), -1)
    lanes = elements.index_select(1, order.argsort())
    tiles, fragments = lanes.shape[:2]
    if machine.element_bytes == 2:
        padded = lanes.view(tiles, fragments, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 3, 4, 6)
    else:
        padded = lanes.view(tiles, fragments, TILE_ROWS, 2, 4).permute(0, 2, 1, 3, 4)
    return padded.reshape(tiles * TILE_ROWS, -1)[:rows, : plan.columns]


@cache
def _stream_order(plan: ChunkPlan) -> list[int]:
    return plan.stream_order()


def pack_stream(program: Program, source: WeightSource, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    """All SMs' weight streams as uint8 on `device`, and the i64 offset (on the CPU) at which each SM's begins.

    An SM's stream holds the tiles of its matrix-vector tasks in stream order. Matrices are laid out one at a time: memory
    peaks at the stream and one matrix.
    """
    import torch

    starts, places, total = _places(program)
    stream = torch.empty(total, dtype=torch.uint8, device=device)
    for number, matrix in enumerate(program.matrices):
        pack = _packer(program, matrix, source, device)
        for at, task in places.get(number, []):
            packed = pack(task)
            stream[at : at + packed.numel()] = packed.view(-1)
    return stream, torch.tensor(starts, dtype=torch.int64)


def tile_places(program: Program) -> dict[tuple[int, int], int]:
    """The byte of the packed streams at which each tile (matrix, number) begins."""
    _, places, _ = _places(program)
    found: dict[tuple[int, int], int] = {}
    for matrix, tasks in places.items():
        for at, task in tasks:
            tile_bytes = task.plan(program.machine).tile_bytes
            found |= {(matrix, task.tile0 + tile): at + tile * tile_bytes for tile in range(task.tiles)}
    return found


def same_weights(one: Program, other: Program) -> bool:
    """Whether the two programs of one model read the same bytes: equal streams, constants and rows of the rotation's table."""
    return stream_of(one) == stream_of(other) and one.kv.rows == other.kv.rows


def _packer(program: Program, matrix: Matrix, source: WeightSource, device: str) -> Callable[[MatVec], torch.Tensor]:
    """What packs the tiles of a task of this matrix."""
    if matrix.weights:
        quantised = quantised_rows(matrix, source, device)
        return lambda task: pack_quantised(part_of(quantised, _rows_of(task)), task.plan(program.machine))
    rows = matrix_rows(matrix, source, device)
    return lambda task: pack_matrix(rows[_rows_of(task)], task.plan(program.machine), program.machine)


def _rows_of(task: MatVec) -> slice:
    return slice(TILE_ROWS * task.tile0, TILE_ROWS * (task.tile0 + task.tiles))


def _places(program: Program) -> tuple[list[int], dict[int, list[tuple[int, MatVec]]], int]:
    """Where each SM's stream begins, where each matrix's tasks lie (bytes), and the bytes of all."""
    at, starts = 0, []
    places: dict[int, list[tuple[int, MatVec]]] = {}
    for queue, entries in zip(program.queues, program.streams, strict=True):
        starts.append(at)
        for task in (queue[index] for index in entries):
            if isinstance(task, MatVec):
                places.setdefault(task.weight, []).append((at, task))
                at += task.tiles * task.plan(program.machine).tile_bytes
    return starts, places, at
