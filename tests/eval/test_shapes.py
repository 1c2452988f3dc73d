"""The schemas of results: what the harness really returns satisfies them, and a field that is gone does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

from amk import harness
from amk.eval.shapes import SHAPES, result_schema
from amk.tests.eval.recordings import traced


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One result of every verb, as its user reads it."""
    folder = tmp_path_factory.mktemp("workspace")
    cpu: dict[str, Any] = {"device": "cpu"}
    made = {
        "verdict": harness.evaluate("toy", "h200", **cpu),
        "propose": harness.propose("toy", "h200"),
        "loop": harness.loop("toy", "h200", 2, results_path=folder / "results.tsv", corpus_path=folder / "corpus.jsonl", **cpu),
        "generate": harness.generate("toy", "h200", prompt_ids=[1, 2], max_tokens=3, verify=True, **cpu),
        "trace": {"model": "toy", "gpu": "h200", "device": "cuda", **traced("toy")},
        "bench": harness.bench("toy", "h200", positions=[3, 1000], **cpu),
    }
    read: dict[str, Any] = json.loads(json.dumps(made, allow_nan=False))
    return read


@pytest.mark.parametrize("name", SHAPES)
def test_what_the_harness_returns_satisfies_its_schema(name: str, results: dict[str, Any]) -> None:
    Draft202012Validator.check_schema(result_schema(name))
    Draft202012Validator(result_schema(name)).validate(results[name])


@pytest.mark.parametrize("name", SHAPES)
def test_a_result_without_one_of_its_fields_breaks_its_schema(name: str, results: dict[str, Any]) -> None:
    validator = Draft202012Validator(result_schema(name))
    for field in result_schema(name)["required"]:
        with pytest.raises(ValidationError):
            validator.validate({key: value for key, value in results[name].items() if key != field})


def test_rows_of_a_loop_are_verdicts_with_their_trial(results: dict[str, Any], tmp_path: Path) -> None:
    for row in results["loop"]["rows"]:
        Draft202012Validator(result_schema("verdict")).validate(row)
        assert {"trial", "source", "tag", "trial_id"} <= set(row)


def test_a_rejection_satisfies_the_schema_of_verdicts() -> None:
    verdict = harness.evaluate("toy", "h200", {"nonsense": 1}, "cpu")
    Draft202012Validator(result_schema("verdict")).validate(json.loads(json.dumps(verdict)))
