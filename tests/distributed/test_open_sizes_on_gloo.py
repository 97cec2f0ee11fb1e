"""One compile serves every size on real ranks, blocks skipped as well."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from capture import deviation
from open_sizes import COUNT, FAMILIES, built
from pool import Pool
from quick import quick
from random_tensors import draw, randomise
from small_models import BATCH, Transformer
from torch import fx

from paracompile.compiler import compile_regions
from paracompile.report.report import Report

OPTIONS: dict[str, Any] = {"timeout": 300}  # four ranks compile on few cores


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


@pytest.mark.slow
@pytest.mark.parametrize("family", quick(FAMILIES, "wan"))
def test_two_ranks(family: str, two_ranks: Pool) -> None:
    check(two_ranks, family, "eager", list(range(4)), most=2)


@pytest.mark.full
@pytest.mark.parametrize("family", ["flux", "wan", "hunyuan_video"])
def test_four_ranks(family: str, four_ranks: Pool) -> None:
    """Of each kind one: text beside the image, apart from it, and masked. On few cores each takes minutes."""
    check(four_ranks, family, "eager", list(range(COUNT)), most=2)


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_compiler(family: str, two_ranks: Pool) -> None:
    """Inductor asks itself which loops are short (64 and less), and compiles anew where that is otherwise."""
    check(two_ranks, family, "inductor", [0, 1, 5], most=3)


def with_a_guard_on_one_rank(rank: int) -> tuple[list[int], list[float]]:
    """After each call, how many graphs were compiled; and how far its result is from the model's own."""
    torch._dynamo.reset()
    reports: list[Report] = []

    def guarding(gm: fx.GraphModule, *args: Any) -> Any:
        made = compile_regions(gm, *args)
        sizes = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
        if rank == 0 and any(size < 20 for size in sizes if isinstance(size, torch.SymInt)):
            made[0].is_short = True  # as Inductor decides about the loops of a rank's own part
        return made

    model = randomise(Transformer(1))
    options = {**OPTIONS, "compiler": "eager", "report": reports.append}
    compiled = torch.compile(model, backend="paracompile", options=options)
    graphs, found = [], []
    with mock.patch("paracompile.backend.compile_regions", guarding), torch.no_grad():
        for length in (12, 15, 18, 25, 31):
            tokens = draw(BATCH, length, 10)
            found.append(deviation(compiled(tokens), model(tokens)))
            graphs.append(len(reports))
    return graphs, found


@pytest.mark.slow
def test_what_one_rank_guards_all_ranks_compile_for(two_ranks: Pool) -> None:
    for graphs, deviations in two_ranks.run(with_a_guard_on_one_rank):
        assert graphs == [1, 2, 2, 3, 3]
        assert max(deviations) <= 1
