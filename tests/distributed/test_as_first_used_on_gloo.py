"""Every family as its user first runs it on two ranks: batch 1, Inductor, rdt on."""

from __future__ import annotations

from typing import Any

import pytest
from as_used import EVERYTHING, build, largest_difference, steps
from families import ALL_FAMILIES
from pool import Pool
from quick import quick

PATIENCE = 800
"""Seconds: on two busy cores Inductor takes minutes for the largest family with everything on."""


def on_a_rank(rank: int, family: str, quantised: bool, options: dict[str, Any]) -> Any:
    outputs, hits = steps(build(family, quantised=quantised), {**options, "timeout": PATIENCE})
    return outputs, hits


@pytest.mark.slow
@pytest.mark.parametrize("family", quick(ALL_FAMILIES, "wan"))
def test_computed_and_skipped_steps(family: str, two_ranks: Pool) -> None:
    expected, _ = steps(build(family), {}, compiler="eager")
    for found, hits in two_ranks.run(on_a_rank, family, False, {}):
        assert hits == [False, True, True, True]
        assert largest_difference(found, expected) < 1e-5


@pytest.mark.full
@pytest.mark.timeout(PATIENCE + 100)
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_with_everything_on(family: str, two_ranks: Pool) -> None:
    pytest.importorskip("torchao.quantization")
    expected, _ = steps(build(family, quantised=True), EVERYTHING, compiler="eager")
    for found, hits in two_ranks.run(on_a_rank, family, True, EVERYTHING, timeout=PATIENCE):
        assert hits == [False, True, True, True]
        assert largest_difference(found, expected) < 0.05
