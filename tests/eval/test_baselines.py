"""Baselines: a right one is admitted, a wrong one refused with its reason, and what does not build is a result."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from amk.eval.baselines import REASON_CHARACTERS, Builder, Missing, Rival, admitted, all_missing, attempt, reason_of
from amk.eval.tracks import CHECK_STEPS, Step, Track, make_tracks
from amk.models.registry import resolve
from amk.models.static_decoder import Attention, StaticDecoder

SPAN = (20, 64)
Wrong = Callable[[StaticDecoder], Step]


@cache
def tracked(name: str) -> tuple[Any, Any, Track]:
    """A model, the source model in its dtype, and the track of SPAN."""
    model = resolve(name)
    native = model.eager(model.spec.dtype, "cpu")
    return model, native, make_tracks(model.eager("fp32", "cpu"), native, [(3, 2), SPAN])[SPAN[0]]


def entered(name: str, attention: Attention, wrong: Wrong | None = None) -> Rival | Missing:
    model, native, track = tracked(name)
    decoder = StaticDecoder(model.spec, native, 128, attention)
    entrant = admitted("cuda-graph", "form", decoder, wrong(decoder) if wrong else decoder.step, track)
    native.set_attn_implementation("eager")
    return entrant


def after(change: Callable[[StaticDecoder], Any]) -> Wrong:
    """A step that is followed by a change of the decoder's state."""

    def make(decoder: StaticDecoder) -> Step:
        def step() -> torch.Tensor:
            logits = decoder.step()
            change(decoder)
            return logits

        return step

    return make


def before(change: Callable[[StaticDecoder], Any]) -> Wrong:
    """A step that a change of the decoder's state comes before."""

    def make(decoder: StaticDecoder) -> Step:
        def step() -> torch.Tensor:
            change(decoder)
            return decoder.step()

        return step

    return make


def noisy(decoder: StaticDecoder) -> Step:
    def step() -> torch.Tensor:
        logits = decoder.step()
        return logits + 0.05 * logits.std() * torch.randn_like(logits)

    return step


def forget_last_row(decoder: StaticDecoder) -> None:
    """The row before the current position is lost."""
    for layer in decoder._cache.layers:
        layer.values[0, :, int(decoder.position) - 1] = 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["toy", "toy-2L", "small"])
def test_the_static_decoder_agrees_with_the_source_model(name: str, attention: Attention) -> None:
    entrant = entered(name, attention)
    assert isinstance(entrant, Rival), entrant
    assert entrant.agreement.rel_err <= 1.5 * entrant.agreement.expected


WRONG: dict[str, Wrong] = {
    "position stands still": after(lambda d: d.position.sub_(1)),
    "position jumps": before(lambda d: d.position.add_(5)),
    "token is not handed on": after(lambda d: d.token.fill_(1)),
    "token is not read": before(lambda d: d.token.fill_(1)),
    "mask is shifted": before(lambda d: d._columns.copy_(torch.arange(d.rows) + 1)),
    "mask is open": before(lambda d: d._closed.zero_()),
    "a row is lost": before(forget_last_row),
    "logits are noisy": noisy,
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("model", ["toy", "small"])
def test_a_wrong_baseline_is_refused(model: str, name: str) -> None:
    entrant = entered(model, "sdpa", WRONG[name])
    assert isinstance(entrant, Missing) and entrant.status == "refused"
    assert "must" in entrant.reason and "but" in entrant.reason


def plain(decoder: StaticDecoder, start: int) -> tuple[Step, str]:
    return decoder.step, "plain"


def out_of_memory(decoder: StaticDecoder, start: int) -> tuple[Step, str]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation")


@pytest.mark.parametrize("build", [plain, out_of_memory])
def test_what_goes_wrong_in_a_build_is_the_baselines_result(build: Builder) -> None:
    model, native, track = tracked("toy")
    entrant = attempt("torch-compile", build, model.spec, native, "eager", SPAN, track)
    if build is plain:
        assert isinstance(entrant, Rival) and entrant.form == "plain, eager attention over a static cache of 128 rows"
    else:
        assert isinstance(entrant, Missing) and entrant.status == "failed"
        assert entrant.reason == "eager attention: OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def test_a_track_never_leaves_its_span() -> None:
    model = resolve("toy")
    native = model.eager("fp32", "cpu")
    tracks = make_tracks(native, native, [(3, 2), (4, 64)])
    assert [(t.start, len(t.tokens), len(t.logits)) for t in tracks.values()] == [(3, 2, 2), (4, CHECK_STEPS, CHECK_STEPS)]
    assert tracks[3].kv(0)[0].shape[1] == 3


def test_attempts_without_a_time_become_one_reason() -> None:
    failed, refused = Missing("x", "failed", "a broke"), Missing("x", "refused", "b is wrong")
    assert all_missing("x", [failed, failed]).status == "failed"
    both = all_missing("x", [failed, refused])
    assert (both.status, both.reason) == ("refused", "a broke; b is wrong")


@pytest.mark.parametrize("message", ["", "one line", "first\nsecond", "x" * 1000])
def test_a_reason_is_one_short_line(message: str) -> None:
    reason = reason_of(RuntimeError(message))
    assert reason.startswith("RuntimeError") and "\n" not in reason and len(reason) <= REASON_CHARACTERS
