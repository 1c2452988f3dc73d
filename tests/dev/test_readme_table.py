"""README's table has what the results files have, and says so where there are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from amk.dev.generate import GENERATED
from amk.dev.readme_table import BEGIN, END, NOTHING, table, with_table
from amk.dev.table import EARLIER
from amk.dev.version import present_digest
from amk.tests.dev.results_file import CHAIN, results, row

README = f"before\n{BEGIN}\n{END}\nafter\n"


def folder(tmp_path: Path, **files: dict[str, Any]) -> Path:
    for name, data in files.items():
        (tmp_path / f"{name.replace('_', '-')}.json").write_text(json.dumps(data), encoding="utf-8")
    return tmp_path


def test_without_a_results_file_nothing_is_measured_yet(tmp_path: Path) -> None:
    other = folder(tmp_path, gpu_tests={"tests": {}}, soundness={})
    assert table(other) == NOTHING
    assert table(tmp_path / "nowhere") == NOTHING


def test_a_table_names_where_its_figures_come_from(tmp_path: Path) -> None:
    origin = table(folder(tmp_path, bench_h200=results(row()))).splitlines()[-1]
    facts = (
        "results/bench-h200.json",
        "NVIDIA H200",
        "580.1",
        "1980 MHz",
        "3201 MHz",
        "4561 to 4571 GB/s (data sheet: 4800)",
        "`0123456789ab` with",
        "3 fresh",
    )
    assert [fact for fact in facts if fact not in origin] == []


def test_a_line_has_time_share_and_ratio_to_each_baseline(tmp_path: Path) -> None:
    lines = table(folder(tmp_path, bench_h200=results(row(16), row(128, 750.0, spread_pct=1.25), row(64, config="unroll=8"))))
    assert "| llama-3.2-1b-shape | 16 | 600.0\\* | 90.1 % | 2400.0 (4.00x) | failed | 1 |" in lines
    assert "| llama-3.2-1b-shape | 128 | 750.0\\* (spread 1.2 %) | 72.1 % | 3000.0 (4.00x) | failed | 1 |" in lines
    assert "| 64 |" not in lines


def test_lines_of_a_run_without_baselines_say_not_measured(tmp_path: Path) -> None:
    old = {key: value for key, value in row().items() if key != "baselines"}
    assert "| 600.0\\* | 90.1 % | not measured | not measured | 1 |" in table(folder(tmp_path, bench_h200=results(old)))


def b200(*rows: dict[str, Any]) -> dict[str, Any]:
    data = results(*rows)
    data["provenance"]["cards"][0]["name"] = data["device_name"] = "NVIDIA B200"
    return data


def test_every_card_has_a_table_and_every_file_is_named(tmp_path: Path) -> None:
    files = {"bench_h200": results(row(16)), "bench_h200_again": results(row(1024)), "bench_b200": b200(row(128))}
    text = table(folder(tmp_path, **files))
    assert text.count("| model |") == 2
    assert [text.count(f"[`results/{name.replace('_', '-')}.json`]") for name in files] == [1, 1, 1]


def present(**changes: Any) -> dict[str, Any]:
    """A line about the program and kernel of the code at hand."""
    return row(128, **changes) | {"code_sha256": present_digest("llama-3.2-1b-shape", "h200", 9216)}


def test_a_figure_of_earlier_code_says_so(tmp_path: Path) -> None:
    earlier = table(folder(tmp_path, bench_h200=results(row(128))))
    assert "600.0\\* |" in earlier and EARLIER in earlier
    now = table(folder(tmp_path, bench_h200=results(present())))
    assert "| 600.0 |" in now and EARLIER not in now
    other = table(folder(tmp_path, bench_h200=results(present() | {"context": 4096})))
    assert "600.0\\* |" in other


def test_of_two_files_with_one_line_the_present_code_stands_then_more_processes_then_the_newest(tmp_path: Path) -> None:
    one, late = results(present(latency_us=610.0)) | {"processes": 1}, results(present(latency_us=620.0))
    late["provenance"]["time_utc"] = "2026-02-02T03:04:05Z"
    files = {"bench_h200": results(row(128, 600.0)), "bench_h200_b": one}
    assert "| 610.0 |" in table(folder(tmp_path, **files))
    assert "| 630.0 |" in table(folder(tmp_path, **files, bench_h200_c=results(present(latency_us=630.0))))
    assert "| 620.0 |" in table(folder(tmp_path, bench_h200_d=late))


def test_a_baseline_measured_apart_stands_beside_with_its_own_file(tmp_path: Path) -> None:
    apart = results(present(latency_us=650.0)) | {"processes": 1}
    text = table(folder(tmp_path, bench_h200=results(present(baselines=[])), bench_h200_graph=apart))
    assert "| 600.0 | 90.1 % | 2600.0 (4.00x) | failed | 2, 1 |" in text or "| 600.0 | 90.1 % | 2600.0 (4.00x) | failed | 1, 2 |" in text


def quality(**changes: Any) -> dict[str, Any]:
    line = {"model": "smollm2-135m@int8", "layers": "int8", "perplexity": 20.5, "correct": True, "kl_mean": 0.0021, "same_top1": 0.97}
    bf16 = {"model": "smollm2-135m", "layers": "bf16", "perplexity": 20.0, "correct": True}
    return {
        "provenance": results()["provenance"],
        "device": "cuda",
        "text": {"tokens": 4300},
        "baseline": bf16,
        "formats": [line | changes],
    }


def test_quantised_weights_are_shown_only_beside_what_they_cost(tmp_path: Path) -> None:
    int8 = row(128, model="llama-3.2-1b-shape@int8", baselines=[])
    without = table(folder(tmp_path, bench_h200=results(row(), int8)))
    assert "int8 | 128" not in without and "withheld" in without and "int8 at 128" in without
    assert "withheld" in table(folder(tmp_path, quality=quality(correct=False)))
    assert "withheld" in table(folder(tmp_path, quality=quality() | {"device": "cpu"}))
    assert "withheld" in table(folder(tmp_path, quality=quality(model="smollm2-135m@int4")))
    assert "withheld" in table(folder(tmp_path, quality=quality() | {"text": {"tokens": 64}}))
    text = table(folder(tmp_path, quality=quality()))
    assert "| llama-3.2-1b-shape@int8 | 128 |" in text and "20.500 against 20.000 in bf16" in text and "withheld" not in text


def test_what_a_format_costs_says_where_it_comes_from_and_if_it_is_of_earlier_code(tmp_path: Path) -> None:
    int8 = present(model="llama-3.2-1b-shape@int8", baselines=[]) | {"code_sha256": present_digest("llama-3.2-1b-shape@int8", "h200", 9216)}
    folder(tmp_path, bench_h200=results(int8))
    old = table(folder(tmp_path, quality=quality()))
    assert "tokens\\* ([`results/quality.json`]" in old and EARLIER in old and "driver 580.1; commit `0123456789ab` with changes" in old
    assert "withheld" in table(folder(tmp_path, quality=quality() | {"provenance": results()["provenance"] | {"commit": "unknown"}}))

    def now(name: str) -> dict[str, Any]:
        return {"described_as": name, "context": 512, "code_sha256": present_digest(name, "h200", 512)}

    new = quality(**now("smollm2-135m@int8"))
    assert "tokens\\* (" in table(folder(tmp_path, quality=new))  # the other of the two is of earlier code still
    new["baseline"] |= now("smollm2-135m")
    text = table(folder(tmp_path, quality=new))
    assert "of smollm2-135m: perplexity" in text and "tokens ([`results/quality.json`]" in text and EARLIER not in text
    new["baseline"]["model"] = "q"
    assert "of q (described as smollm2-135m): perplexity" in table(folder(tmp_path, quality=new))


def test_the_chain_alone_stands_outside_the_table_and_is_called_no_result(tmp_path: Path) -> None:
    data = results() | {"chain": [CHAIN | {"model": "llama-3.2-1b-shape"}]}
    (said,) = [text for text in table(folder(tmp_path, bench_h200_chain=data)).splitlines() if "300.0" in text]
    assert "no result" in said and not said.startswith("|")


def test_a_readme_that_is_not_what_the_results_give_is_outdated() -> None:
    once = with_table(README, "one")
    assert once == f"before\n{BEGIN}\none\n{END}\nafter\n"
    assert with_table(once, "one") == once != with_table(once, "two")
    assert "README.md" in GENERATED


@pytest.mark.parametrize("broken", ["no markers", f"{BEGIN} only", f"{END} {BEGIN}", README + README])
def test_a_readme_without_its_markers_is_an_error(broken: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        with_table(broken, "one")
