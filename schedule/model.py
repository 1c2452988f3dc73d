"""The model description: every number of a decoder model that the compiler needs, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from amk.isa.machine import ELEMENT_BYTES
from amk.isa.weight_format import WeightFormat

DType: TypeAlias = Literal["bf16", "fp16", "fp32"]
QUANTISABLE = ("q", "k", "v", "o", "gate", "up", "down")  # the matrices of a layer


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of the Llama family; sizes in elements.

    `windows[l]` is layer l's sliding window in tokens (a query attends to itself and the `window - 1` rows before it), or
    None for full attention. `qkv_bias`, `o_bias` and `mlp_bias` say which projections have a bias, `qk_norm` that q and k
    heads are RMS-normalised (gain of head_dim elements) before RoPE. RoPE rotates element d of a head with element
    d + head_dim / 2; its table comes from the weight source, so scaling rules never reach the device. `layer_weights` is the format of
    the layers' matrices and `head_weights` that of the output head, None for `dtype`; embedding, gains and biases are always of `dtype`.
    """

    name: str
    family: str
    dtype: DType
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rms_eps: float
    max_context: int
    tied_head: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()
    bos_token: int | None = None
    stop_tokens: tuple[int, ...] = ()
    layer_weights: WeightFormat | None = None
    head_weights: WeightFormat | None = None

    def __post_init__(self) -> None:
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.layers)

    @property
    def quantised(self) -> bool:
        """Some of its matrices are quantised."""
        return self.layer_weights is not None or self.head_weights is not None

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_heads

    @property
    def q_rows(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        return self.kv_heads * self.head_dim


def weight_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight tensor of the model, in the order in which one token uses them.

    Matrices are [rows, columns] as in `torch.nn.Linear`. `head` is listed for tied models too (the source must hand
    out the embedding there). Buffers that are computed, not loaded (the RoPE table), are not listed.
    """
    shapes: dict[str, tuple[int, ...]] = {"embed": (spec.vocab, spec.hidden)}
    for layer in range(spec.layers):
        shapes |= {f"L{layer}.{name}": shape for name, shape in _layer_shapes(spec).items()}
    return shapes | {"final_norm": (spec.hidden,), "head": (spec.vocab, spec.hidden)}


def _layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_norm": (spec.hidden,),
        "q": (spec.q_rows, spec.hidden),
        "k": (spec.kv_rows, spec.hidden),
        "v": (spec.kv_rows, spec.hidden),
    }
    if spec.qkv_bias:
        shapes |= {"q.bias": (spec.q_rows,), "k.bias": (spec.kv_rows,), "v.bias": (spec.kv_rows,)}
    if spec.qk_norm:
        shapes |= {"q_norm": (spec.head_dim,), "k_norm": (spec.head_dim,)}
    shapes["o"] = (spec.hidden, spec.q_rows)
    if spec.o_bias:
        shapes["o.bias"] = (spec.hidden,)
    shapes |= {
        "post_norm": (spec.hidden,),
        "gate": (spec.intermediate, spec.hidden),
        "up": (spec.intermediate, spec.hidden),
        "down": (spec.hidden, spec.intermediate),
    }
    if spec.mlp_bias:
        shapes |= {"gate.bias": (spec.intermediate,), "up.bias": (spec.intermediate,), "down.bias": (spec.hidden,)}
    return shapes


def weight_format(spec: ModelSpec, name: str) -> WeightFormat | None:
    """The format of a weight named by `weight_shapes`; None for elements of the model's dtype."""
    if name == "head":
        return spec.head_weights
    return spec.layer_weights if name.rpartition(".")[2] in QUANTISABLE else None


def matrices_bytes(spec: ModelSpec) -> int:
    """Bytes of all matrices, the embedding included."""
    return _bytes_of(spec, weight_shapes(spec))


def layer_bytes(spec: ModelSpec) -> int:
    """Bytes of a layer's matrices."""
    return _bytes_of(spec, {f"L0.{name}": shape for name, shape in _layer_shapes(spec).items()})


def _bytes_of(spec: ModelSpec, shapes: dict[str, tuple[int, ...]]) -> int:
    total = 0
    for name, shape in shapes.items():
        if len(shape) == 2:
            weights = weight_format(spec, name)
            total += weights.matrix_bytes(*shape) if weights else ELEMENT_BYTES[spec.dtype] * shape[0] * shape[1]
    return total


@dataclass(frozen=True, eq=False)
class QuantisedMatrix:
    """A matrix [rows, columns] as torch tensors: weight (r, c) is (codes[r, c] - zeros[r, c / group]) * scales[r, c / group], exactly.

    `codes` are uint8 [rows, columns], one code a byte; `scales` [rows, groups] of the format's dtype; `zeros` uint8 [rows, groups].
    """

    weights: WeightFormat
    codes: Any
    scales: Any
    zeros: Any


class WeightSource(Protocol):
    """Hands out the weight tensors named by `weight_shapes`, and the RoPE table, where they are used."""

    def tensor(self, name: str, device: str = "cpu"):  # type: ignore[no-untyped-def]  # a torch.Tensor; torch is not imported here
        """The named weight on `device` in the checkpoint's own dtype, a quantised one as fp32, exactly; KeyError if there is none."""
        ...

    def quantised(self, name: str, device: str = "cpu") -> QuantisedMatrix:
        """The named weight as codes, scales and zeros, where `weight_format` says that it has a format."""
        ...

    def rope_table(self, rows: int, device: str = "cpu"):  # type: ignore[no-untyped-def]
        """fp32 tensor [rows, head_dim / 2, 2] of (cos, sin) for positions 0..rows-1, attention scaling included."""
        ...
