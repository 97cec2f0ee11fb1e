"""What tells in the graph that an input is not what it was, and what a slot without a name makes of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from cached import ALWAYS, CachedGraphs, cached
from capture import capture
from families import Inputs
from random_tensors import draw, randomise
from small_models import Denoiser, image_tokens
from torch import Tensor, fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode

from paracompile.passes.fingerprints import fingerprint
from paracompile.passes.writer import GraphWriter

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def graph_of(like: Tensor) -> fx.GraphModule:
    """A graph that gives the fingerprint of a tensor like this one."""
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(like)
    graph = fx.Graph()
    value = graph.placeholder("value")
    value.meta["val"] = fake
    graph.output((fingerprint(GraphWriter(mode, graph), value),))
    return fx.GraphModule(torch.nn.Module(), graph)


def value(dtype: torch.dtype) -> Tensor:
    drawn = 10 * draw(6, 5, 4, seed=1)
    return drawn > 0 if dtype is torch.bool else drawn.to(dtype)


def swapped(of: Tensor) -> Tensor:
    return of[torch.tensor([0, 1, 3, 2, 4, 5])]


def one_changed(of: Tensor) -> Tensor:
    """The last value, by the least that its type knows."""
    changed = of.clone()
    bits = changed if of.dtype is torch.bool else changed.view(torch.uint8)
    bits.view(-1)[-1] = ~bits.view(-1)[-1] if of.dtype is torch.bool else bits.view(-1)[-1] ^ 1
    return changed


def about_the_middle(of: Tensor) -> Tensor:
    """Three neighbours, so that their sum and their centre stay: 1, -2, 1."""
    changed = of.clone()
    changed.view(-1)[:3] += torch.tensor([1, -2, 1], dtype=of.dtype)
    return changed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", [swapped, one_changed])
def test_another_value_has_another_fingerprint(dtype: torch.dtype, change: Callable[[Tensor], Tensor]) -> None:
    of = value(dtype)
    graph = graph_of(of)
    (found,), (again,), (other,) = graph(of), graph(of.clone()), graph(change(of))
    assert torch.equal(found, again)
    assert not torch.equal(found, other)
    assert found.dtype is torch.int64
    assert 0 <= int(found.min()) <= int(found.max()) < 2**24


def test_a_change_about_a_middle_is_seen() -> None:
    of = torch.arange(24, dtype=torch.int32)
    graph = graph_of(of)
    assert not torch.equal(graph(of)[0], graph(about_the_middle(of))[0])


def test_layout_does_not_matter() -> None:
    of = value(torch.float32)
    other = of.transpose(0, 2).contiguous().transpose(0, 2)
    assert other.stride() != of.stride()
    assert torch.equal(graph_of(of)(of)[0], graph_of(other)(other)[0])


@pytest.mark.sampled(1)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64, torch.bool], ids=str)
def test_inductor_computes_the_same(dtype: torch.dtype) -> None:
    of = value(dtype)
    compiled: Any = compile_fx(graph_of(of), [of])
    assert torch.equal(compiled(of)[0], graph_of(of)(of)[0])


# Habits


class Conditioned(Denoiser):
    def forward(self, hidden_states: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        (out,) = super().forward(hidden_states, timestep)
        return (out + text.mean(),)


TIMES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
A, B, C, D, E, F = (draw(2, 5, 3, seed=seed) for seed in range(6))


def inputs(number: int, text: Tensor, time: float | None = None) -> Inputs:
    sample = image_tokens() + number * 0.1 * image_tokens(seed=100 + number)
    times = torch.tensor(TIMES[number] if time is None else time).repeat(len(sample))
    return {"hidden_states": sample, "timestep": times, "text": text}


@cache
def graphs_of(ranks: int) -> CachedGraphs:
    model = capture(randomise(Conditioned()), inputs(0, A))
    return cached(model, {"ulysses": ranks} if ranks > 1 else None)


def pattern(graphs: CachedGraphs, steps: list[Inputs], **how: bool) -> str:
    """One letter a step: c computed, s skipped."""
    generation = graphs.begin()
    for number, each in enumerate(steps):
        known = how.get("known", False) and number > 0
        generation.step(each, ALWAYS, unnamed=how.get("unnamed", False), known=known)
    return "".join("s" if each.hit else "c" for each in generation.steps)


@pytest.mark.parametrize(
    "texts, expected",
    [
        ((A, A, A, A, A), "cssss"),
        ((A, B, C, D, E), "ccsss"),  # as a ControlNet's residuals do; that it is a habit shows at the third
        ((A, A, B, B, B), "cscss"),  # another prompt in the place of the first
        ((A, B, B, B, B), "cccss"),  # guidance began, and its pass comes first
        ((A, B, C, C, C), "ccscs"),
        ((A, B, A, B, A), "ccsss"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_input_that_breaks_its_habit_is_no_hit(texts: tuple[Tensor, ...], expected: str, ranks: int) -> None:
    steps = [inputs(number, text) for number, text in enumerate(texts)]
    assert pattern(graphs_of(ranks), steps, unnamed=True, known=True) == expected
    assert pattern(graphs_of(ranks), steps) == "cssss"  # a name is above all


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_reused_after_a_broken_habit_is_of_the_step_that_broke_it(ranks: int) -> None:
    graphs = graphs_of(ranks)
    generation, alone = graphs.begin(), graphs.begin()
    for number, text in enumerate((A, A, B)):
        generation.step(inputs(number, text), ALWAYS, unnamed=True, known=number > 0)
    alone.step(inputs(2, B), ALWAYS)
    for number in (3, 4):
        found = generation.step(inputs(number, B), ALWAYS, unnamed=True, known=True)
        assert found.hit
        assert torch.equal(found.output, alone.step(inputs(number, B), ALWAYS).output)


@pytest.mark.parametrize(
    "times, known, unknown",
    [
        ((0.9, 0.8, 0.8, 0.7, 0.7), "cssss", "cscsc"),  # a sampler that looks twice at a time
        ((0.9, 0.9, 0.8, 0.8, 0.7), "cssss", "ccscs"),
        ((0.9, 0.8, 0.7, 0.9, 0.8), "csscs", "csscs"),  # the next generation
    ],
)
def test_a_time_may_come_twice_where_the_host_knows_that_a_step_was_made(
    times: tuple[float, ...], known: str, unknown: str
) -> None:
    steps = [inputs(number, A, time) for number, time in enumerate(times)]
    assert pattern(graphs_of(1), steps, known=True) == known
    assert pattern(graphs_of(1), steps) == unknown
