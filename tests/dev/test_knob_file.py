"""Parts of knob effects become one file where they belong together, and are refused where they do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import amk.dev.knob_file
from amk.dev.knob_file import Keeper, Unlike, merged, parts_at, with_earlier
from amk.dev.knob_page import page
from amk.dev.provenance import write_json
from amk.dev.subject import Subject
from amk.dev.version import config_digest
from amk.schedule.config import parse_config
from amk.schedule.knobs import Config
from amk.tests.dev.results_file import effect, effects
from amk.tests.dev.test_readme_table import folder

ONE_B = "llama-3.2-1b-shape"
OF_ONE, OF_EIGHT = Subject(ONE_B), Subject(ONE_B, 8)
SYNC = "kernel_knobs.sync"
Part = dict[str, Any]


def part(*rows: dict[str, Any], commit: str = "0123456789abcdef", utc: str = "2026-01-02T03:04:05Z") -> Part:
    data = deepcopy(effects(*rows))
    data["provenance"] |= {"commit": commit, "time_utc": utc}
    return data


def two_parts() -> dict[str, Part]:
    slow = {
        "default_us": 610.0,
        "copies_samples_us": [[610.0] * 5] * 2,
        "effect_pct": 0.0,
        "beyond_noise": False,
    }
    return {
        "a.h200.json": part(effect("kernel_knobs.sync", '"tags"', 630.0)),
        "b.h200.json": part(effect("threads_per_block", "128", 610.0, **slow), utc="2026-01-03T03:04:05Z"),
    }


def test_a_ratio_stays_over_the_default_of_its_own_part(tmp_path: Path) -> None:
    whole = merged(two_parts())
    assert [(row["knob"], row["part"], row["default_us"]) for row in whole["rows"]] == [
        ("threads_per_block", "b.h200.json", 610.0),
        ("kernel_knobs.sync", "a.h200.json", 600.0),
    ]
    assert whole["provenance"]["time_utc"] == "2026-01-03T03:04:05Z" and len(whole["provenance"]["cards"]) == 2
    assert len(whole["plain_read_gbs"]) == 4 and len(whole["defaults"]) == 1
    text = page(folder(tmp_path, knob_effects_h200=whole))
    assert "630.0 us, **1.050** ± 0.005 of 600.0" in text and "610.0 us, 1.000 ± 0.005 of 610.0" in text
    assert "Measured in 2 parts" in text


def test_parts_of_one_name_in_two_folders_are_both_there(tmp_path: Path) -> None:
    paths = []
    for part_of, data in zip(("one", "two"), two_parts().values(), strict=True):
        paths.append(tmp_path / part_of / "part.h200.json")
        write_json(paths[-1], dict(data))
    rows = merged(parts_at(paths))["rows"]
    assert [row["part"] for row in rows] == ["two/part.h200.json", "one/part.h200.json"]
    with pytest.raises(Unlike, match=r"part\.h200\.json: must be named once"):
        parts_at([paths[0], tmp_path / "two" / ".." / "one" / "part.h200.json"])


@pytest.mark.parametrize("text", ["", '{"rows": [', "[]", "null", '"rows"', "7", "{}", '{"provenance": {}, "rows": []}', "\udcff"])
def test_a_file_that_is_no_part_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cut.h200.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=r"cut\.h200\.json: "):
        parts_at([path])


@pytest.mark.parametrize(("key", "value"), [("rows", None), ("rows", [7]), ("defaults", {}), ("provenance", 7), ("plain_read_gbs", "fast")])
def test_a_file_of_another_form_is_no_part(tmp_path: Path, key: str, value: object) -> None:
    path = tmp_path / "other.h200.json"
    write_json(path, part(effect("kernel_knobs.sync", '"tags"', 630.0)) | {key: value})
    with pytest.raises(ValueError, match=rf"other\.h200\.json: .*{key}"):
        parts_at([path])


def config_of(obj: dict[str, Any]) -> Config:
    config = parse_config(obj)
    assert isinstance(config, Config)
    return config


def other_commit(data: Part) -> None:
    data["provenance"]["commit"] = "fedcba"


def other_driver(data: Part) -> None:
    data["provenance"]["cards"][0]["driver_version"] = "999.9"


def other_card(data: Part) -> None:
    data["provenance"]["cards"][0]["name"] = data["device_name"] = "NVIDIA H200 NVL"


def other_default(data: Part) -> None:
    data["defaults"][0]["binary_digest"] = "another"


def other_bits(data: Part) -> None:
    data["defaults"][0]["outputs_sha256"] = "other bits"


def no_default(data: Part) -> None:
    data["defaults"] = []


def unknown_knob(data: Part) -> None:
    data["rows"][0]["knob"] = "kernel_knobs.nothing"


def same_knob(data: Part) -> None:
    data["rows"][0] |= {"knob": "kernel_knobs.sync"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_commit, "commit: must be the same"),
        (other_driver, "driver: must be the same"),
        (other_card, "cards and driver: must be the same"),
        (other_default, "binary_digest"),
        (other_bits, "outputs_sha256"),
        (no_default, "must have the default of llama-3.2-1b-shape"),
        (unknown_knob, "kernel_knobs.nothing"),
        (same_knob, "must be in one part"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(spoil: Callable[[Part], None], words: str) -> None:
    parts = two_parts()
    spoil(parts["b.h200.json"])
    with pytest.raises(ValueError, match=words):
        merged(parts)


def test_parts_of_two_commits_whose_programs_and_kernels_are_those_of_the_code_at_hand_become_one_file(tmp_path: Path) -> None:
    parts = two_parts()
    other_commit(parts["a.h200.json"])
    for data, config in (("a.h200.json", {"kernel_knobs": {"sync": "tags"}}), ("b.h200.json", {"threads_per_block": 128})):
        row = parts[data]["rows"][0]
        row["model"], default = "toy", parts[data]["defaults"][0]
        default |= {"model": "toy", "context": 512}
        row["code_sha256"] = config_digest("toy", config_of(config), "h200", 512)
    whole = merged(parts)
    assert whole["provenance"]["commit"] == "0123456789abcdef" and whole["parts"]["a.h200.json"]["commit"] == "fedcba"
    assert "at `fedcba` too, whose programs and kernels are the same" in page(folder(tmp_path, knob_effects_h200=whole))
    for others in (parts["b.h200.json"]["rows"][0]["code_sha256"], "", None):
        parts["a.h200.json"]["rows"][0]["code_sha256"] = others
        with pytest.raises(Unlike, match=r'kernel_knobs\.sync="tags" of toy in a\.h200\.json has others'):
            merged(parts)


@pytest.mark.parametrize(("value", "is_the_same"), [("4", True), ("1", False)])
def test_a_line_with_another_values_program_is_taken_from_another_commit_if_it_still_is_the_same(value: str, is_the_same: bool) -> None:
    same = {"model": "toy", "knob": "kernel_knobs.kv_splits", "value": value, "latency_us": None, "same_program_as": "0"}
    parts = {"a.h200.json": part(same), "b.h200.json": part(commit="fedcba")}
    for data in parts.values():
        data["defaults"][0] |= {"model": "toy", "context": 512}
    if is_the_same:
        assert [row["value"] for row in merged(parts)["rows"]] == [value]
    else:
        with pytest.raises(Unlike, match=r"kv_splits=1 of toy in a\.h200\.json has others"):
            merged(parts)


@pytest.mark.parametrize("commit", ["0123456789abcdef+changes"])
def test_parts_of_changed_code_are_refused(commit: str) -> None:
    with pytest.raises(Unlike, match="without changes"):
        merged({"a.h200.json": part(effect("kernel_knobs.sync", '"tags"', 630.0), commit=commit)})


def before() -> Part:
    """A file of an earlier commit with a knob that `two_parts` have, one that they lack, and one that was taken from another commit."""
    rows = [effect("threads_per_block", "128", 650.0), effect("pipelining_depth", "2", 640.0, part="old.json")]
    rows.append(effect("sm_assignment", '"round_robin"', 660.0, earlier="0ff1ce"))
    return part(*rows, commit="fedcba") | {"parts": {"old.json": {"commit": "abcdef", "plain_read_gbs": []}}}


def test_knobs_that_no_part_has_are_kept_from_a_file_of_earlier_code_and_marked(tmp_path: Path) -> None:
    whole = with_earlier(merged(two_parts()), "old.h200.json", before())
    commits = {row["knob"]: row.get("earlier") for row in whole["rows"]}
    assert commits == {"threads_per_block": None, "kernel_knobs.sync": None, "pipelining_depth": "abcdef", "sm_assignment": "0ff1ce"}
    text = page(folder(tmp_path, knob_effects_h200=whole))
    assert "640.0 us, **1.067** ± 0.005 of 600.0\\* |" in text and "650.0 us" not in text
    assert text.count("or its kernel: `0ff1ce`, `abcdef`.") == 2  # beneath each table


def test_a_file_with_lines_of_earlier_code_is_gone_on_with() -> None:
    whole = with_earlier(merged(two_parts()), "old.h200.json", before())
    more = part(effect("pipelining_depth", "2", 630.0))
    again = with_earlier(merged({"whole.h200.json": whole, "more.h200.json": more}), "whole.h200.json", whole)
    assert {row["knob"]: (row["latency_us"], row.get("earlier")) for row in again["rows"]} == {
        "threads_per_block": (610.0, None),
        "kernel_knobs.sync": (630.0, None),
        "pipelining_depth": (630.0, None),
        "sm_assignment": (660.0, "0ff1ce"),
    }


def test_nothing_is_kept_where_the_parts_have_all() -> None:
    whole = merged(two_parts())
    assert with_earlier(whole, "old.h200.json", two_parts()["a.h200.json"]) == whole


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (other_driver, "cards and driver: must be the same"),
        (no_default, "must have the default"),
        (lambda data: data["provenance"].update(commit="fedcba+changes") or data["parts"].clear(), "without changes"),
        (lambda data: data["rows"][1].update(latency_us=1.0), "under the floor"),
    ],
)
def test_a_file_of_earlier_code_that_does_not_belong_to_the_parts_is_refused(spoil: Callable[[Part], None], words: str) -> None:
    data = before()
    spoil(data)
    with pytest.raises(ValueError, match=words):
        with_earlier(merged(two_parts()), "old.h200.json", data)


def of_eight(data: Part) -> Part:
    """The part, as of a batch of eight; a batch's default has other output bits than one sequence's."""
    lines = {key: [row | {"batch": 8} for row in data[key]] for key in ("defaults", "rows")}
    return data | lines | {"defaults": [row | {"outputs_sha256": "of eight"} for row in lines["defaults"]]}


def test_a_batch_is_not_its_model(tmp_path: Path) -> None:
    """It has a default and lines of its own, in one part or two, and a column of its own."""
    one, eight = part(effect(SYNC, '"tags"', 630.0)), of_eight(part(effect(SYNC, '"tags"', 660.0)))
    whole = merged({"a.h200.json": one, "b.h200.json": eight})
    assert [row.get("batch", 1) for row in whole["rows"]] == [1, 8] and len(whole["defaults"]) == 2
    text = page(folder(tmp_path, knob_effects_h200=whole))
    line = next(line for line in text.splitlines() if line.startswith(f'| `{SYNC}` | `"tags"` |'))
    assert "| 630.0 us, **1.050**" in line and "| 660.0 us, **1.100**" in line and f"| {OF_EIGHT} |" in text
    with pytest.raises(Unlike, match=f"{SYNC} of {OF_EIGHT}: must be in one part"):
        merged({"a.h200.json": eight, "b.h200.json": of_eight(part(effect(SYNC, '"tags"', 650.0)))})
    with pytest.raises(Unlike, match=f"must have the default of {OF_EIGHT}"):
        merged({"a.h200.json": eight | {"defaults": one["defaults"]}})
    assert [row.get("batch", 1) for row in with_earlier(merged({"a.h200.json": one}), "old.h200.json", eight)["rows"]] == [1, 8]


def test_a_run_keeps_a_batch_beside_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came = part()["provenance"]
    monkeypatch.setattr(amk.dev.knob_file, "provenance", lambda: came)
    monkeypatch.setattr(amk.dev.knob_file, "write_results", lambda path, data: write_json(path, {"provenance": came, **data}))
    keeper = Keeper(tmp_path / "a.h200.json")
    for subject, data in ((OF_ONE, part(effect(SYNC, '"tags"', 630.0))), (OF_EIGHT, of_eight(part(effect(SYNC, '"tags"', 660.0))))):
        assert not keeper.has(subject, SYNC, ['"tags"'])
        keeper.begin(data["defaults"][0], 4600.0)
        keeper.take(subject, SYNC, data["rows"])
    assert (
        len(keeper.found) == len(keeper.defaults) == 2 and keeper.has(OF_ONE, SYNC, ['"tags"']) and keeper.has(OF_EIGHT, SYNC, ['"tags"'])
    )


def test_a_line_of_a_batch_is_held_to_the_program_of_the_batch() -> None:
    """Where parts are of two commits each line's program and kernel must be those of the code at hand."""
    card, context = "h200", effects()["defaults"][0]["context"]
    tags = parse_config({"kernel_knobs": {"sync": "tags"}})
    assert isinstance(tags, Config)
    other = part(effect("threads_per_block", "128", 620.0) | {"code_sha256": "?"}, commit="fedcba")
    for batch, digest in ((8, config_digest(ONE_B, tags, card, context, 8)), (1, config_digest(ONE_B, tags, card, context))):
        line = effect(SYNC, '"tags"', 660.0) | {"code_sha256": digest}
        with pytest.raises(Unlike, match=f"{SYNC}=.* of {OF_EIGHT} in" if batch == 1 else "threads_per_block=128 of llama-3.2-1b-shape in"):
            merged({"a.h200.json": of_eight(part(line)), "b.h200.json": other})


def test_a_value_that_is_refused_is_held_to_be_refused_by_the_code_at_hand() -> None:
    """Of two commits: a batch has no program without gate_up fused; one token has."""
    refused = {"knob": "fusion_grouping", "value": '["norm", "qkv"]', "latency_us": None, "reason": "fusion_grouping: must be ..."}
    of_one, of_batch = (part(refused | {"model": ONE_B, "batch": batch}, commit="fedcba") for batch in (1, 8))
    tags = parse_config({"kernel_knobs": {"sync": "tags"}})
    assert isinstance(tags, Config)
    digest = config_digest(ONE_B, tags, "h200", effects()["defaults"][0]["context"])
    other = part(effect(SYNC, '"tags"', 630.0) | {"code_sha256": digest})
    of_batch["defaults"] = of_eight(of_batch)["defaults"]
    assert len(merged({"a.h200.json": of_batch, "b.h200.json": other})["rows"]) == 2
    with pytest.raises(Unlike, match="fusion_grouping="):
        merged({"a.h200.json": of_one, "b.h200.json": other})


def test_no_parts_are_refused() -> None:
    with pytest.raises(Unlike, match="at least one"):
        merged({})


def test_a_run_that_was_cut_keeps_what_it_found_and_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each knob the file is whole; a process of the same commit and card begins with it, one of another commit without it."""
    came = part()["provenance"]
    monkeypatch.setattr(amk.dev.knob_file, "provenance", lambda: came)
    monkeypatch.setattr(amk.dev.knob_file, "write_results", lambda path, data: write_json(path, {"provenance": came, **data}))
    path = tmp_path / "a.h200.json"
    first = Keeper(path)
    first.begin(effects()["defaults"][0], 4600.0)
    first.take(OF_ONE, SYNC, [effect(SYNC, '"tags"', 630.0)])
    second = Keeper(path)
    assert second.has(OF_ONE, SYNC, ['"tags"']) and not second.has(OF_ONE, SYNC, ['"tags"', '"none"'])
    assert not second.has(Subject("smollm2-135m-shape"), SYNC, ['"tags"']) and not second.has(OF_ONE, "threads_per_block", ["128"])
    second.begin(effects()["defaults"][0], 4610.0)
    second.take(OF_ONE, "threads_per_block", [effect("threads_per_block", "128", 620.0)])
    second.take(OF_ONE, SYNC, [effect(SYNC, '"tags"', 640.0)])
    held = json.loads(path.read_text(encoding="utf-8"))
    assert [(row["knob"], row["latency_us"]) for row in held["rows"]] == [("threads_per_block", 620.0), ("kernel_knobs.sync", 640.0)]
    assert held["plain_read_gbs"] == [4600.0, 4610.0] and len(held["defaults"]) == 1
    came = came | {"commit": "fedcba"}
    assert Keeper(path).found == []


@pytest.mark.parametrize("text", ["[]", '{"rows": []}', '{"provenance": {}}', '{"provenance": 7, "rows": []}'])
def test_a_run_begins_anew_beside_a_file_of_another_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(amk.dev.knob_file, "provenance", lambda: part()["provenance"])
    path = tmp_path / "a.h200.json"
    path.write_text(text, encoding="utf-8")
    assert Keeper(path).found == []
