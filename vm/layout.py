"""Weights laid out as a program's matrices and constants name them, on any device, with torch operations only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amk.schedule.model import QuantisedMatrix, WeightSource
from amk.schedule.program import Constant, Matrix, Program

if TYPE_CHECKING:
    import torch

HALF_TILE = 8  # rows of one source in a tile of the interleaved layout


def matrix_rows(matrix: Matrix, source: WeightSource, device: str = "cpu") -> torch.Tensor:
    """The matrix [rows, cols] in the dtype that the source gives, its rows in tile order; ValueError if the weights have another shape."""
    rows = _laid_out(matrix.layout, [source.tensor(name, device) for name in matrix.sources])
    _check_shape(matrix, rows)
    return rows


def quantised_rows(matrix: Matrix, source: WeightSource, device: str = "cpu") -> QuantisedMatrix:
    """The same of a quantised matrix; rows that pad have scales of zero. ValueError if the weights have another shape or format."""
    parts = [source.quantised(name, device) for name in matrix.sources]
    if matrix.weights is None or any(part.weights != matrix.weights for part in parts):
        found = ", ".join(part.weights.name for part in parts)
        raise ValueError(f"matrix {matrix.name}: its weights must have the format {matrix.weights}, but have {found}")
    codes, scales, zeros = (_laid_out(matrix.layout, [getattr(part, field) for part in parts]) for field in ("codes", "scales", "zeros"))
    _check_shape(matrix, codes)
    return QuantisedMatrix(matrix.weights, codes, scales, zeros)


def _check_shape(matrix: Matrix, rows: torch.Tensor) -> None:
    if tuple(rows.shape) != (matrix.rows, matrix.cols):
        found = "x".join(map(str, rows.shape))
        raise ValueError(f"matrix {matrix.name}: its weights must give {matrix.rows}x{matrix.cols} elements, but they give {found}")


def embedding(program: Program, source: WeightSource, device: str = "cpu") -> torch.Tensor:
    """The embedding [vocab, hidden] in the dtype that the source gives; ValueError if it has another shape, which nothing asks later."""
    machine = program.machine
    rows: torch.Tensor = source.tensor("embed", device)
    if tuple(rows.shape) != (machine.vocab, machine.hidden):
        found = "x".join(map(str, rows.shape))
        raise ValueError(f"embed: the embedding must have {machine.vocab}x{machine.hidden} elements, but has {found}")
    return rows


def constants(program: Program, source: WeightSource, device: str = "cpu") -> torch.Tensor:
    """fp32 vector of all constants; ValueError if a constant's weights have another length than the program says."""
    import torch

    values = torch.zeros(program.constant_elements, dtype=torch.float32, device=device)
    for constant in program.constants:
        values[constant.start : constant.start + constant.count] = _vector(constant, source, device)
    return values


def _vector(constant: Constant, source: WeightSource, device: str) -> torch.Tensor:
    vector = _laid_out(constant.layout, [source.tensor(name, device) for name in constant.sources])
    if len(vector) != constant.count:
        raise ValueError(f"constant {constant.name}: its weights must give {constant.count} elements, but they give {len(vector)}")
    return vector


def _laid_out(layout: str, parts: list[torch.Tensor]) -> torch.Tensor:
    import torch

    if layout == "stack":
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    halves = [_padded(part).reshape(-1, HALF_TILE, *part.shape[1:]) for part in parts]
    return torch.stack(halves, dim=1).flatten(0, 2)


def _padded(part: torch.Tensor) -> torch.Tensor:
    """`part` with zero rows up to a multiple of 8."""
    missing = -part.shape[0] % HALF_TILE
    return part if missing == 0 else _with_rows(part, missing)


def _with_rows(part: torch.Tensor, missing: int) -> torch.Tensor:
    import torch

    return torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
