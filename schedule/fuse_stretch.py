"""Pass 1 of a stretch: the model's layers up to their last KV rows, as ops that each wait for all of another."""

from __future__ import annotations

from dataclasses import dataclass, field

from amk.isa.gemv_glu import HALF
from amk.isa.instruction import Kind
from amk.isa.machine import ELEMENT_BYTES, Machine, chunk_plan
from amk.isa.seat_norm import SeatNorm
from amk.isa.seat_qkv import SeatQkv
from amk.isa.stretch import BY_COLUMN, BY_HEAD, BY_SEAT, GROUP_ROWS, padded, runs
from amk.isa.stretch_attention import StretchAttention
from amk.isa.stretch_glu import StretchGlu
from amk.isa.stretch_sums import StretchSums
from amk.schedule.graph import Graph, Read, SeatNormOp, SeatQkvOp, StretchAttentionOp, StretchMatMulOp, Value
from amk.schedule.graph_builder import GraphBuilder
from amk.schedule.model import ModelSpec
from amk.schedule.program import Matrix
from amk.schedule.settings import Settings
from amk.schedule.shares import share_count


@dataclass(frozen=True)
class Sums:
    """What a product publishes for the seats' tasks behind it: `shares` sums of each row, and the bias that the first reader adds."""

    value: str
    shares: int
    bias: str | None


@dataclass
class _Builder(GraphBuilder):
    """`decoder` is the machine of the program beside: it says how the weights lie, and so how K may be shared out."""

    decoder: Machine = field(kw_only=True)

    def value(self, name: str, kind: Kind, elements: int) -> str:
        """A value of `elements` for each seat."""
        per_packet = 4 // ELEMENT_BYTES[self.spec.dtype] if kind == "narrow" else 1
        self.values.append(Value(name, kind, elements * self.batch // per_packet))
        return name

    def normed(self, name: str, residual: str | None = None, sums: Sums | None = None) -> tuple[str, str]:
        """h, the residual and the sums or the embedding, and x, its norm with the gain `name`."""
        h, x = self.value(f"{name}.h", "f32", self.spec.hidden), self.value(name, "narrow", padded(self.spec.hidden))
        self.ops.append(
            SeatNormOp(
                name=name,
                stem=SeatNorm.stem,
                reads=(Read(residual, "own"), Read(sums.value, "whole")) if residual and sums else (),
                writes=(h, x),
                batch=self.batch,
                shares=sums.shares if sums else 0,
                gain=self.constant(name, (name,), self.spec.hidden),
                bias=sums.bias if sums else None,
            )
        )
        return h, x

    def sums(self, matrix: Matrix, x: str, x_order: int, *, bias: bool = False) -> Sums:
        """The product of a matrix with x for seats' tasks."""
        groups, count = -(-matrix.rows // GROUP_ROWS), len(runs(chunk_plan(self.decoder, matrix.cols)))
        shares = share_count(groups, count, self.decoder.sms)
        out = self.value(matrix.name, "f32", shares * groups * GROUP_ROWS)
        self._product(StretchSums.stem, matrix, x, x_order, shares, None)
        return Sums(out, shares, self.bias(matrix, bias))

    def activated(self, matrix: Matrix, x: str, *, bias: bool) -> str:
        """silu(gate) * up of a matrix of both, as x of the next product."""
        out = self.value(matrix.name, "narrow", padded(matrix.rows // 2))
        self._product(StretchGlu.stem, matrix, x, BY_SEAT, 1, self.bias(matrix, bias))
        return out

    def _product(self, stem: str, matrix: Matrix, x: str, x_order: int, shares: int, bias: str | None) -> None:
        self.ops.append(
            StretchMatMulOp(
                name=matrix.name,
                stem=stem,
                reads=(Read(x, "whole"),),
                writes=(matrix.name,),
                batch=self.batch,
                rows=matrix.rows,
                cols=matrix.cols,
                runs=len(runs(chunk_plan(self.decoder, matrix.cols))),
                shares=shares,
                x_order=x_order,
                bias=bias,
            )
        )


def fuse_stretch(spec: ModelSpec, settings: Settings, decoder: Machine) -> Graph:
    """The ops of a stretch in order; of the last layer only those that make KV rows. `decoder`: see `_Builder`."""
    b = _Builder(spec, settings.batch, decoder=decoder)
    h, x = b.normed("L0.input_norm")
    for layer in range(spec.layers - 1):
        h, x = _output_half(b, layer, h, _attention(b, layer, _qkv(b, layer, x)))
        h, x = _mlp_half(b, layer, h, x)
    _heads(b, spec.layers - 1, _qkv(b, spec.layers - 1, x), last=True)
    return b.graph()


def _qkv(b: _Builder, layer: int, x: str) -> Sums:
    spec, at = b.spec, f"L{layer}"
    matrix = b.matrix(f"{at}.qkv", (f"{at}.q", f"{at}.k", f"{at}.v"), spec.q_rows + 2 * spec.kv_rows, spec.hidden)
    return b.sums(matrix, x, BY_SEAT, bias=spec.qkv_bias)


def _heads(b: _Builder, layer: int, qkv: Sums, *, last: bool = False) -> tuple[str, ...]:
    """q, and k with v, for the attention, and the layer's KV rows: the rows alone where the layer is the `last`."""
    spec, at = b.spec, f"L{layer}"
    q_gain, k_gain = b.head_gains(layer)
    written = (
        ()
        if last
        else (b.value(f"{at}.q", "narrow", spec.q_rows), b.value(f"{at}.kv", "narrow", 2 * spec.kv_heads * padded(spec.head_dim)))
    )
    b.ops.append(
        SeatQkvOp(
            name=f"{at}.heads",
            stem=SeatQkv.stem,
            reads=(Read(qkv.value, "whole"),),
            writes=written,
            batch=b.batch,
            layer=layer,
            shares=qkv.shares,
            bias=qkv.bias,
            q_gain=q_gain,
            k_gain=k_gain,
        )
    )
    return written


def _attention(b: _Builder, layer: int, qkv: Sums) -> str:
    spec = b.spec
    q, kv = _heads(b, layer, qkv)
    out = b.value(f"L{layer}.attention", "narrow", spec.q_rows)
    b.ops.append(
        StretchAttentionOp(
            name=out,
            stem=StretchAttention.stem,
            reads=(Read(q, "whole"), Read(kv, "whole")),
            writes=(out,),
            batch=b.batch,
            layer=layer,
            kv_heads=spec.kv_heads,
            window=spec.windows[layer] or 0,
        )
    )
    return out


def _output_half(b: _Builder, layer: int, h: str, attended: str) -> tuple[str, str]:
    spec, at = b.spec, f"L{layer}"
    sums = b.sums(b.matrix(f"{at}.o", (f"{at}.o",), spec.hidden, spec.q_rows), attended, BY_HEAD, bias=spec.o_bias)
    return b.normed(f"{at}.post_norm", h, sums)


def _mlp_half(b: _Builder, layer: int, h: str, x: str) -> tuple[str, str]:
    spec, at = b.spec, f"L{layer}"
    rows = 2 * (spec.intermediate + -spec.intermediate % HALF)
    gate_up = b.matrix(f"{at}.gate_up", (f"{at}.gate", f"{at}.up"), rows, spec.hidden, "interleave8")
    act = b.activated(gate_up, x, bias=spec.mlp_bias)
    down = b.matrix(f"{at}.down", (f"{at}.down",), spec.hidden, spec.intermediate)
    return b.normed(f"L{layer + 1}.input_norm", h, b.sums(down, act, BY_COLUMN, bias=spec.mlp_bias))
