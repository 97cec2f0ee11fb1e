"""Plans of steps that are made before anything runs."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from denoising import PASSES, STEPS, build, compiled, generate, prompts
from torch import Tensor

from paracompile import OptionError, cache_stats, magnitude_ratios, steps_by_magnitude
from paracompile.options import Options

pytestmark = pytest.mark.whole


@pytest.mark.parametrize(
    "ratios, how, expected",
    [
        ([1.0] * 6, {"limit": 0.1, "most": 2, "retained": 0.0}, "100100"),
        ([1.0] * 6, {"limit": 0.1, "most": 9, "retained": 0.5}, "111000"),
        ([1.0] * 10, {"limit": 0.1, "most": 9}, "1100000000"),
        # 0.9 is 0.1 off, 0.81 is 0.19 off: 0.29 together
        ([1.0] + [0.9] * 5, {"limit": 0.2, "most": 9, "retained": 0.0}, "101010"),
        ([1.0] + [0.9] * 5, {"limit": 0.3, "most": 9, "retained": 0.0}, "100100"),
        # what grows and shrinks again is not far off any more, but its errors are
        ([1.0, 1.25, 0.8, 1.0], {"limit": 0.25, "most": 9, "retained": 0.0}, "1000"),
        ([1.0, 1.25, 0.8, 1.25], {"limit": 0.25, "most": 9, "retained": 0.0}, "1001"),
        ([1.0] * 3, {"limit": 0.0, "most": 0, "retained": 0.0}, "111"),
    ],
)
def test_by_magnitude(ratios: list[float], how: dict[str, Any], expected: str) -> None:
    assert steps_by_magnitude(ratios, **how) == expected
    assert Options.parse({"rdt": 0.1, "steps": expected}).steps == expected


@pytest.mark.parametrize(
    "ratios, how, key",
    [
        ([], {}, "ratios"),
        ([1.0, 0.0], {}, "ratios"),
        ([1.0, float("nan")], {}, "ratios"),
        ([1.0, 1.0], {"limit": -1.0}, "limit"),
        ([1.0, 1.0], {"most": -1}, "most"),
        ([1.0, 1.0], {"retained": 1.5}, "retained"),
    ],
)
def test_what_cannot_be_is_an_error(ratios: list[float], how: dict[str, Any], key: str) -> None:
    with pytest.raises(OptionError) as caught:
        steps_by_magnitude(ratios, **{"limit": 0.1, "most": 2, **how})
    assert caught.value.key == key


@pytest.mark.slow
def test_ratios_are_those_of_what_the_blocks_add() -> None:
    """Of each pass, against what hooks see in the model itself; though it skips whenever it may."""
    of, plain = prompts("wan"), build("wan")
    ends: list[list[Tensor]] = [[], []]
    for block, seen in zip((plain.blocks[0], plain.blocks[-1]), ends, strict=True):  # type: ignore[index,misc]
        block.register_forward_hook(lambda module, args, result, seen=seen: seen.append(result.clone()))
    generate(plain, of)
    sizes = [(end - begin).norm(dim=-1) for begin, end in zip(*ends, strict=True)]

    model = compiled(build("wan"))
    found = magnitude_ratios(model, lambda: generate(model, of, naming="paracompile"))
    assert list(found) == list(PASSES)
    for number, name in enumerate(PASSES):
        own = sizes[number :: len(PASSES)]
        expected = [1.0, *(float((now / before).mean()) for before, now in pairwise(own))]
        assert len(expected) == STEPS
        assert found[name] == pytest.approx(expected, rel=1e-4)
    generate(model, of, naming="paracompile")
    assert cache_stats(model).hits == len(PASSES) * (STEPS - 1)  # the threshold is what it was


def test_ratios_of_nothing_are_an_error() -> None:
    with pytest.raises(OptionError, match="it calls no graph of the model that has blocks to skip"):
        magnitude_ratios(compiled(build("wan")), lambda: None)
    with pytest.raises(OptionError, match="without a first block cache"):
        magnitude_ratios(torch.compile(build("wan"), backend="paracompile"), lambda: None)  # type: ignore[arg-type]
