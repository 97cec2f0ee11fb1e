"""A generation in which no step could ever be skipped says why, once."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from denoising import build, compiled, prompts
from loops import Loop
from random_tensors import draw
from torch import Tensor

from paracompile import cache_context, cache_stats

pytestmark = pytest.mark.shares_graphs

TIMES = [900.0 - 100 * number for number in range(7)]
A, B, C, D = (draw(*prompts("wan").conditioning["cond"]["encoder_hidden_states"].shape, seed=seed) for seed in range(4))


def run(texts: Sequence[Tensor], times: Sequence[float] = TIMES, model: Any = None) -> Any:
    model = compiled(build("wan")) if model is None else model
    Loop(model)([[text] for text in texts], times)
    return model


def test_a_conditioning_that_changes_now_and_then() -> None:
    texts = [A, B, B, C, C, D, D]
    with pytest.warns(
        UserWarning,
        match=r"no step of this generation could be skipped. slot 'call 1': .*encoder_hidden_states.* in some",
    ):
        model = run(texts)
    stats = cache_stats(model)
    assert stats.hits == 0
    assert {name: len(steps) for name, steps in stats.slots.items()} == {"call 1": 7}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(texts, model=model)  # said once


def test_a_name_is_above_it() -> None:
    with warnings.catch_warnings(), cache_context("cond"):
        warnings.simplefilter("error")
        model = run([A, B, B, C, C, D, D])
    assert cache_stats(model).hits == 6


def test_what_is_not_finite() -> None:
    with pytest.warns(UserWarning, match="what its blocks add is not finite"):
        run([A * torch.nan] * 7)


@pytest.mark.parametrize("texts", [[A] * 7, [A, B, C, D, A, B, C], [A] * 3], ids=["same", "always another", "short"])
def test_nothing_is_said_where_steps_could_be_skipped_or_are_few(texts: Sequence[Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(texts, TIMES[: len(texts)])
