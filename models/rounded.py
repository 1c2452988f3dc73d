"""The source model with its activations rounded where programs round them: what rounding alone may do to its logits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from amk.isa.attention import LOG2E
from amk.models.eager import torch_dtype
from amk.schedule.model import DType

if TYPE_CHECKING:
    import torch

_ATTENTION = "amk_rounded"


@dataclass(frozen=True)
class RoundingPoints:
    """Where a program rounds activations to `dtype`: K and V rows, the attention's output and the input of the down projection always.

    `norms`: also what norms publish, where they are tasks of their own. `gained`: also the residual stream times a norm's gain, before the
    norm's scale, where products of a batch norm their x themselves. `residuals`: also the residual stream, after each sum.
    `attention_operands`: also scaled queries and attention weights.
    """

    dtype: DType
    norms: bool
    gained: bool
    residuals: bool
    attention_operands: bool


@contextmanager
def rounded(eager: Any, points: RoundingPoints) -> Iterator[None]:
    """While open, `eager` (the source model in fp32) rounds its activations at `points`."""
    _register(points)
    before = eager.config._attn_implementation
    handles = [hook for name, module in eager.named_modules() for hook in _hooks(name, module, points)]
    eager.config._attn_implementation = _ATTENTION
    try:
        yield
    finally:
        eager.config._attn_implementation = before
        for handle in handles:
            handle.remove()


def _hooks(name: str, module: Any, points: RoundingPoints) -> Iterator[Any]:
    leaf = name.rpartition(".")[2]
    kind = torch_dtype(points.dtype)
    if leaf == "down_proj":
        yield module.register_forward_pre_hook(lambda _, inputs: (_round(inputs[0], kind),))
    if leaf in ("input_layernorm", "post_attention_layernorm") or name == "model.norm":
        if points.residuals:  # in place: a layer adds to what its norms have read
            yield module.register_forward_pre_hook(lambda _, inputs: _round_in_place(inputs[0], kind))
        if points.norms:
            yield module.register_forward_hook(lambda _, inputs, output: _round(output, kind))
        if points.gained:
            yield module.register_forward_hook(lambda norm, inputs, _: _round(inputs[0] * norm.weight, kind) * _scale(norm, inputs[0]))


def _round(values: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return values.to(kind).float()


def _scale(norm: Any, values: torch.Tensor) -> torch.Tensor:
    scale: torch.Tensor = (values.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    return scale


def _round_in_place(values: torch.Tensor, kind: torch.dtype) -> None:
    values.copy_(_round(values, kind))


def _register(points: RoundingPoints) -> None:
    """Tells transformers of an attention that rounds at `points`; masks are those of its eager attention."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    kind = torch_dtype(points.dtype)
    operand = torch_dtype(points.dtype if points.attention_operands else "fp32")

    def attention(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[torch.Tensor, None]:
        group = query.shape[1] // key.shape[1]
        keys, values = (_round(rows, kind).repeat_interleave(group, 1) for rows in (key, value))
        scores = _round(query * (LOG2E * scaling), operand) @ keys.transpose(2, 3)
        scores = scores if mask is None else scores + mask[:, :, :, : keys.shape[2]]
        weights = _round((scores - scores.amax(-1, keepdim=True)).exp2(), operand)
        out = weights @ values / weights.sum(-1, keepdim=True)
        return _round(out, kind).transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, eager_mask)
