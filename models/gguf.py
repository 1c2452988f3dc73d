"""A GGUF file becomes a checkpoint folder once: transformers dequantises it, and what it would ignore is refused."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from amk.models.checkpoint import Checkpoint, read_checkpoint
from amk.models.eager import torch_dtype
from amk.models.errors import DamagedCheckpoint, Unavailable, Unsupported
from amk.schedule.model import DType

_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Metadata of the architecture that transformers carries over; it drops all others without a word.
_KNOWN_KEYS = {
    "block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "attention.head_count",
    "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length", "attention.value_length",
    "rope.freq_base", "rope.dimension_count",
}  # fmt: skip
_KNOWN_TENSOR = re.compile(
    r"(token_embd|output_norm|output)\.weight"
    r"|blk\.\d+\.(attn_norm|attn_q|attn_k|attn_v|attn_output|attn_q_norm|attn_k_norm|ffn_norm|ffn_gate|ffn_up|ffn_down)\.(weight|bias)"
)


def convert_gguf(file: Path, folder: Path, name: str, progress: Callable[[str], None]) -> Checkpoint:
    """Writes the model of a GGUF file to `folder` as config.json, safetensors and tokenizer, and reads it back.

    Matrices stored as F32 or F16 keep their dtype; quantised ones become bf16, which then is the model. Raises
    `Unsupported` for metadata or tensors that transformers would ignore, `DamagedCheckpoint` for a broken file.
    """
    _require_packages("gguf")
    dtype = _inspect(file, name)
    _require_packages("transformers", "accelerate")
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    progress(f"converting {file.name} to safetensors ({dtype}), about half a minute for 135M parameters")
    with torch.no_grad():
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, quantization_config=GgufConfig(dequantize=True), dtype=torch_dtype(dtype)
        )
        model.save_pretrained(folder)
    _save_tokenizer(file, folder, progress)
    checkpoint = read_checkpoint(folder, name)
    progress(f"converted {checkpoint.spec.layers} layers, {len(checkpoint.stored)} tensors")
    return checkpoint


def _require_packages(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise Unavailable(f"converting a GGUF file needs the packages {', '.join(missing)}; install them with pip")


def _inspect(file: Path, name: str) -> DType:
    """The dtype to convert to, after everything in the file is accounted for."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(str(file))
        architecture = str(reader.fields["general.architecture"].contents())
        values = {key: field.contents() for key, field in reader.fields.items() if key.startswith(f"{architecture}.")}
        tensors = {str(tensor.name): (len(tensor.shape), tensor.tensor_type.name) for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise DamagedCheckpoint(f"{file} is not a readable GGUF file: {error}; fetch it again") from error
    problems = _problems(architecture, {key.partition(".")[2]: value for key, value in values.items()}, set(tensors))
    if problems:
        raise Unsupported(name, problems)
    matrices = {kind for rank, kind in tensors.values() if rank > 1}
    kept: dict[str, DType] = {"F32": "fp32", "F16": "fp16"}
    return kept.get(next(iter(matrices)), "bf16") if len(matrices) == 1 else "bf16"


def _problems(architecture: str, values: dict[str, Any], tensors: set[str]) -> list[str]:
    if architecture not in _ARCHITECTURES:
        return [f"GGUF architecture: must be one of {', '.join(_ARCHITECTURES)}, but got {architecture}"]
    problems = [f"GGUF field {architecture}.{key} = {values[key]!r} is not understood" for key in sorted(set(values) - _KNOWN_KEYS)]
    problems += [f"GGUF tensor {tensor} is not understood" for tensor in sorted(tensors) if not _KNOWN_TENSOR.fullmatch(tensor)]
    lengths = {values[key] for key in ("rope.dimension_count", "attention.key_length", "attention.value_length") if key in values}
    if len(lengths) > 1:
        problems.append(f"GGUF head lengths (rope.dimension_count, key_length, value_length) must be equal, but are {sorted(lengths)}")
    return problems


def _save_tokenizer(file: Path, folder: Path, progress: Callable[[str], None]) -> None:
    """A tokenizer that transformers cannot rebuild costs text prompts, not the model."""
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(folder)
    except (KeyError, ValueError, TypeError, NotImplementedError, OSError) as error:
        progress(f"{file.name} has no tokenizer that can be rebuilt ({error}); give prompts as token ids")
