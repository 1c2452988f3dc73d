"""Where a point comes from: the commit and whether the tree differs from it, and versions that move when their subject does."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, make_dataclass
from pathlib import Path
from typing import Any

import pytest

from amk.dev import provenance as of_results
from amk.flywheel import origin
from amk.flywheel import provenance as of_points
from amk.flywheel.corpus import FIELDS, FROM_VERDICT, record_of
from amk.flywheel.origin import commit
from amk.flywheel.provenance import abi_version, ir_version, point_provenance
from amk.isa.machine import Machine
from amk.schedule import program
from amk.tests.flywheel.examples import TS, verdict


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("AMK_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("committed")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_commit_says_whether_the_tree_differs_from_it(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    (repository / "untracked").write_text("")
    assert commit(repository) == head
    (repository / "file").write_text("changed")
    assert commit(repository) == head + "+changes"
    git(repository, "add", "file")
    assert commit(repository) == head + "+changes"


def test_an_untracked_source_beside_tracked_ones_is_a_change_and_no_other_file_is(repository: Path) -> None:
    (repository / "isa").mkdir()
    (repository / "isa" / "one.cuh").write_text("")
    (repository / ".gitignore").write_text(".venv/\nbuilt.py\n")
    git(repository, "add", ".")
    git(repository, "commit", "-q", "-m", "sources")
    head = git(repository, "rev-parse", "HEAD")
    for name in ("results.json", "isa/notes.md", "isa/built.py", ".venv/lib/site.py", "out/megakernel.cu", "shared/script.py"):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("")
    assert commit(repository) == head
    for name in ("new.py", "new.cuh", "new.cu", "mit \u00e4.py"):
        path = repository / "isa" / name
        path.write_text("")
        assert commit(repository) == head + "+changes"
        path.unlink()
    assert commit(repository) == head


def test_a_package_inside_somebody_elses_repository_claims_no_commit_of_theirs(repository: Path) -> None:
    (repository / "site-packages").mkdir()
    assert commit(repository / "site-packages") == "unknown"


def test_a_repository_without_a_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AMK_COMMIT", raising=False)
    git(tmp_path, "init", "-q")
    assert commit(tmp_path) == "unknown"


def test_a_copy_without_git_is_told_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMK_COMMIT", "c0ffee")
    assert commit(tmp_path) == "c0ffee"


def test_results_and_corpus_have_their_facts_from_one_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AMK_COMMIT", "c0ffee")
    assert of_results.provenance()["commit"] == point_provenance({}, {}, {}, "r", TS)["commit"] == "c0ffee"
    assert of_results.cards is origin.cards


def test_asking_where_results_come_from_loads_no_numpy() -> None:
    code = "import sys, amk.dev.provenance as p; p.provenance(); print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


def test_provenance_and_verdict_together_make_a_record() -> None:
    given = point_provenance({"a": 1}, {"a": 2}, {"layers": 2}, "single-stream", TS)
    record = json.loads(json.dumps(record_of(verdict(), given), allow_nan=False))
    assert set(record) == set(FIELDS) and not set(given) & set(FROM_VERDICT)
    assert (record["effective"], record["schedule"], record["ts"]) == ({"a": 1}, {"a": 2}, TS)


def test_versions_are_the_same_in_every_process() -> None:
    code = "from amk.flywheel.provenance import abi_version, ir_version; print(abi_version(), ir_version())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split() == [abi_version(), ir_version()]


def test_a_program_of_other_fields_is_another_ir_with_the_same_abi(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = abi_version(), ir_version()
    own: list[tuple[str, Any]] = [(f.name, f.type) for f in fields(program.Buffer)]
    wider = make_dataclass("Buffer", [*own, ("bank", "int")], namespace={"__module__": program.__name__})
    monkeypatch.setattr(program, "Buffer", wider)
    assert abi_version() == versions[0] and ir_version() != versions[1]


def test_a_machine_of_other_fields_is_another_ir(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ir_version()
    wider = make_dataclass("Machine", [(f.name, f.type) for f in fields(Machine)] + [("banks", "int")])
    monkeypatch.setattr(of_points, "Machine", wider)
    assert ir_version() != before


def test_cards_that_cuda_may_not_use_are_not_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr(origin, "_output", lambda command: asked.append(command) or "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    origin.cards()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    origin.cards()
    assert ["--id=2" in command for command in asked] == [True, False]
