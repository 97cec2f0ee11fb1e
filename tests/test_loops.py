"""Which call is it, where a pipeline names nothing: its place in the step tells, and the conditioning is compared."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from denoising import build, compiled, prompts, slots_of
from loops import Loop
from random_tensors import draw
from torch import Tensor, nn

from paracompile import cache_stats

pytestmark = pytest.mark.shares_graphs

TIMES = [900.0 - 100 * number for number in range(6)]
SHAPE = prompts("wan").conditioning["cond"]["encoder_hidden_states"].shape
COND, UNCOND = (draw(*SHAPE, seed=seed) for seed in range(2))
COMPUTED, SKIPPED = False, True
ALL = [COMPUTED, *[SKIPPED] * 5]


def fresh() -> nn.Module:
    return compiled(build("wan"))


def hits(model: nn.Module) -> dict[str, list[bool]]:
    return {name: [step.hit for step in steps] for name, steps in cache_stats(model).slots.items()}


def alone(texts: Sequence[Tensor | None]) -> list[Tensor]:
    """What the steps of one pass give by themselves, in the steps that have a text."""
    model = fresh()
    found = Loop(model)([[] if text is None else [text] for text in texts], TIMES)
    return [each[0] for each in found if each]


def check(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_each_pass_of_a_step_has_its_slot() -> None:
    model = fresh()
    found = Loop(model)([[COND, UNCOND]] * 6, TIMES)
    assert hits(model) == {"call 1": ALL, "call 2": ALL}
    check([each[0] for each in found], alone([COND] * 6))
    check([each[1] for each in found], alone([UNCOND] * 6))
    assert slots_of(model) == []


@pytest.mark.slow
def test_conditioning_that_is_made_anew_at_each_step() -> None:
    model = fresh()
    found = Loop(model)([[COND.clone(), UNCOND.clone()] for _ in range(6)], TIMES)
    assert hits(model) == {"call 1": ALL, "call 2": ALL}
    check([each[1] for each in found], alone([UNCOND] * 6))


def test_conditioning_that_is_another_at_each_step() -> None:
    """As a ControlNet's residuals are: from the third step on it is known."""
    texts = [draw(*SHAPE, seed=10 + number) for number in range(6)]
    model = fresh()
    Loop(model)([[text] for text in texts], TIMES)
    assert hits(model) == {"call 1": [COMPUTED, COMPUTED, *[SKIPPED] * 4]}


def test_guidance_that_begins_and_comes_first() -> None:
    """The first call of a step is then of another pass: it is seen, and only costs computed steps."""
    model = fresh()
    found = Loop(model)([[COND], [COND], *[[UNCOND, COND]] * 4], TIMES)
    assert hits(model) == {
        "call 1": [COMPUTED, SKIPPED, COMPUTED, SKIPPED, SKIPPED, SKIPPED],
        "call 2": [COMPUTED, SKIPPED, SKIPPED, SKIPPED],
    }
    check([each[0] for each in found[2:]], alone([None, None, *[UNCOND] * 4]))
    check([each[1] for each in found[2:]], alone([None, None, *[COND] * 4]))


def test_guidance_that_begins_in_the_second_step_and_comes_first() -> None:
    model = fresh()
    found = Loop(model)([[COND], *[[UNCOND, COND]] * 5], TIMES)
    assert hits(model) == {
        "call 1": [COMPUTED, COMPUTED, COMPUTED, SKIPPED, SKIPPED, SKIPPED],
        "call 2": [COMPUTED, *[SKIPPED] * 4],
    }
    check([each[1] for each in found[1:]], alone([None, *[COND] * 5]))


def test_guidance_that_ends_and_came_first() -> None:
    model = fresh()
    found = Loop(model)([*[[UNCOND, COND]] * 3, *[[COND]] * 3], TIMES)
    assert hits(model) == {
        "call 1": [COMPUTED, SKIPPED, SKIPPED, COMPUTED, SKIPPED, SKIPPED],
        "call 2": [COMPUTED, SKIPPED, SKIPPED],
    }
    check([each[0] for each in found[3:]], alone([None, None, None, *[COND] * 3]))


def test_guidance_in_every_other_step() -> None:
    """What is stored for it is older by a step; its threshold decides, as in every slot."""
    model = fresh()
    Loop(model)([[COND, UNCOND] if number % 2 == 0 else [COND] for number in range(6)], TIMES)
    assert hits(model) == {"call 1": ALL, "call 2": [COMPUTED, SKIPPED, SKIPPED]}


def test_a_sampler_that_looks_twice_at_a_time() -> None:
    model = fresh()
    Loop(model)([[COND]] * 6, [900.0, 800.0, 800.0, 700.0, 700.0, 600.0])
    assert hits(model) == {"call 1": ALL}


def test_more_passes_than_are_kept() -> None:
    texts = [draw(*SHAPE, seed=20 + number) for number in range(10)]
    model, exact = fresh(), build("wan")
    found = Loop(model)([texts] * 3, TIMES[:3])
    expected = Loop(exact)([texts] * 3, TIMES[:3])
    check(found[0], expected[0])
    check([each[9] for each in found], [each[9] for each in expected])  # not kept, so computed
    assert cache_stats(model).hits == 8 * 2
