"""One compile serves every size on real ranks, blocks skipped as well."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture import deviation
from open_sizes import COUNT, FAMILIES, built
from pool import Pool
from quick import quick

from paracompile.report.report import Report

OPTIONS: dict[str, Any] = {"timeout": 60}


def at_all_sizes(rank: int, family: str, compiler: str, numbers: list[int]) -> tuple[int, list[float]]:
    """How many graphs were compiled, and how far each call's result is from the model's own, in units of rounding."""
    torch._dynamo.reset()
    reports: list[Report] = []
    model, _ = built(family, 0)
    options = {**OPTIONS, "compiler": compiler, "rdt": 0.1, "report": reports.append}
    compiled = torch.compile(model, backend="paracompile", options=options)
    found = []
    for number in numbers:
        _, inputs = built(family, number)
        with torch.no_grad():
            (expected,) = model(**inputs)
            found += [deviation(compiled(**inputs)[0], expected) for _ in range(2)]
    return len(reports), found


def check(pool: Pool, family: str, compiler: str, numbers: list[int], *, most: int) -> None:
    for compiles, deviations in pool.run(at_all_sizes, family, compiler, numbers):
        assert 2 <= compiles <= most
        assert max(deviations) <= 1


@pytest.mark.parametrize("family", quick(FAMILIES, "hunyuan_video"))
def test_two_ranks(family: str, two_ranks: Pool) -> None:
    check(two_ranks, family, "eager", list(range(COUNT)), most=2)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_four_ranks(family: str, four_ranks: Pool) -> None:
    check(four_ranks, family, "eager", list(range(COUNT)), most=2)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_compiler(family: str, two_ranks: Pool) -> None:
    """Inductor asks itself which loops are short (64 and less), and compiles anew where that is otherwise."""
    check(two_ranks, family, "inductor", [0, 1, 5], most=3)
