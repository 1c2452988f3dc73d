"""A checkpoint with a byte, a tensor or a file too few or too many is never used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from amk.models.errors import DamagedCheckpoint, ModelError, UnknownModel, Unsupported
from amk.models.registry import describe, resolve

Folder = Callable[[str], Path]


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> str:
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return str(folder)


def fails(name: str, kind: type[ModelError], *words: str) -> None:
    with pytest.raises(kind) as caught:
        resolve(name)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_safetensors_is_damaged(kept: int, tiny_copy: Folder) -> None:
    folder = tiny_copy("llama2")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    fails(str(folder), DamagedCheckpoint, "model.safetensors")
    with pytest.raises(DamagedCheckpoint):
        describe(str(folder))
    assert DamagedCheckpoint.exit_code == 3


def test_bytes_after_the_tensors_are_damage(tiny_copy: Folder) -> None:
    folder = tiny_copy("llama2")
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    fails(str(folder), DamagedCheckpoint, "must hold")


def test_garbage_header_is_damaged(tiny_copy: Folder) -> None:
    folder = tiny_copy("llama2")
    text = b'{"w": {"dtype": "F32"}}'
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    fails(str(folder), DamagedCheckpoint, "broken safetensors header")


def test_missing_weight_is_damage_and_named(tiny_copy: Folder) -> None:
    name = change_weights(tiny_copy("llama2"), lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    fails(name, DamagedCheckpoint, "model.layers.1.mlp.up_proj.weight")


def test_wrong_shape_is_damage_and_named(tiny_copy: Folder) -> None:
    weight = "model.layers.0.self_attn.k_proj.weight"
    name = change_weights(tiny_copy("llama2"), lambda tensors: tensors.update({weight: tensors[weight][:8].contiguous()}))
    fails(name, DamagedCheckpoint, weight, "[64, 64]", "[8, 64]")


@pytest.mark.parametrize(
    "weight", ["model.layers.0.self_attn.q_norm.weight", "model.layers.2.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x"]
)
def test_weight_that_the_model_does_not_use_is_rejected_by_name(weight: str, tiny_copy: Folder) -> None:
    fails(change_weights(tiny_copy("llama2"), lambda tensors: tensors.update({weight: torch.ones(4).bfloat16()})), Unsupported, weight)


def test_stored_rope_frequencies_of_old_checkpoints_are_harmless(tiny_copy: Folder) -> None:
    folder = tiny_copy("llama2")
    before = resolve(str(folder)).spec
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(2)}
    assert resolve(change_weights(folder, lambda tensors: tensors.update(frequencies))).spec == before


def test_mixed_or_quantised_dtypes_are_rejected_by_name(tiny_copy: Folder) -> None:
    folder = tiny_copy("llama2")
    weight = "model.layers.0.mlp.up_proj.weight"
    change_weights(folder, lambda tensors: tensors.update({weight: tensors[weight].float()}))
    fails(str(folder), Unsupported, "one dtype", weight)
    change_weights(folder, lambda tensors: tensors.update({weight: tensors[weight].to(torch.int8)}))
    fails(str(folder), Unsupported, "I8", weight)


def test_stored_head_of_a_tied_model_must_be_the_embedding(tiny_copy: Folder) -> None:
    folder = tiny_copy("qwen3")
    change_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert resolve(str(folder)).spec.tied_head
    change_weights(folder, lambda tensors: tensors["lm_head.weight"].view(-1)[7:8].add_(1))
    fails(str(folder), Unsupported, "lm_head.weight")


def test_sharded_checkpoint_is_read_and_a_lost_shard_is_damage(tiny_copy: Folder, tmp_path: Path) -> None:
    whole = resolve(str(tiny_copy("llama3")))
    whole.eager(dtype="bf16").save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    shards = sorted((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    sharded = resolve(str(tmp_path / "shards"))
    assert torch.equal(sharded.weights.tensor("L1.down"), whole.weights.tensor("L1.down"))
    shards[0].unlink()
    fails(str(tmp_path / "shards"), DamagedCheckpoint, shards[0].name)


def test_broken_json_is_damage_and_a_bare_folder_is_no_model(tiny_copy: Folder, tmp_path: Path) -> None:
    folder = tiny_copy("llama2")
    (folder / "config.json").write_text('{"model_type": ')
    fails(str(folder), DamagedCheckpoint, "config.json")
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 64, "hidden_size": 128}')
    fails(str(folder), DamagedCheckpoint, "key 'hidden_size' stands there twice")
    (tmp_path / "bare").mkdir()
    fails(str(tmp_path / "bare"), UnknownModel, "config.json")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", b"", ("tokenizer.json", "not valid JSON")),
        ("tokenizer.json", b'{"version": "1.0", "mod', ("tokenizer.json", "not valid JSON")),
        ("tokenizer.json", b"{}", ("tokenizer.json", "transformers cannot load")),
        ("tokenizer_config.json", b"\xff", ("tokenizer_config.json", "not valid JSON")),
        ("tokenizer_config.json", b"[]", ("tokenizer_config.json", "must hold a JSON object, but holds a list")),
        ("special_tokens_map.json", b"[]", ("special_tokens_map.json", "must hold a JSON object, but holds a list")),
    ],
)
def test_a_damaged_tokenizer_is_damage_and_named(tiny_copy: Folder, file: str, content: bytes, words: tuple[str, ...]) -> None:
    folder = tiny_copy("llama2")
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(folder / "tokenizer.json"))
    model = resolve(str(folder))
    assert model.tokenizer()("b")["input_ids"] == [1]
    (folder / file).write_bytes(content)
    with pytest.raises(DamagedCheckpoint) as caught:
        model.tokenizer()
    said = str(caught.value)
    assert [word for word in (*words, str(folder), "fetch the checkpoint again") if word not in said] == [] and "\n" not in said


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_labels": "x"}, "config field num_labels: must be what transformers takes, but got 'x'"),
        ({"max_window_layers": True}, "config field max_window_layers: must be what transformers takes, but got True"),
        ({"num_labels": "x", "max_window_layers": True}, "config must be what transformers takes, but"),
    ],
)
def test_a_config_that_transformers_refuses_is_rejected_before_any_weight_is_read(
    tiny_copy: Folder, change: dict[str, object], words: str
) -> None:
    folder = tiny_copy("qwen3")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    fails(str(folder), Unsupported, words)


def test_folder_without_weights_is_damage_and_pickles_are_not_read(tiny_copy: Folder) -> None:
    folder = tiny_copy("llama2")
    (folder / "model.safetensors").unlink()
    fails(str(folder), DamagedCheckpoint, "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")
    fails(str(folder), Unsupported, "safetensors")


def test_digest_follows_weights_and_config(tiny_copy: Folder) -> None:
    folder = tiny_copy("llama2")
    first = resolve(str(folder)).digest
    assert resolve(str(folder)).digest == first
    change_weights(folder, lambda tensors: tensors["model.norm.weight"].view(-1)[0:1].add_(1))
    second = resolve(str(folder)).digest
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 777.0, "rope_parameters": None}))
    assert len({first, second, resolve(str(folder)).digest}) == 3


def test_unknown_weight_name_is_a_key_error(tiny_folder: Folder) -> None:
    with pytest.raises(KeyError):
        resolve(str(tiny_folder("llama2"))).weights.tensor("L9.q")
