"""The shape of the tree: import order, packaging, and nothing that belongs to one machine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from amk.dev.import_order import RANK, violations

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]
NOT_OURS = {".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__", "workspace", "build", "dist"}


def tree_files(root: Path) -> Iterator[Path]:
    """Files of the checkout that somebody wrote, git or not."""
    for path in sorted(root.iterdir()):
        if path.name in NOT_OURS or path.name.endswith(".egg-info"):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from tree_files(path)
        elif path.is_file():
            yield path


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_every_package_imports_only_what_lies_below_it() -> None:
    assert [str(v) for v in violations(ROOT)] == []


@pytest.mark.parametrize(
    ("path", "text", "reason"),
    [
        ("isa/a.py", "import amk.schedule.program\n", "isa must not import schedule"),
        ("schedule/a.py", "from amk.vm.pack import pack\n", "schedule must not import vm"),
        ("schedule/a.py", "from amk import vm\n", "schedule must not import vm"),
        ("schedule/a.py", "import amk\n", "schedule must not import __init__"),
        ("schedule/a.py", "from amk import evaluate\n", "none of"),
        ("models/a.py", "from amk.vm import pack\n", "models must not import vm"),
        ("vm/a.py", "from amk.models import model\n", "vm must not import models"),
        ("eval/a.py", "from amk.flywheel import log\n", "eval must not import flywheel"),
        ("flywheel/a.py", "from amk.harness import evaluate\n", "flywheel must not import harness"),
        ("harness.py", "import amk.amk_cli\n", "harness must not import amk_cli"),
        ("vm/a.py", "from amk.dev.card import card_count\n", "none of"),
        ("vm/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import amk.eval.oracle\n", "vm must not import eval"),
        ("isa/a.py", "from importlib import import_module\nimport_module('amk.vm.pack')\n", "isa must not import vm"),
        ("isa/a.py", "import importlib\ndef f(x):\n    importlib.import_module(f'amk.vm.{x}')\n", "isa must not import vm"),
        ("isa/a.py", "vm = __import__('amk.vm')\n", "isa must not import vm"),
        ("vm/a.py", "def f():\n    from amk.schedule.program import Program\n", "inside a function"),
        ("eval/a.py", "class A:\n    def f(self):\n        import amk.vm.pack\n", "inside a function"),
        ("isa/a.py", "from ..vm import pack\n", "must be absolute"),
        ("isa/a.py", "from . import abi\n", "must be absolute"),
        ("vm/a.py", "from schedule.program import Program\n", "imported as amk.schedule"),
        ("eval/a.py", "def f():\n    import transformers\n", "only models imports transformers"),
        ("harness.py", "from transformers import AutoConfig\n", "only models imports transformers"),
        ("isa/a.py", "import torch\n", "isa may import numpy"),
        ("schedule/a.py", "import torch\n", "schedule may import numpy"),
        ("schedule/a.py", "def f():\n    import torch\n", "schedule may import numpy"),
        ("vm/a.py", "import pydantic\n", "vm may import cuda, numpy, torch"),
        ("vm/a.py", "import torch\n", "must load lazily"),
        ("models/a.py", "try:\n    import transformers\nexcept ImportError:\n    pass\n", "must load lazily"),
        ("vm/a.py", "import amk_bootstrap\n", "only scripts in the root"),
        ("isa/a.cuh", '#include "vm/device/actors.cuh"\n', "isa must not include vm/device/actors.cuh"),
        ("isa/a.cuh", "  #  include <amk/vm/device/actors.cuh>\n", "isa must not include"),
        ("isa/device/a.cuh", '#include "../../vm/device/actors.cuh"\n', "isa must not include"),
        ("isa/device/a.cuh", '#include "device/actors.cuh"\n', "isa must not include"),
    ],
)
def test_a_planted_violation_is_found_where_it_stands(tmp_path: Path, path: str, text: str, reason: str) -> None:
    plant(tmp_path, {"vm/device/actors.cuh": "", path: text})
    (found,) = violations(tmp_path)
    assert found.path == path
    assert reason in found.reason
    assert found.line == len(text.splitlines()) or "try:" in text


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("schedule/a.py", "from amk.isa.abi import Field\nimport numpy as np\n"),
        ("vm/a.py", "def f():\n    import torch\n"),
        ("models/a.py", "def f():\n    from transformers import AutoConfig\n"),
        ("models/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"),
        ("isa/registry.py", "from importlib import import_module\ndef f(stem):\n    return import_module(f'amk.isa.{stem}')\n"),
        ("__init__.py", "def __getattr__(name):\n    from amk import harness\n    return getattr(harness, name)\n"),
        ("amk_cli.py", "if __name__ == '__main__' and not __package__:\n    import amk_bootstrap\n"),
        ("vm/kernel.cu", '#include "isa/gemv.cuh"\n#include <cuda_bf16.h>\n#include "vm/device/generated.cuh"\n'),
    ],
)
def test_what_the_order_allows_is_no_violation(tmp_path: Path, path: str, text: str) -> None:
    plant(tmp_path, {"isa/gemv.cuh": "", path: text})
    assert violations(tmp_path) == []


def test_command_line_starts_without_torch_or_transformers() -> None:
    code = "import sys, amk.amk_cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ran.stdout.strip(), ran.stderr) == ("[]", "")


def test_every_package_is_listed_and_every_listed_package_exists() -> None:
    folders = {path.parent for layer in RANK for path in (ROOT / layer).rglob("__init__.py") if "__pycache__" not in path.parts}
    packages = {"amk", *("amk." + ".".join(folder.relative_to(ROOT).parts) for folder in folders)}
    assert packages == set(SETUPTOOLS["packages"])


def test_consoles_name_functions_of_modules_that_exist() -> None:
    for target in PROJECT["project"]["scripts"].values():
        module, _, function = target.partition(":")
        source = (ROOT / (module.removeprefix("amk.").replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert re.search(rf"^(def {function}\(|{function} = )", source, re.MULTILINE), target


@pytest.fixture(scope="module")
def checkout_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkout in a folder of another name, as files alone."""
    copy = tmp_path_factory.mktemp("copy") / "renamed checkout"
    for path in tree_files(ROOT):
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return copy


@pytest.fixture(scope="module")
def wheel_names(checkout_copy: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in the wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), "."]
    ran = subprocess.run(command, cwd=checkout_copy, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    (wheel,) = folder.glob("automegakernel-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_one_top_level_package(wheel_names: set[str]) -> None:
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"amk"}


def test_wheel_holds_every_source_that_the_packages_need(wheel_names: set[str]) -> None:
    folders = tuple(f"{layer}/" for layer in RANK if (ROOT / layer).is_dir()) + ("schemas/",)
    ours = {path.relative_to(ROOT).as_posix() for path in tree_files(ROOT)}
    needed = {f"amk/{name}" for name in ours if name.startswith(folders) or ("/" not in name and name.endswith(".py"))}
    assert needed - wheel_names == set()


def test_wheel_leaves_out_tests_and_development_tools(wheel_names: set[str]) -> None:
    assert [name for name in wheel_names if name.startswith(("amk/tests/", "amk/dev/", "amk/results/", "amk/workspace/"))] == []


def isolated(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run python in `folder` with none of this run's paths."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


def test_a_checkout_of_any_name_runs_without_being_installed(checkout_copy: Path, tmp_path: Path) -> None:
    """Its own modules are found, from any folder, and so are those of the processes that it starts; the bare names are not."""
    probe = "import amk.isa.abi as a, subprocess, sys; print(a.__file__, flush=True); from importlib.util import find_spec as f"
    child = "; subprocess.run([sys.executable, '-c', 'import amk.isa.abi as a; print(a.__file__)']); print(f('isa'))"
    (tmp_path / "probe_module.py").write_text(probe + child, encoding="utf-8")
    starter = f"import sys; sys.path.insert(0, {str(checkout_copy)!r}); import amk_bootstrap; amk_bootstrap.main(['probe_module'])"
    ran = isolated(tmp_path, "-c", starter)
    own = str(checkout_copy / "isa" / "abi.py")
    assert ran.stdout.splitlines() == [own, own, "None"], ran.stderr


def test_command_line_runs_as_a_script_of_a_checkout(checkout_copy: Path, tmp_path: Path) -> None:
    ran = isolated(tmp_path, str(checkout_copy / "amk_cli.py"), "--help")
    assert ran.returncode == 0, ran.stderr
    assert "eval" in ran.stdout


def machine_paths(text: str) -> list[str]:
    """Absolute paths that exist on somebody's machine only."""
    return re.findall(r"(?<![\w.~>/-])/(?:work|root|home|opt|Users|mnt)/\w[\w./-]*", text)


def test_machine_paths_are_recognised() -> None:
    root = "/"
    assert machine_paths(f"see {root}home/ann/amk and `{root}opt/x`") == [f"{root}home/ann/amk", f"{root}opt/x"]
    assert machine_paths("docs/home/x.md, https://example.org/work/x, a/opt/b") == []


def test_no_file_names_a_path_of_one_machine() -> None:
    named: dict[str, list[str]] = {}
    for path in tree_files(ROOT):
        try:
            found = machine_paths(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if found:
            named[path.relative_to(ROOT).as_posix()] = found
    assert named == {}
