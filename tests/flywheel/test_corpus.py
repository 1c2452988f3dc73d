"""The corpus: only measured and correct points, with everything that is known about them."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from amk.flywheel.corpus import FIELDS, append_record, check_records, read_records, record_of
from amk.tests.flywheel.examples import provenance, record, refused, verdict

PROMISED = """model shape gpu device_name dtype regime correctness latency_us latency_kind samples bound_us pct_of_roofline schedule
effective program_digest binary_digest positions ir_version abi_version eval_version commit driver clocks ts notes""".split()


def write_many(path: Path, writer: int) -> None:
    for number in range(20):
        append_record(path, record() | {"notes": [f"{writer}-{number}", "x" * 5000]})


def test_fields_are_those_promised() -> None:
    assert list(FIELDS) == PROMISED == list(record())


def test_processes_that_append_at_the_same_time_lose_and_tear_nothing(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    writers = [multiprocessing.get_context("fork").Process(target=write_many, args=(path, writer)) for writer in range(4)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
    assert sorted(r["notes"][0] for r in read_records([path])) == sorted(f"{w}-{n}" for w in range(4) for n in range(20))


def test_several_corpora_are_read_as_one_without_doubles(tmp_path: Path) -> None:
    append_record(tmp_path / "a", record())
    append_record(tmp_path / "b", record())
    append_record(tmp_path / "b", record(90.0))
    assert read_records([tmp_path / "a", tmp_path / "b", tmp_path / "none"]) == [record(), record(90.0)]


def test_a_torn_record_is_left_out_and_any_other_bad_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    append_record(path, record())
    line = path.read_bytes()
    path.write_bytes(line + line[: len(line) // 2])
    assert read_records([path]) == [record()]
    append_record(path, record(90.0))
    assert read_records([path]) == [record(), record(90.0)]
    path.write_bytes(line + b"[1]\n" + line)
    with pytest.raises(ValueError, match="line 2 must be a corpus record"):
        read_records([path])


def test_a_record_torn_anywhere_makes_room_for_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    append_record(path, record())
    line = path.read_bytes()
    for before in (b"", line):
        for cut in (*range(20), len(line) // 2, len(line) - 2):
            path.write_bytes(before + line[:cut])
            append_record(path, record(90.0))
            assert read_records([path]) == [*([record()] if before else []), record(90.0)]


@pytest.mark.parametrize("text", ["my notes", '{"my": "notes"}', "[1]\n", "{}\nmy notes", "\n", '{"model": 1', "[" * 100_000, '{"my'])
def test_somebody_elses_file_is_refused_and_untouched(tmp_path: Path, text: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(text, encoding="utf-8")
    for use in (lambda: append_record(path, record()), lambda: check_records(path)):
        with pytest.raises(ValueError, match="must hold corpus records, but"):
            use()
    assert path.read_text(encoding="utf-8") == text


def test_a_line_of_somebody_elses_after_records_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    append_record(path, record())
    path.write_bytes(found := path.read_bytes() + b"# to do: measure again")
    with pytest.raises(ValueError, match="# to do"):
        append_record(path, record())
    assert path.read_bytes() == found


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"correctness": "FAIL"}, "correctness must be PASS"),
        ({"correctness": True}, "correctness must be PASS"),
        ({"latency_kind": "predicted"}, "latency_kind must be measured-gpu"),
        ({"latency_kind": None}, "latency_kind must be measured-gpu"),
        ({"latency_us": None}, "must be positive numbers"),
        ({"latency_us": float("nan")}, "must be positive numbers"),
        ({"latency_us": "100"}, "must be positive numbers"),
        ({"latency_us": 5.0}, "must not be below the floor"),
        ({"pct_of_roofline": 99.0}, "floor over latency"),
        ({"samples": None}, "samples must be"),
        ({"samples": {"p10": 110.0, "p50": 100.0, "p90": 90.0, "n": 5}}, "samples must rise"),
        ({"samples": {"p10": 110.0, "p50": 120.0, "p90": 130.0, "n": 5}}, "must lie between p10 and p90"),
        ({"positions": []}, "positions must name"),
        ({"binary_digest": None}, "must name what ran"),
        ({"commit": ""}, "must name the card and the code"),
        ({"speed": 1}, "unknown fields speed"),
    ],
)
def test_what_is_not_measured_and_correct_is_refused(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        append_record(tmp_path / "corpus.jsonl", record() | changes)
    assert not (tmp_path / "corpus.jsonl").exists()


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_must_be_there(tmp_path: Path, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}.* missing"):
        append_record(tmp_path / "corpus.jsonl", {name: value for name, value in record().items() if name != field})


@pytest.mark.parametrize(
    "data", [refused(), verdict(None), verdict(correct=False), verdict(kind="predicted"), verdict() | {"latency_us": 1.0}]
)
def test_no_record_is_made_of_a_verdict_without_a_measured_latency(data: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        record_of(data, provenance())


def test_provenance_cannot_overrule_the_verdict() -> None:
    made = record_of(verdict(100.0), provenance() | {"latency_us": 20.0, "correctness": "FAIL", "model": "another"})
    assert made == record(100.0)
