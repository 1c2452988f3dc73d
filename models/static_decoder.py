"""The source model at its quickest in transformers: a static KV cache, and steps that follow each other without the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from amk.schedule.model import ModelSpec

if TYPE_CHECKING:
    import torch

Attention: TypeAlias = Literal["sdpa", "eager"]


class StaticDecoder:
    """A transformers causal model that decodes one token a step, batch 1, greedily.

    `eager` is the model, whose attention is set to `attention`: another decoder of it may be made once this one is captured.
    `rows` is the length of the cache and of every attention over it, so it should hardly exceed the positions that are decoded. All state
    is in tensors of fixed address: a step reads `token` [1, 1] and `position` [1] and leaves its choice and the next position there. So
    steps may be captured in a CUDA graph, and may follow each other without the host.
    """

    def __init__(self, spec: ModelSpec, eager: Any, rows: int, attention: Attention) -> None:
        import torch
        from transformers.cache_utils import Cache, StaticLayer

        weight = next(eager.parameters())
        eager.set_attn_implementation(attention)
        self.spec, self.rows, self._model = spec, rows, eager
        self._cache = Cache(layers=[StaticLayer(max_cache_len=rows) for _ in range(spec.layers)])
        self._cache.early_initialization(1, spec.kv_heads, spec.head_dim, weight.dtype, weight.device)
        self.token = torch.zeros((1, 1), dtype=torch.int64, device=weight.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=weight.device)
        self._columns = torch.arange(rows, device=weight.device)
        self._open = torch.zeros(rows, dtype=weight.dtype, device=weight.device)
        self._closed = torch.full_like(self._open, torch.finfo(weight.dtype).min)

    def seed(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Sets KV rows 0..n-1 of a layer: tensors [kv_heads, n, head_dim], K after norm and RoPE."""
        cached = self._cache.layers[layer]
        cached.keys[0, :, : keys.shape[1]] = keys
        cached.values[0, :, : values.shape[1]] = values

    def begin(self, position: int, token: int | None = None) -> None:
        """The next step runs at `position`, with `token` where one is given, else with the last step's choice."""
        self.position.fill_(position)
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(position)
        if token is not None:
            self.token.fill_(token)

    def step(self) -> torch.Tensor:
        """One token: its logits [vocab] in the model's dtype."""
        import torch

        with torch.no_grad():
            out = self._model(
                input_ids=self.token,
                position_ids=self.position[None],
                attention_mask=self._masks(),
                past_key_values=self._cache,
                use_cache=True,
            )
            logits: torch.Tensor = out.logits[0, -1]
            self.token.copy_(logits.argmax()[None, None])
            self.position += 1
        return logits

    def _masks(self) -> Any:
        """The mask of every layer, by kind of layer where windows differ; made once a step, it is cheaper than transformers' own."""
        first, *others = dict.fromkeys(self.spec.windows)
        if not others:
            return self._mask(first)
        named = {"full_attention" if window is None else "sliding_attention": window for window in (first, *others)}
        return {name: self._mask(window) for name, window in named.items()}

    def _mask(self, window: int | None) -> torch.Tensor:
        """What is added to the scores of each row [1, 1, 1, rows]."""
        import torch

        seen = self._columns <= self.position
        if window is not None:
            seen &= self._columns > self.position - window
        return torch.where(seen, self._open, self._closed)[None, None, None]
