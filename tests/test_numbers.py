"""Python's numbers that change from call to call: those only calculated with cost one further compile, not one each."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torch.utils._pytree as pytree
from all_ranks import of_all_ranks
from lockstep import run_lockstep
from open_sizes import runnable
from quick import quick
from random_tensors import draw, randomise
from small_models import BATCH, Block, Denoiser, Mesh, Transformer, close, image_tokens, mesh_name, mesh_sizes
from torch import Tensor, fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from paracompile import cache_context, cache_stats
from paracompile.passes.normalise import normalise
from paracompile.patterns.numbers import find_numbers
from paracompile.report.report import Report

SCALES, COUNTS = (0.5, 0.6, 0.7, 0.8), (3, 4, 5, 6)

Of = Callable[[Tensor, float, int], Any]


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    torch._dynamo.reset()


def graphs_of(function: Of, x: Tensor) -> list[fx.GraphModule]:
    """Calls a function with changing numbers, and compares it with its normalised graphs, which are returned."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        ints = find_numbers(gm.graph).ints
        graph = normalise(gm, example_inputs)
        graphs.append(graph)
        graph = runnable(graph, example_inputs)
        return lambda *args: graph(*(torch.tensor(a) if place in ints else a for place, a in enumerate(args)))

    compiled = torch.compile(function, backend=backend)
    for scale, count in zip(SCALES, COUNTS, strict=True):
        found, expected = compiled(x, scale, count), function(x, scale, count)
        assert pytree.tree_map(type, found) == pytree.tree_map(type, expected)
        for one, other in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
            assert getattr(one, "dtype", None) == getattr(other, "dtype", None)
            torch.testing.assert_close(one, other)
    return graphs


CALCULATED: dict[str, Of] = {
    "product": lambda x, scale, count: x * scale,
    "of the number": lambda x, scale, count: (1 - scale) ** 2 * x + 2 / scale,
    "with itself": lambda x, scale, count: x / (scale * scale + 1e-6),
    "of an int": lambda x, scale, count: x * count + count / 7,
    "of both": lambda x, scale, count: x * (count // 2 * scale) - count % 3,
    "root": lambda x, scale, count: x * math.sqrt(scale) + math.cos(count),
    "in place": lambda x, scale, count: x.clone().mul_(scale).add_(count),
    "compared": lambda x, scale, count: torch.where(x > scale, x, scale),
    "filled": lambda x, scale, count: x.masked_fill(x > 0, scale) + torch.full_like(x, count),
    "new": lambda x, scale, count: x + torch.full((4,), scale) + x.new_full((4,), scale) + torch.tensor(scale),
    "written": lambda x, scale, count: x.clone().index_fill_(0, torch.tensor([0]), 0.0) * scale,
    "set": lambda x, scale, count: _set(x, scale),
    "exponent": lambda x, scale, count: x.abs() ** scale + scale**x,
    "integers": lambda x, scale, count: (x > 0).long() * scale + (x > 0).int() * count,
    "a tensor of no dimensions": lambda x, scale, count: x.sum() * scale + x.sum().to(torch.bfloat16) * scale,
    "low precision": lambda x, scale, count: x.bfloat16() * scale + x.half().sum() * count,
    "whole number": lambda x, scale, count: torch.full((2,), count),
    "handed back": lambda x, scale, count: (x * scale, scale * 2),
}
"""What may be done with a number that is an input."""


def _set(x: Tensor, scale: float) -> Tensor:
    x = x.clone()
    x[:, 1:] = scale
    return x


@pytest.mark.whole
@pytest.mark.parametrize("name", CALCULATED)
def test_numbers_that_are_only_calculated_with_are_inputs(name: str) -> None:
    graphs = graphs_of(CALCULATED[name], draw(3, 4))
    assert len(graphs) == 2  # the first takes them for constants


SIZES: dict[str, Of] = {
    "size": lambda x, scale, count: x.new_ones(count).sum() * x,
    "window": lambda x, scale, count: x[:, : count - 2] * 2,
    "copies": lambda x, scale, count: x.repeat(1, count),
}
"""Where a number is a size, or makes one."""


@pytest.mark.parametrize("name", SIZES)
def test_numbers_in_shapes_stay_open(name: str) -> None:
    assert len(graphs_of(SIZES[name], draw(3, 9))) == 2


KNOWN: dict[str, Of] = {
    "attention's scale": lambda x, scale, count: F.scaled_dot_product_attention(x, x, x, scale=scale),
    "handed back": lambda x, scale, count: (x * 2, count + 1),
    "alpha": lambda x, scale, count: torch.add(x, x, alpha=scale),
}
"""What needs to know the number."""


@pytest.mark.parametrize("name", KNOWN)
def test_other_numbers_are_constants(name: str) -> None:
    assert len(graphs_of(KNOWN[name], draw(3, 4))) == len(SCALES)


@pytest.mark.whole
@pytest.mark.parametrize("compare", [lambda scale, count: scale > 0.65, lambda scale, count: count == 5])
def test_whether_a_number_is_so_is_known(compare: Callable[[float, int], bool]) -> None:
    graphs = graphs_of(lambda x, scale, count: x * compare(scale, count) + scale, draw(3, 4))
    assert 2 <= len(graphs) <= len(SCALES)


def test_a_number_is_kept_beside_one_that_is_needed() -> None:
    graphs = graphs_of(lambda x, scale, count: x[:, : count - 2] * scale, draw(3, 9))
    used = [[node.name for node in graph.graph.find_nodes(op="placeholder") if node.users] for graph in graphs]
    assert used == [["l_x_"], ["l_x_", "l_scale_"]]


class Scaled(Block):
    """A block told a scale, as one with LoRA weights is, and a count."""

    def forward(self, x: Tensor, scale: float = 1.0, count: int = 1) -> Tensor:  # type: ignore[override]
        return super().forward(x) + x.sin() * (scale - 0.25) / count


class Timed(Transformer):
    """Told a time, and a scale."""

    def forward(self, hidden_states: Tensor, timestep: Any, scale: float) -> Tensor:  # type: ignore[override]
        x = self.proj_in(hidden_states) * (1 + timestep)
        for block in self.blocks:
            x = block(x) + x.sin() * scale
        return self.proj_out(x)


@pytest.mark.parametrize("mesh", [2, {"batch": 2, "ring": 2}], ids=mesh_name)
def test_ranks_share_a_graph_of_numbers(mesh: Mesh) -> None:
    graphs = 0
    sizes = mesh_sizes(mesh)
    model = randomise(Denoiser(2, block=Scaled))
    x, time = image_tokens(), torch.tensor([0.3, 0.6])

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        ints = find_numbers(gm.graph).ints
        made = of_all_ranks(gm, example_inputs, sizes).graphs

        def run(*args: Any) -> Any:
            given = [torch.tensor(value) if place in ints else value for place, value in enumerate(args)]
            return run_lockstep(made, [given] * len(made), sizes)[-1]

        return run

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for scale, count in zip(SCALES, COUNTS, strict=True):
            close(compiled(x, time, scale=scale, count=count), model(x, time, scale=scale, count=count))
    assert graphs == 2


OPTIONS: list[dict[str, Any]] = [{}, {"rdt": 1e-9}, {"rdt": 1e-9, "verify": True}]


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "options, compiler",
    quick(
        product(OPTIONS, ("eager", "inductor")),
        *((options, "eager") for options in OPTIONS),
        ({"rdt": 1e-9}, "inductor"),
    ),
    ids=str,
)
def test_a_scale_that_changes_compiles_once_more_on_one_rank(compiler: str, options: dict[str, Any]) -> None:
    reports: list[Report] = []
    model = randomise(Denoiser(block=Scaled))
    compiled = torch.compile(
        model, backend="paracompile", options={"compiler": compiler, "report": reports.append, **options}
    )
    x = image_tokens()
    with torch.no_grad():
        for number, (scale, count) in enumerate(zip(SCALES, COUNTS, strict=True)):
            time = torch.tensor([0.9, 0.8]) - number / 10
            found, expected = (each(x, time, scale=scale, count=count) for each in (compiled, model))
            close(found, expected)
    assert len(reports) == 2
    if compiler == "inductor":
        assert reports[1].compilation is not None  # equal blocks are still compiled once


def test_a_number_that_is_needed_stays_with_the_compiler_on_one_rank() -> None:
    """Without a cache nothing forces it to be a constant there: Inductor takes the graph as it is."""
    reports: list[Report] = []
    options = {"report": reports.append}

    def attend(x: Tensor, scale: float) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, scale=scale)

    compiled = torch.compile(attend, backend="paracompile", options=options)
    x = draw(1, 2, 8, 4)
    for scale in SCALES:
        close(compiled(x, scale), attend(x, scale))
    assert all(report.compilation is None for report in reports)


@pytest.fixture
def _two_ranks() -> Iterator[None]:
    """This process is rank 0 of two; the other does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_two_ranks")
def test_a_scale_that_changes_compiles_once_more_on_two_ranks() -> None:
    reports: list[Report] = []
    options = {"compiler": "eager", "report": reports.append}
    compiled = torch.compile(randomise(Denoiser(1, block=Scaled)), backend="paracompile", options=options)
    with torch.no_grad():
        for number in range(12):
            compiled(image_tokens(), torch.tensor([0.3, 0.6]), scale=number / 7, count=2 + number)
    assert [report.ranks for report in reports] == [2, 2]


@pytest.mark.parametrize("as_number", [True, False])
def test_a_time_may_be_a_number_and_a_scale_is_no_time(as_number: bool) -> None:
    """A generation that is cut off leaves nothing to the next, whose first time is higher."""
    model = randomise(Timed(3))
    compiled = torch.compile(model, backend="paracompile", options={"compiler": "eager", "rdt": 10.0})
    with torch.no_grad(), cache_context("only"):
        for number, time in enumerate((0.9, 0.8, 0.7, 0.6, 0.95, 0.85, 0.75)):
            scale = 0.5 + 0.1 * (-1) ** number
            compiled(image_tokens(), time if as_number else torch.full((BATCH, 1, 1), time), scale)
    hits = [step.hit for step in cache_stats(model).slots["only"]]
    assert hits == [False, True, True]  # of the last generation


class Weighted(Denoiser):
    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, timestep: Tensor, text: Tensor, scale: float, count: int
    ) -> tuple[Tensor]:
        (out,) = super().forward(hidden_states * scale + count, timestep)
        return (out + text.mean(),)


def test_numbers_do_not_tell_calls_apart_in_a_loop_of_one_s_own() -> None:
    """They are new tensors at each call, once they were seen to change; the conditioning is the same."""
    model = randomise(Weighted())
    compiled = torch.compile(model, backend="paracompile", options={"compiler": "eager", "rdt": 1e9})
    text = draw(BATCH, 5, 3)
    for scale, count in ((0.5, 2), (0.6, 3), (0.7, 4)):
        with torch.no_grad():
            for step in range(4):
                compiled(image_tokens(seed=step), torch.full((BATCH,), 0.9 - 0.1 * step), text, scale, count)
        (steps,) = cache_stats(model).slots.values()
        assert [each.hit for each in steps] == [False, False, True, True]


class Conditioned(Timed):
    """Told what to denoise, too, from which calls are known that nobody named."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, scale: float, prompt: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states, timestep, scale) + prompt.mean(1, keepdim=True)


def test_a_scale_that_changes_hides_no_trajectory() -> None:
    model = randomise(Conditioned(3))
    compiled = torch.compile(model, backend="paracompile", options={"compiler": "eager", "rdt": 10.0})
    prompt = draw(BATCH, 5, 10, seed=2)
    with torch.no_grad():
        for number, time in enumerate((0.9, 0.8, 0.7, 0.6, 0.5, 0.4)):
            compiled(image_tokens(), torch.full((BATCH, 1, 1), time), 0.5 + number / 20, prompt)
    (steps,) = (steps for steps in cache_stats(model).slots.values() if len(steps) > 1)
    assert [step.hit for step in steps][-3:] == [True, True, True]
