"""Weights as matrices and constants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from amk.schedule.program import Matrix
from amk.vm.layout import constants, embedding, matrix_rows


class Named:
    """A weight source of a few given tensors."""

    def __init__(self, **weights: torch.Tensor) -> None:
        self.weights = weights

    def tensor(self, name: str, device: str = "cpu") -> torch.Tensor:
        return self.weights[name].to(device)

    def rope_table(self, rows: int, device: str = "cpu") -> torch.Tensor:
        raise AssertionError("a layout needs no RoPE table")


def test_stacked_rows_follow_each_other() -> None:
    source = Named(a=torch.arange(6.0).view(3, 2), b=torch.arange(6.0, 10).view(2, 2))
    rows = matrix_rows(Matrix("ab", ("a", "b"), "stack", 5, 2), source)
    assert rows.flatten().tolist() == list(range(10))


def test_interleaved_tiles_hold_8_rows_of_each_source_and_zeros_where_rows_end() -> None:
    source = Named(gate=torch.arange(1.0, 11)[:, None], up=torch.arange(101.0, 111)[:, None])
    rows = matrix_rows(Matrix("gu", ("gate", "up"), "interleave8", 32, 1), source).flatten().tolist()
    assert rows[:16] == [*range(1, 9), *range(101, 109)]
    assert rows[16:] == [9, 10, *[0] * 6, 109, 110, *[0] * 6]


def test_rows_keep_the_checkpoints_dtype() -> None:
    source = Named(a=torch.ones(2, 2, dtype=torch.bfloat16))
    assert matrix_rows(Matrix("a", ("a",), "stack", 2, 2), source).dtype == torch.bfloat16


def test_a_weight_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="matrix a: its weights must give 3x2 elements, but they give 2x2"):
        matrix_rows(Matrix("a", ("a",), "stack", 3, 2), Named(a=torch.ones(2, 2)))


@pytest.mark.parametrize("sizes", [{"vocab": 1}, {"hidden": 16}, {"hidden": -16}])
def test_an_embedding_of_another_shape_is_refused(sizes: dict[str, int], make_spec: Any, make_program: Any, make_source: Any) -> None:
    spec = make_spec()
    program, source = make_program(spec), make_source(spec)
    assert embedding(program, source).shape == (spec.vocab, spec.hidden)
    other = replace(program.machine, **{name: getattr(program.machine, name) + more for name, more in sizes.items()})
    with pytest.raises(ValueError, match="embed: the embedding must have"):
        embedding(replace(program, machine=other), source)


def test_constants_lie_where_the_program_says(make_spec: Any, make_program: Any, make_source: Any) -> None:
    spec = make_spec("bf16", qkv_bias=True, mlp_bias=True, intermediate=92)
    program, source = make_program(spec), make_source(spec)
    values = constants(program, source)
    assert values.dtype == torch.float32
    for constant in program.constants:
        part = values[constant.start : constant.start + constant.count]
        if constant.layout == "stack":
            assert torch.equal(part, torch.cat([source.tensor(name) for name in constant.sources]).float())
        else:
            gate, up = (source.tensor(name).float() for name in constant.sources)
            assert torch.equal(part[:8], gate[:8]) and torch.equal(part[8:16], up[:8])
            assert part.sum() == pytest.approx(float(gate.sum() + up.sum()), abs=1e-3)
    short = replace(program.constants[0], count=program.constants[0].count - 1)
    with pytest.raises(ValueError, match=f"constant {short.name}: its weights must give"):
        constants(replace(program, constants=(short,)), source)
