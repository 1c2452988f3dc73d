"""Checkpoints of AWQ, GPTQ and compressed-tensors, written here word by word from the published layouts, are read as they were meant."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from amk.isa.weight_format import FP8, FP8_GROUPS, WeightFormat
from amk.models.awq import Awq, awq_scheme
from amk.models.compressed_tensors import CompressedTensors
from amk.models.errors import DamagedCheckpoint, Unsupported
from amk.models.fp8_blocks import BlockFloats
from amk.models.gptq import Gptq, gptq_scheme
from amk.models.model import Model
from amk.models.quantise import dequantise
from amk.models.registry import describe, resolve
from amk.schedule.model import weight_format, weight_shapes

Folder = Callable[[str], Path]
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Written:
    """A matrix [rows, columns] of random codes with scales and zeros, all numpy; `values` is what it means, in float64."""

    def __init__(self, rng: np.random.Generator, rows: int, columns: int, bits: int, group: int, asymmetric: bool) -> None:
        groups = columns // group if group else 1
        self.bits = bits
        self.codes = rng.integers(0, 1 << bits, (rows, columns))
        self.scales = (rng.uniform(0.16, 0.8, (rows, groups)) / (1 << bits)).astype(np.float16)
        self.zeros = rng.integers(1, 1 << bits, (rows, groups)) if asymmetric else np.full((rows, groups), 1 << (bits - 1))
        self.zeros[0, 0] = 0 if asymmetric else self.zeros[0, 0]  # stored as the largest code where less one is stored
        spread = [np.repeat(part, columns // groups, axis=1).astype(np.float64) for part in (self.zeros, self.scales)]
        self.values = (self.codes - spread[0]) * spread[1]


def words(codes: np.ndarray, bits: int, place: Callable[[int], int] = lambda i: i) -> torch.Tensor:
    """int32 words of codes along the last axis: bits [bits * i, bits * (i + 1)) of a word hold code `place(i)` of its 32 / bits."""
    count = 32 // bits
    padded = np.pad(codes, ((0, 0), (0, -codes.shape[1] % count)))
    out = np.zeros((codes.shape[0], padded.shape[1] // count), dtype=np.uint32)
    for row in range(out.shape[0]):
        for word in range(out.shape[1]):
            for i in range(count):
                out[row, word] |= np.uint32(int(padded[row, word * count + place(i)]) << (bits * i))
    return torch.from_numpy(out.view(np.int32))


def awq_tensors(m: Written) -> dict[str, torch.Tensor]:
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    return {
        "qweight": words(m.codes.T, 4, order.__getitem__),
        "qzeros": words(m.zeros.T, 4, order.__getitem__),
        "scales": torch.from_numpy(m.scales.T.copy()),
    }


def gptq_tensors(m: Written, offset: int = 1) -> dict[str, torch.Tensor]:
    columns, groups = m.codes.shape[1], m.scales.shape[1]
    return {
        "qweight": words(m.codes, m.bits).T.contiguous(),
        "qzeros": words((m.zeros.T - offset) % (1 << m.bits), m.bits),
        "scales": torch.from_numpy(m.scales.T.copy()),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
        "bias": torch.zeros(len(m.codes), dtype=torch.float16),
    }


def packed_tensors(m: Written, asymmetric: bool) -> dict[str, torch.Tensor]:
    tensors = {
        "weight_packed": words(m.codes, m.bits),
        "weight_scale": torch.from_numpy(m.scales),
        "weight_shape": torch.tensor(m.codes.shape),
    }
    return tensors | ({"weight_zero_point": words(m.zeros.T, m.bits).T.contiguous()} if asymmetric else {})


def plain_tensors(m: Written, asymmetric: bool) -> dict[str, torch.Tensor]:
    middle = 1 << (m.bits - 1)
    tensors = {"weight": torch.from_numpy((m.codes - middle).astype(np.int8)), "weight_scale": torch.from_numpy(m.scales)}
    return tensors | ({"weight_zero_point": torch.from_numpy((m.zeros - middle).astype(np.int8))} if asymmetric else {})


class Numbers(Written):
    """The same of E4M3 numbers; of one scale, that of the first row."""

    def __init__(self, rng: np.random.Generator, rows: int, columns: int, one_scale: bool) -> None:
        codes = rng.integers(0, 127, (rows, columns)) + 128 * rng.integers(0, 2, (rows, columns))
        self.numbers = torch.from_numpy(codes.astype(np.uint8)).view(torch.float8_e4m3fn)
        self.scales = (rng.uniform(0.16, 0.8, (rows, 1)) / 448).astype(np.float16)
        self.scales = self.scales[:1] if one_scale else self.scales
        self.values = self.numbers.double().numpy() * self.scales.astype(np.float64)

    def tensors(self) -> dict[str, torch.Tensor]:
        return {
            "weight": self.numbers,
            "weight_scale": torch.from_numpy(self.scales).reshape(self.scales.shape if len(self.scales) > 1 else 1),
        }


def float_compressed(strategy: str, activations: Any = None, **changes: Any) -> dict[str, Any]:
    """As llm-compressor writes FP8_DYNAMIC and its weight-only kin."""
    weights = {
        "num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy, "dynamic": False, "observer": "minmax",
        "observer_kwargs": {}, "group_size": None, "block_structure": None, "actorder": None,
    }  # fmt: skip
    group_0 = {"targets": ["Linear"], "weights": weights | changes, "input_activations": activations, "output_activations": None}
    return compressed("float-quantized", 8, 0, False) | {"config_groups": {"group_0": group_0}}


BY_TOKEN = {
    "num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True, "observer": None, "group_size": None,
}  # fmt: skip


def compressed(form: str, bits: int, group: int, asymmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "symmetric": not asymmetric, "dynamic": False, "observer": "minmax", "actorder": None}
    weights |= {"strategy": "group", "group_size": group} if group else {"strategy": "channel", "group_size": None}
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group_0}, "ignore": ["lm_head"],
        "kv_cache_scheme": None, "quantization_status": "compressed", "global_compression_ratio": None,
    }  # fmt: skip


def gptq(bits: int, group: int, sym: bool, **more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": bits, "group_size": group or -1, "sym": sym, "desc_act": False, "lm_head": False} | more


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm", "modules_to_not_convert": None}
V2 = {"checkpoint_format": "gptq_v2"}
Case = tuple[dict[str, Any], Callable[[Written], dict[str, torch.Tensor]], int, int, bool]
CASES: dict[str, Case] = {
    "awq g32": (AWQ, awq_tensors, 4, 32, True),
    "gptq 4 bits g32": (gptq(4, 32, True), gptq_tensors, 4, 32, False),
    "gptq 4 bits g32, zeros": (gptq(4, 32, False), gptq_tensors, 4, 32, True),
    "gptq 4 bits g32, zeros, v2": (gptq(4, 32, False, **V2), lambda m: gptq_tensors(m, 0), 4, 32, True),
    "gptq 4 bits, whole rows, zeros stored as they are": (gptq(4, 0, True), lambda m: gptq_tensors(m, 0), 4, 0, False),
    "gptq 8 bits g32": (gptq(8, 32, True, checkpoint_format="gptq"), gptq_tensors, 8, 32, False),
    "gptq 8 bits, zeros": (gptq(8, 0, False), gptq_tensors, 8, 0, True),
    "packed 4 bits g32": (compressed("pack-quantized", 4, 32, False), lambda m: packed_tensors(m, False), 4, 32, False),
    "packed 4 bits g32, zeros": (compressed("pack-quantized", 4, 32, True), lambda m: packed_tensors(m, True), 4, 32, True),
    "packed 8 bits": (compressed("pack-quantized", 8, 0, False), lambda m: packed_tensors(m, False), 8, 0, False),
    "int4 in bytes, g32": (compressed("int-quantized", 4, 32, False), lambda m: plain_tensors(m, False), 4, 32, False),
    "int8": (compressed("int-quantized", 8, 0, False), lambda m: plain_tensors(m, False), 8, 0, False),
    "int8 g32, zeros": (compressed("int-quantized", 8, 32, True), lambda m: plain_tensors(m, True), 8, 32, True),
}


def quantised_folder(folder: Path, case: Case, head: bool = False) -> tuple[Path, dict[str, np.ndarray]]:
    """The checkpoint in `folder` with its matrices replaced by written ones, and what those mean by module."""
    config, write, bits, group, asymmetric = case
    rng, meaning = np.random.default_rng(7), {}
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and (module.endswith(MATRICES) or (head and module == "lm_head")):
            m = Written(rng, *tensor.shape, bits, group, asymmetric)
            meaning[module] = m.values
            tensors |= {f"{module}.{part}": value.contiguous() for part, value in write(m).items()}
        else:
            tensors[name] = tensor.half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=config)
    return folder, meaning


def float_folder(folder: Path, config: dict[str, Any], one_scale: bool = False) -> tuple[Path, dict[str, np.ndarray]]:
    """The checkpoint with its matrices replaced by written ones of FP8, and what those mean by module."""
    rng, meaning, tensors = np.random.default_rng(7), {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.endswith(MATRICES):
            m = Numbers(rng, *tensor.shape, one_scale)
            meaning[module] = m.values
            tensors |= {f"{module}.{part}": value for part, value in m.tensors().items()}
        else:
            tensors[name] = tensor.half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change_config(folder, quantization_config=config)
    return folder, meaning


def change_config(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_tensor(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = {key: value.clone() for key, value in load_file(folder / "model.safetensors").items()}
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def module_of(name: str) -> str:
    from amk.models.names import module_name

    return module_name(name)


def check(model: Model, meaning: dict[str, np.ndarray]) -> None:
    found = {}
    for name in weight_shapes(model.spec):
        if weight_format(model.spec, name):
            found[module_of(name)] = model.weights.tensor(name)
    assert set(found) == set(meaning)
    for module, values in meaning.items():
        np.testing.assert_array_equal(found[module].double().numpy(), values)


@pytest.mark.parametrize("name", CASES)
def test_every_layout_is_read_as_it_was_written(name: str, tiny_copy: Folder) -> None:
    folder, meaning = quantised_folder(tiny_copy("llama3.1"), CASES[name])
    model = resolve(str(folder))
    _, _, bits, group, asymmetric = CASES[name]
    form = model.spec.layer_weights
    assert form and (form.bits, form.group, form.asymmetric, form.scale) == (bits, group, asymmetric, "fp16")
    assert model.spec.head_weights is None and model.spec.dtype == "fp16" and describe(str(folder)) == model.spec
    check(model, meaning)


def test_fields_that_a_config_leaves_out_have_their_writers_defaults() -> None:
    assert gptq_scheme({"quant_method": "gptq", "bits": 4}) == Gptq(WeightFormat(4), zero_offset=1)
    assert awq_scheme({"quant_method": "awq"}) == Awq(WeightFormat(4, 128, asymmetric=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_and_columns_that_fill_no_whole_words_are_cut_to_the_matrix(bits: int) -> None:
    form = WeightFormat(bits, asymmetric=True, scale="fp16")
    m = Written(np.random.default_rng(3), 13, 21, bits, 0, True)
    found = CompressedTensors(form, packed=True).read("m", packed_tensors(m, True), form)
    assert found.codes.shape == (13, 21) and found.zeros.shape == found.scales.shape == (13, 1)
    np.testing.assert_array_equal(dequantise(found).double().numpy(), m.values)


@pytest.mark.parametrize("activations", [None, BY_TOKEN], ids=["16 bits", "rounded by token"])
@pytest.mark.parametrize("strategy", ["channel", "tensor", None])
def test_fp8_weights_are_read_as_they_were_written(strategy: str | None, activations: Any, tiny_copy: Folder) -> None:
    config = float_compressed(strategy or "tensor", activations)
    if strategy is None:  # what compressed-tensors takes it for then
        del config["config_groups"]["group_0"]["weights"]["strategy"]
    folder, meaning = float_folder(tiny_copy("llama3.1"), config, one_scale=strategy != "channel")
    model = resolve(str(folder))
    assert model.spec.layer_weights == replace(FP8, scale="fp16") and model.spec.head_weights is None
    check(model, meaning)


BLOCKS = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip


def block_folder(folder: Path, config: dict[str, Any], name: str = "weight_scale_inv") -> tuple[Path, dict[str, np.ndarray]]:
    """The checkpoint with its matrices replaced by FP8 ones whose blocks of 128 by 128, whole or not, have scales of their own."""
    folder, meaning = float_folder(folder, config, one_scale=True)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(8)
    for module in meaning:
        del tensors[f"{module}.weight_scale"]
        numbers = tensors[f"{module}.weight"]
        rows, columns = numbers.shape
        scales = (rng.uniform(0.16, 0.8, (-(-rows // 128), -(-columns // 128))) / 448).astype(np.float16)
        tensors[f"{module}.{name}"] = torch.from_numpy(scales)
        spread = np.repeat(np.repeat(scales.astype(np.float64), 128, 0), 128, 1)[:rows, :columns]
        meaning[module] = numbers.double().numpy() * spread
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder, meaning


@pytest.mark.parametrize("name", ["llama3.1", "qwen3"])
@pytest.mark.parametrize(
    ("config", "scales"),
    [
        (BLOCKS, "weight_scale_inv"),
        (BLOCKS | {"modules_to_convert": None, "scale_fmt": "float", "expert_dtype": "fp8", "dequantize": False}, "weight_scale_inv"),
        (float_compressed("block", BY_TOKEN, block_structure=[128, 128]), "weight_scale"),
    ],
    ids=["transformers", "with every default", "compressed-tensors"],
)
def test_fp8_in_blocks_is_read_as_it_was_written(config: dict[str, Any], scales: str, name: str, tiny_copy: Folder) -> None:
    folder, meaning = block_folder(tiny_copy(name), config, scales)
    model = resolve(str(folder))
    assert model.spec.layer_weights == replace(FP8_GROUPS, scale="fp16") and model.spec.head_weights is None
    check(model, meaning)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["mlp.up_proj.weight_scale", "input_layernorm.weight", "self_attn.k_proj.weight_scale"])
def test_elements_that_are_no_numbers_are_damage(part: str, value: float, tiny_copy: Folder) -> None:
    folder, _ = quantised_folder(tiny_copy("llama2"), CASES["int8"])

    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[1] = value
        return tensor

    change_tensor(folder, f"model.layers.1.{part}", spoil)
    refused(folder, DamagedCheckpoint, f"model.layers.1.{part}", "NaN or infinite")


def test_every_block_has_the_scale_of_its_place() -> None:
    rng = np.random.default_rng(2)
    m, scales = Numbers(rng, 300, 520, one_scale=True), rng.uniform(1e-3, 2e-3, (3, 5)).astype(np.float16)
    scheme, form = BlockFloats(FP8_GROUPS), replace(FP8_GROUPS, scale="fp16")
    assert [part.shape for part in scheme.parts(300, 520)] == [(300, 520), (3, 5)]
    found = dequantise(scheme.read("m", {"weight": m.numbers, "weight_scale_inv": torch.from_numpy(scales)}, form))
    for row, column in ((0, 0), (127, 128), (128, 127), (255, 511), (256, 512), (299, 519)):
        assert float(found[row, column]) == float(m.numbers[row, column]) * float(scales[row // 128, column // 128])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weight_block_size": [64, 128]}, "weight_block_size"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"activation_scheme": "static"}, "activation_scheme"),
        ({"fmt": "e5m2"}, "fmt"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_fp8_in_other_blocks_is_refused_by_name(change: dict[str, Any], said: str, tiny_copy: Folder) -> None:
    folder, _ = block_folder(tiny_copy("llama2"), BLOCKS | change)
    refused(folder, Unsupported, "quantization_config", said)


def test_fp8_without_blocks_is_refused_by_name(tiny_copy: Folder) -> None:
    without = {field: value for field, value in BLOCKS.items() if field != "weight_block_size"}
    refused(block_folder(tiny_copy("llama2"), without)[0], Unsupported, "weight_block_size")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (float_compressed("channel", BY_TOKEN | {"dynamic": False, "strategy": "tensor"}), "input_activations"),
        (float_compressed("channel", BY_TOKEN | {"num_bits": 4}), "input_activations"),
        (float_compressed("channel", "some"), "input_activations"),
        (float_compressed("block", None, block_structure=[64, 128]), "block_structure"),
        (float_compressed("tensor_group", None), "strategy"),
        (float_compressed("group", None, group_size=128), "group_size"),
        (float_compressed("channel", None, num_bits=4), "num_bits"),
        (float_compressed("channel", None, type="int"), "type"),
        (float_compressed("channel", None, symmetric=False), "symmetric"),
        (compressed("float-quantized", 8, 0, False), "type"),
        (float_compressed("channel") | {"format": "int-quantized"}, "type"),
    ],
)
def test_fp8_in_another_form_is_refused_by_name(config: dict[str, Any], said: str, tiny_copy: Folder) -> None:
    folder, _ = float_folder(tiny_copy("llama2"), config)
    refused(folder, Unsupported, "quantization_config", said)


def test_fp8_weights_that_are_no_numbers_are_refused_by_name(tiny_copy: Folder) -> None:
    folder, _ = float_folder(tiny_copy("llama2"), float_compressed("channel"))

    def spoil(weight: torch.Tensor) -> torch.Tensor:
        codes = weight.view(torch.uint8)
        codes[3, 5] = 255
        return codes.view(torch.float8_e4m3fn)

    change_tensor(folder, "model.layers.1.mlp.up_proj.weight", spoil)
    refused(folder, Unsupported, "layers.1.mlp.up_proj", "NaN")


@pytest.mark.parametrize("name", ["awq g32", "gptq 4 bits g32", "packed 4 bits g32", "int8"])
def test_a_quantised_head_is_found(name: str, tiny_copy: Folder) -> None:
    folder, meaning = quantised_folder(tiny_copy("llama2"), CASES[name], head=True)
    # 131 rows are no whole number of words, so the families that pack rows cannot store this head.
    if name in ("awq g32", "gptq 4 bits g32"):
        with pytest.raises(DamagedCheckpoint, match="lm_head"):
            resolve(str(folder))
        return
    model = resolve(str(folder))
    assert model.spec.head_weights == model.spec.layer_weights
    check(model, meaning)


@pytest.mark.parametrize("name", ["awq g32", "gptq 8 bits g32", "int8 g32, zeros"])
def test_the_source_model_of_a_quantised_checkpoint_has_the_written_weights(name: str, tiny_copy: Folder) -> None:
    folder, meaning = quantised_folder(tiny_copy("qwen2"), CASES[name])
    eager = resolve(str(folder)).eager()
    for module, values in meaning.items():
        np.testing.assert_array_equal(eager.get_submodule(module).weight.double().numpy(), values)


def test_a_bias_that_the_model_has_is_not_taken_for_gptqs_own(tiny_copy: Folder) -> None:
    case = CASES["gptq 4 bits g32"]
    without = (case[0], lambda m: {part: value for part, value in gptq_tensors(m).items() if part != "bias"}, *case[2:])
    folder, _ = quantised_folder(tiny_copy("qwen2"), without)
    assert bool(resolve(str(folder)).weights.tensor("L0.q.bias").any())


def refused(folder: Path, kind: type[Exception], *said: str) -> None:
    with pytest.raises(kind) as caught:
        model = resolve(str(folder))
        for name in weight_shapes(model.spec):
            model.weights.tensor(name)
    assert all(word in str(caught.value) for word in said), str(caught.value)
    assert "\n" not in str(caught.value)


def test_groups_in_another_order_are_refused_by_name(tiny_copy: Folder) -> None:
    folder, _ = quantised_folder(tiny_copy("llama2"), CASES["gptq 4 bits g32"])
    change_tensor(folder, "model.layers.1.mlp.up_proj.g_idx", lambda t: t.flip(0))
    refused(folder, Unsupported, "layers.1.mlp.up_proj", "g_idx")


def test_a_bias_of_gptqs_own_must_be_zero(tiny_copy: Folder) -> None:
    folder, _ = quantised_folder(tiny_copy("llama2"), CASES["gptq 4 bits g32"])
    change_tensor(folder, "model.layers.0.mlp.up_proj.bias", lambda t: t + 1)
    refused(folder, Unsupported, "up_proj", "bias")


def test_zeros_of_a_symmetric_checkpoint_must_be_its_middle(tiny_copy: Folder) -> None:
    folder, _ = quantised_folder(tiny_copy("llama2"), CASES["gptq 4 bits g32"])
    change_tensor(folder, "model.layers.0.self_attn.q_proj.qzeros", lambda t: t + 1)
    refused(folder, DamagedCheckpoint, "q_proj.qzeros")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 3}, "bits"),
        ({"group_size": 48}, "group_size"),
        ({"version": "gemv"}, "version"),
        ({"zero_point": False}, "zero_point"),
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_is_not_understood_about_a_quantisation_is_named(change: dict[str, Any], said: str, tiny_copy: Folder) -> None:
    folder, _ = quantised_folder(tiny_copy("llama2"), CASES["awq g32"])
    change_config(folder, quantization_config=AWQ | change)
    refused(folder, Unsupported, "quantization_config", said)


def test_quantised_activations_are_refused(tiny_copy: Folder) -> None:
    folder, _ = quantised_folder(tiny_copy("llama2"), CASES["int8"])
    config = compressed("int-quantized", 8, 0, False)
    config["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "dynamic": True}
    change_config(folder, quantization_config=config)
    refused(folder, Unsupported, "input_activations")


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_or_cut_tensor_is_damage(part: str, tiny_copy: Folder) -> None:
    folder, _ = quantised_folder(tiny_copy("llama2"), CASES["awq g32"])
    name = f"model.layers.0.mlp.down_proj.{part}"
    change_tensor(folder, name, lambda t: t[:-1])
    refused(folder, DamagedCheckpoint, name)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, DamagedCheckpoint, name)


@pytest.mark.parametrize("shape", [(64, 56), (56, 64), (64, 0), (-64, 64)])
def test_a_stored_shape_that_is_not_the_models_is_damage(shape: tuple[int, int], tiny_copy: Folder) -> None:
    folder, _ = quantised_folder(tiny_copy("llama2"), CASES["packed 8 bits"])
    change_tensor(folder, "model.layers.0.self_attn.q_proj.weight_shape", lambda _: torch.tensor(shape))
    with pytest.raises(DamagedCheckpoint, match=r"q_proj must have codes of shape \[64, 64\] by config.json, but has"):
        resolve(str(folder)).weights.tensor("L0.q")


def test_a_matrix_that_is_not_quantised_among_others_that_are_is_named(tiny_copy: Folder) -> None:
    folder, _ = quantised_folder(tiny_copy("llama2"), CASES["packed 4 bits g32"])
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.0.self_attn.v_proj"
    tensors = {name: t for name, t in tensors.items() if not name.startswith(module)} | {f"{module}.weight": torch.zeros(64, 64).half()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    refused(folder, Unsupported, module)
