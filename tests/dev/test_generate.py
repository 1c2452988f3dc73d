"""Generated files are exactly what the code renders."""

from __future__ import annotations

from pathlib import Path

from amk.dev.generate import GENERATED, ROOT, outdated, write


def render_table() -> str:
    return "one line\n"


TABLE = {"schemas/a.json": render_table, "docs/knobs.md": render_table}


def test_generated_files_of_the_checkout_are_unchanged() -> None:
    assert outdated(ROOT, GENERATED) == []


def test_written_files_are_up_to_date(tmp_path: Path) -> None:
    write(tmp_path, TABLE)
    assert outdated(tmp_path, TABLE) == []


def test_missing_changed_and_orphaned_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, TABLE)
    (tmp_path / "schemas/a.json").write_text("another line\n", encoding="utf-8")
    (tmp_path / "docs/knobs.md").unlink()
    (tmp_path / "schemas/old.json").write_text("{}\n", encoding="utf-8")
    found = outdated(tmp_path, TABLE)
    assert [sentence.split()[0] for sentence in found] == ["schemas/a.json", "docs/knobs.md", "schemas/old.json"]
    assert "render_table" in found[0]
