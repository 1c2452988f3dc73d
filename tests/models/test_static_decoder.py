"""The static decoder is the source model: same logits at every position, with each attention, sliding windows too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from amk.models.model import Model, random_model
from amk.models.registry import resolve
from amk.models.source import SourceRun
from amk.models.static_decoder import StaticDecoder

TOKENS = torch.randint(0, 250, (40,), generator=torch.Generator().manual_seed(0)).tolist()
START = 30
WINDOWED: dict[str, Any] = {
    "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 257, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "sliding_window": 12, "dtype": "float32",
}  # fmt: skip
MIXED = WINDOWED | {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention"],
}  # fmt: skip
del MIXED["head_dim"]


def models() -> dict[str, Model]:
    return {"full": resolve("toy"), "window": random_model("window", WINDOWED), "mixed windows": random_model("mixed", MIXED)}


def decoder(model: Model, attention: Any) -> tuple[StaticDecoder, torch.Tensor]:
    """A decoder whose cache holds the rows before START, and the source model's logits from there on."""
    eager = model.eager("fp32", "cpu")
    run = SourceRun(eager)
    logits = run.feed(TOKENS, range(START, len(TOKENS)))
    made = StaticDecoder(model.spec, eager, 64, attention)
    for layer in range(model.spec.layers):
        made.seed(layer, *run.kv(layer, START))
    return made, logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["full", "window", "mixed windows"])
def test_logits_are_the_source_models(name: str, attention: str) -> None:
    made, expected = decoder(models()[name], attention)
    for i, logits in enumerate(expected):
        made.begin(START + i, TOKENS[START + i])
        assert torch.allclose(made.step(), logits, atol=1e-4, rtol=1e-4), START + i


def test_windows_of_the_test_models_differ() -> None:
    full, window = (set(models()[name].spec.windows) for name in ("full", "mixed windows"))
    assert (full, window) == ({None}, {None, 12})


def test_steps_follow_each_other_on_their_own_choices() -> None:
    made, _ = decoder(models()["full"], "sdpa")
    made.begin(START, 7)
    alone, chosen = [], [7]
    for _ in range(6):
        alone.append(made.step())
        chosen.append(int(made.token))
    assert int(made.position) == START + 6
    for i, token in enumerate(chosen[:-1]):
        made.begin(START + i, token)
        assert torch.equal(made.step(), alone[i])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_step_is_one_graph_without_breaks(attention: str) -> None:
    made, expected = decoder(models()["full"], attention)
    torch._dynamo.reset()
    step = torch.compile(made.step, backend="aot_eager", fullgraph=True)
    made.begin(START, TOKENS[START])
    first = step()
    made.begin(START, TOKENS[START])
    assert torch.allclose(first, expected[0], atol=1e-4, rtol=1e-4) and torch.equal(step(), first)
