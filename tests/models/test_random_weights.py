"""Random weights: the same bits whoever makes them, and a network whose every part shows in the logits."""

from __future__ import annotations

import functools
import hashlib
import math

import pytest
import torch

from amk.models.builtin import RANDOM
from amk.models.config import spec_from_config
from amk.models.model import Model, random_model
from amk.models.random_weights import RandomWeights, distribution, random_bits
from amk.models.registry import resolve
from amk.schedule.model import weight_shapes

QWEN3_TINY = dict(RANDOM["toy-2L"]) | {"model_type": "qwen3", "head_dim": 32, "attention_bias": True}
LLAMA_BIASED = dict(RANDOM["toy-2L"]) | {"attention_bias": True, "mlp_bias": True}


@functools.cache
def model_of(name: str) -> Model:
    return {"qwen3": lambda: random_model("qwen3", QWEN3_TINY), "biased": lambda: random_model("biased", LLAMA_BIASED)}.get(
        name, lambda: resolve(name)
    )()


def lowbias32(word: int) -> int:
    """The published hash, in plain integers (https://nullprogram.com/blog/2018/07/31/)."""
    word ^= word >> 16
    word = word * 0x7FEB352D & 0xFFFFFFFF
    word ^= word >> 15
    word = word * 0x846CA68B & 0xFFFFFFFF
    return word ^ word >> 16


def test_bits_are_the_published_hash_of_the_element_index() -> None:
    digest = hashlib.sha256(b"7:L0.q").digest()
    odd, key = int.from_bytes(digest[:4], "little") | 1, int.from_bytes(digest[4:8], "little")
    start = (1 << 31) - 100
    expected = [lowbias32((index * odd + key) & 0xFFFFFFFF) for index in range(start, start + 64)]
    assert [word & 0xFFFFFFFF for word in random_bits(7, "L0.q", start, 64).tolist()] == expected


@pytest.mark.parametrize("chunk", [1, 7, 64 * 3, 1 << 20])
def test_weights_do_not_depend_on_the_size_of_the_pieces(chunk: int) -> None:
    spec = spec_from_config(RANDOM["toy"], "toy")
    whole, pieces = RandomWeights(spec, RANDOM["toy"]), RandomWeights(spec, RANDOM["toy"], chunk=chunk)
    for name in ("L0.k", "L0.input_norm"):
        assert torch.equal(whole.tensor(name), pieces.tensor(name))


def test_seed_and_name_select_different_weights() -> None:
    spec = spec_from_config(RANDOM["toy"], "toy")
    first, second = RandomWeights(spec, RANDOM["toy"], seed=0), RandomWeights(spec, RANDOM["toy"], seed=1)
    assert torch.equal(first.tensor("L0.gate"), first.tensor("L0.gate"))
    assert not torch.equal(first.tensor("L0.gate"), second.tensor("L0.gate"))
    assert not torch.equal(first.tensor("L0.gate"), first.tensor("L0.up"))
    assert first.digest != second.digest


def test_tensors_of_a_seed_never_change() -> None:
    """Results are cached by seed and version; a change of bits must come with a change of `VERSION`."""
    weights = model_of("toy-2L").weights
    digest = hashlib.sha256()
    for name in weight_shapes(model_of("toy-2L").spec):
        digest.update(weights.tensor(name).view(torch.int16).numpy().tobytes())
    assert digest.hexdigest() == "ed05da1693a440d3d23ce8aed8b1dbdf3c9a48e232e0f01063ede4ec51f842c9"


@pytest.mark.parametrize("name", ["toy", "toy-2L", "small", "qwen3", "biased"])
def test_every_tensor_has_its_shape_dtype_and_distribution(name: str) -> None:
    model = model_of(name)
    dtype = torch.float32 if model.spec.dtype == "fp32" else torch.bfloat16
    for weight, shape in weight_shapes(model.spec).items():
        tensor = model.weights.tensor(weight)
        mean, std = distribution(model.spec, weight)
        assert tuple(tensor.shape) == shape and tensor.dtype == dtype
        spread = std / math.sqrt(tensor.numel())
        assert abs(tensor.double().mean().item() - mean) < 5 * spread + 0.004 * abs(mean), weight
        assert abs(tensor.double().std().item() / std - 1) < 5 / math.sqrt(tensor.numel()) + 0.01, weight


@pytest.mark.parametrize("name", ["toy", "toy-2L", "small", "qwen3", "biased"])
def test_eager_model_holds_the_same_weights_and_the_same_rope(name: str) -> None:
    model = model_of(name)
    eager = model.eager()
    for weight in ("embed", "head", "final_norm", "L0.q", "L0.down"):
        owner = {"embed": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm"}.get(weight)
        path = owner or {"L0.q": "model.layers.0.self_attn.q_proj", "L0.down": "model.layers.0.mlp.down_proj"}[weight]
        assert torch.equal(eager.get_submodule(path).weight, model.weights.tensor(weight).float())
    cos, _ = eager.model.rotary_emb(torch.zeros(1), torch.arange(40)[None])
    assert torch.equal(cos[0, :, : model.spec.head_dim // 2], model.weights.rope_table(40)[..., 0])
    assert not eager.training and not any(weight.requires_grad for weight in eager.parameters())
    assert not any(tensor.is_meta for tensor in (*eager.parameters(), *eager.buffers()))


@pytest.mark.parametrize("name", ["toy", "toy-2L", "small", "qwen3", "biased"])
def test_attention_scores_have_a_deviation_of_two_or_more_in_every_layer(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(0, model.spec.vocab, (1, 128), generator=torch.Generator().manual_seed(0))
    output = model.eager()(ids, output_attentions=True, output_hidden_states=True)
    for attention in output.attentions:
        scores = attention[0].clamp_min(1e-38).log()  # up to a constant a row, which a deviation does not see
        deviations = torch.stack([scores[:, row, : row + 1].std(-1) for row in range(64, 128)])
        assert deviations.mean(0).min() >= 2.0
    assert all(0.05 < state.square().mean().sqrt() < 3 for state in output.hidden_states)
    assert 1 < output.logits.std() < 4


def test_greedy_choice_stands_out_and_an_untied_model_walks_its_vocabulary() -> None:
    model = model_of("small")
    ids = torch.randint(0, model.spec.vocab, (1, 64), generator=torch.Generator().manual_seed(0))
    best, second = model.eager()(ids).logits[0].topk(2, -1).values.unbind(-1)
    assert ((best - second) > 0.5).float().mean() > 0.97
    head, embed = model.weights.tensor("head"), model.weights.tensor("embed")
    assert not torch.equal(head, embed) and torch.equal(head.float().sum(0).round(), embed.float().sum(0).round())
    assert torch.equal(model_of("toy-2L").weights.tensor("head"), model_of("toy-2L").weights.tensor("embed"))


@pytest.mark.cuda
def test_weights_on_the_card_are_the_bits_of_the_cpu() -> None:
    for name in ("toy", "toy-2L", "small", "qwen3"):
        model = model_of(name)
        for weight in weight_shapes(model.spec):
            assert torch.equal(model.weights.tensor(weight, "cuda").cpu(), model.weights.tensor(weight)), (name, weight)
        assert torch.equal(model.weights.rope_table(100, "cuda").cpu(), model.weights.rope_table(100))
