"""Pass 1: the model as a graph of ops, with norms, q/k/v and gate/up fused as the config says."""

from __future__ import annotations

from dataclasses import dataclass, field

from amk.isa.attention import PARTIAL_HEAD
from amk.isa.filter_head import TILE_PACKETS
from amk.isa.gemv_glu import HALF
from amk.isa.instruction import Kind
from amk.isa.machine import ELEMENT_BYTES, TILE_ROWS
from amk.isa.matmul import OUT_BY_SEAT, X_BY_SEAT
from amk.isa.matvec import X_NARROW, X_NORM
from amk.schedule.graph import AttentionOp, EmbedOp, Graph, MatVecOp, NormOp, Read, SampleOp, SwiGluOp, Value
from amk.schedule.graph_builder import GraphBuilder, Layout
from amk.schedule.model import ModelSpec
from amk.schedule.settings import Settings

TOKEN, CANDIDATES, SCORES = "token", "candidates", "scores"
CHOOSERS = {"greedy": ("gemv_head", "sample"), "draw": ("draw_head", "draw"), "filter": ("filter_head", "filter_draw")}
BATCHED = {"gemv": "gemm", "gemv_glu": "gemm_glu", "gemv_head": "gemm_head", "embed": "embed_batch", "sample": "sample_batch"}


@dataclass(frozen=True)
class Activation:
    """A vector as a product reads it: the value, how it comes (isa.matvec flags), and the gain of the norm folded into the reader."""

    value: str
    flags: int
    gain: str | None = None


@dataclass
class _Builder(GraphBuilder):
    fusion: tuple[str, ...] = field(kw_only=True)

    def stem(self, one: str) -> str:
        """The instruction that does for the batch what `one` does for one token."""
        return one if self.batch == 1 else BATCHED[one]

    def value(self, name: str, kind: Kind, elements: int, *, read: int | None = None, by_seat: bool = False) -> str:
        """A value of `elements` for each seat, of which the first `read` (all if None, or interleaved) are read."""
        per_packet = 4 // ELEMENT_BYTES[self.spec.dtype] if kind == "narrow" else 1
        packets = -(-elements // per_packet)
        padded = self.batch == 1 and read is not None and -(-read // per_packet) < packets
        self.values.append(Value(name, kind, packets * self.batch, padded, self.batch if by_seat else 1))
        return name

    @property
    def residual(self) -> Kind:
        """How the residual stream lies: of a batch in elements, as every SM reads it for every seat."""
        return "f32" if self.batch == 1 else "narrow"

    def normed(self, name: str, x: str) -> Activation:
        """x after the RMS norm `name`: folded into its readers, or by tasks of its own."""
        hidden = self.spec.hidden
        gain = self.constant(name, (name,), hidden)
        if "norm" in self.fusion:
            return Activation(x, X_NORM if self.residual == "f32" else X_NORM | X_NARROW, gain)
        out = self.value(name, "narrow", hidden)
        self.ops.append(NormOp(name=name, stem="rmsnorm", reads=(Read(x, "whole"),), writes=(out,), cols=hidden, gain=gain))
        return Activation(out, X_NARROW)

    def matvec(
        self,
        name: str,
        x: Activation,
        out: str,
        sources: tuple[str, ...],
        rows: int,
        cols: int,
        *,
        stem: str = "gemv",
        layout: Layout = "stack",
        bias: bool = False,
        residual: str | None = None,
        order: int = 0,
    ) -> str:
        """The product of the stacked (or interleaved) `sources` with x, published as the value `out`, which must exist.

        `order`: OUT_BY_SEAT or 0.
        """
        matrix = self.matrix(name, sources, rows, cols, layout)
        named, weights = self.bias(matrix, bias), matrix.weights
        reads = (Read(x.value, "whole"), *([Read(residual, "own")] if residual else []))
        flags = x.flags | (weights.flags if weights else 0) | (order if self.batch > 1 else 0)
        self.ops.append(
            MatVecOp(
                name=name,
                stem=self.stem(stem),
                reads=reads,
                writes=(out,),
                rows=rows,
                cols=cols,
                flags=flags,
                gain=x.gain,
                bias=named,
                batch=self.batch,
            )
        )
        return out


def fuse(spec: ModelSpec, settings: Settings) -> Graph:
    """The ops of one token in order, from the embedding of its input to the sample of its output. Those of a stretch: fuse_stretch.py."""
    b = _Builder(spec, settings.batch, fusion=settings.config.fusion)
    b.value(TOKEN, "u32", 1)
    x = b.value("embed", b.residual, spec.hidden)
    reads = (Read(TOKEN, "whole", carried=True),)
    b.ops.append(EmbedOp(name="embed", stem=b.stem("embed"), reads=reads, writes=(x,), cols=spec.hidden, batch=b.batch))
    for layer in range(spec.layers):
        attended = _attended(b, layer, x, settings.splits[layer])
        x = _output_half(b, layer, x, attended)
        x = _mlp_half(b, layer, x)
    normed = b.normed("final_norm", x)
    head, sample = CHOOSERS[settings.chooser]
    if settings.chooser == "filter":
        scores = b.value(SCORES, "u32", TILE_PACKETS * -(-spec.vocab // TILE_ROWS))
    else:
        scores = b.value(CANDIDATES, "u32", 0)  # its size is the number of head tasks, which placement decides
    b.matvec("head", normed, scores, ("head",), spec.vocab, spec.hidden, stem=head)
    b.ops.append(SampleOp(name="sample", stem=b.stem(sample), reads=(Read(scores, "whole"),), writes=(TOKEN,), batch=b.batch))
    return b.graph()


def _attended(b: _Builder, layer: int, x: str, splits: int) -> str:
    spec, at = b.spec, f"L{layer}"
    normed = b.normed(f"{at}.input_norm", x)
    if "qkv" in b.fusion:
        rows = spec.q_rows + 2 * spec.kv_rows
        out = b.value(f"{at}.qkv", "f32", rows, by_seat=True)
        b.matvec(out, normed, out, (f"{at}.q", f"{at}.k", f"{at}.v"), rows, spec.hidden, bias=spec.qkv_bias, order=OUT_BY_SEAT)
        return _attention(b, layer, (out, out, out), (spec.q_rows, spec.q_rows + spec.kv_rows), splits)
    q, k, v = (
        b.matvec(name, normed, b.value(name, "f32", rows, by_seat=True), (name,), rows, spec.hidden, bias=spec.qkv_bias, order=OUT_BY_SEAT)
        for name, rows in ((f"{at}.q", spec.q_rows), (f"{at}.k", spec.kv_rows), (f"{at}.v", spec.kv_rows))
    )
    return _attention(b, layer, (q, k, v), (0, 0), splits)


def _output_half(b: _Builder, layer: int, x: str, attended: str) -> str:
    spec, at = b.spec, f"L{layer}"
    out = b.value(f"{at}.o", b.residual, spec.hidden)
    attended_flags = X_NARROW if b.batch == 1 else X_NARROW | X_BY_SEAT
    return b.matvec(out, Activation(attended, attended_flags), out, (out,), spec.hidden, spec.q_rows, bias=spec.o_bias, residual=x)


def _attention(b: _Builder, layer: int, qkv: tuple[str, str, str], offsets: tuple[int, int], splits: int) -> str:
    spec, name = b.spec, f"L{layer}.attention"
    q_gain, k_gain = b.head_gains(layer)
    partials = f"L{layer}.partials"
    if splits > 1:
        b.value(partials, "f32", spec.heads * (splits - 1) * (spec.head_dim + PARTIAL_HEAD), by_seat=True)
    out = b.value(name, "narrow", spec.q_rows, by_seat=True)
    reads = tuple(Read(value, "part") for value in (*qkv, *([partials] if splits > 1 else [])))
    b.ops.append(
        AttentionOp(
            name=name,
            stem="attention",
            reads=reads,
            writes=(partials, out) if splits > 1 else (out,),
            layer=layer,
            kv_heads=spec.kv_heads,
            group=spec.group,
            head_dim=spec.head_dim,
            splits=splits,
            window=spec.windows[layer] or 0,
            k_offset=offsets[0],
            v_offset=offsets[1],
            q_gain=q_gain,
            k_gain=k_gain,
            seats=b.batch,
            layers=spec.layers,
        )
    )
    return out


def _mlp_half(b: _Builder, layer: int, x: str) -> str:
    spec, at = b.spec, f"L{layer}"
    normed = b.normed(f"{at}.post_norm", x)
    act = _gated(b, at, normed) if "gate_up" in b.fusion else _gate_then_up(b, at, normed)
    out = b.value(f"{at}.down", b.residual, spec.hidden)
    return b.matvec(out, Activation(act, X_NARROW), out, (out,), spec.hidden, spec.intermediate, bias=spec.mlp_bias, residual=x)


def _gated(b: _Builder, at: str, normed: Activation) -> str:
    spec, name = b.spec, f"{at}.gate_up"
    padded = spec.intermediate + -spec.intermediate % HALF
    out = b.value(name, "narrow", padded, read=spec.intermediate)
    sources = (f"{at}.gate", f"{at}.up")
    return b.matvec(name, normed, out, sources, 2 * padded, spec.hidden, stem="gemv_glu", layout="interleave8", bias=spec.mlp_bias)


def _gate_then_up(b: _Builder, at: str, normed: Activation) -> str:
    spec, rows = b.spec, b.spec.intermediate
    gate, up = (
        b.matvec(name, normed, b.value(name, "f32", rows), (name,), rows, spec.hidden, bias=spec.mlp_bias)
        for name in (f"{at}.gate", f"{at}.up")
    )
    out = b.value(f"{at}.swiglu", "narrow", rows)
    reads = (Read(gate, "part"), Read(up, "part"))
    b.ops.append(SwiGluOp(name=out, stem="swiglu", reads=reads, writes=(out,), cols=rows))
    return out
