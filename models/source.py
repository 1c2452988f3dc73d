"""Runs the source model over one growing sequence and keeps its KV cache whole, sliding windows too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PREFILL_CHUNK = 512  # tokens a forward pass: bounds the memory of its attention scores


class SourceRun:
    """The source model (a transformers causal model in eval mode) after the tokens fed so far."""

    def __init__(self, eager: Any) -> None:
        from transformers import DynamicCache

        self._eager = eager
        # A cache made without the config keeps every row; one made with it would drop rows outside a sliding window.
        self._cache = DynamicCache()
        self.tokens: list[int] = []

    def feed(self, tokens: Sequence[int], keep: Sequence[int] = ()) -> torch.Tensor:
        """Appends `tokens`; returns the logits after those at indices `keep` (ascending) as fp32 [len(keep), vocab] on the CPU."""
        import torch

        device = next(self._eager.parameters()).device
        parts = [torch.empty(0, self._eager.config.vocab_size)]
        with torch.inference_mode():
            for start in range(0, len(tokens), PREFILL_CHUNK):
                chunk = tokens[start : start + PREFILL_CHUNK]
                rows = [i - start for i in keep if start <= i < start + len(chunk)]
                # Keeping no row would mean keeping all of them, so one is always computed.
                kept = torch.tensor(rows or [len(chunk) - 1], device=device)
                ids = torch.tensor([list(chunk)], device=device)
                out = self._eager(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=kept)
                parts.append(out.logits[0, : len(rows)].float().cpu())
        self.tokens.extend(tokens)
        return torch.cat(parts)

    def kv(self, layer: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """K (after norm and RoPE) and V of the first `rows` positions of a layer, each [kv_heads, rows, head_dim]."""
        cached = self._cache.layers[layer]
        return cached.keys[0, :, :rows], cached.values[0, :, :rows]

    def close(self) -> None:
        """Lets go of the model, whose memory is then free; the rows of `kv` stay."""
        self._eager = None

    def fork(self, rows: int) -> SourceRun:
        """A run of its own that has seen the first `rows` tokens of this one."""
        run = SourceRun(self._eager)
        for layer in range(len(self._cache.layers)):
            keys, values = self.kv(layer, rows)
            run._cache.update(keys[None], values[None], layer)
        run.tokens = self.tokens[:rows]
        return run
