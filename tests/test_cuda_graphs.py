"""Regions as CUDA graphs, whose results lie where the next call writes: imitated here, as there is no GPU.

What Inductor leaves out of them is in `test_fake_cuda.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from random_tensors import randomise
from small_models import Denoiser, image_tokens
from torch import Tensor, fx, nn

from paracompile import cache_context, cache_stats, compiler
from paracompile.runtime.program import Program


class Memory:
    """Where the graphs of one model leave their results; what the next call does not write to is nobody's."""

    def __init__(self) -> None:
        self.results: list[Tensor] = []

    def compile_fx(self, gm: fx.GraphModule, examples: Sequence[Any], **how: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> list[Any]:
            made = [value.clone() for value in gm.forward(*arguments)]
            self.results += made
            return made

        return call

    def overwrite(self) -> None:
        while self.results:
            result = self.results.pop()
            result.fill_(torch.nan if result.is_floating_point() else 1)


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    found = Memory()
    run = Program.__call__

    def next_call(program: Program, *arguments: Any) -> tuple[Any, ...]:
        found.overwrite()
        return run(program, *arguments)

    monkeypatch.setattr(compiler, "compile_fx", found.compile_fx)
    monkeypatch.setattr(Program, "__call__", next_call)
    return found


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = torch.compile(model, backend="paracompile", options=options)
    return found


def generate(call: Callable[..., Any]) -> Tensor:
    """Two passes a step, of which the first one's result is read after the second."""
    sample = image_tokens()
    for time in (0.9, 0.6, 0.3, 0.1):
        found = []
        for name in ("cond", "uncond"):
            with torch.no_grad(), cache_context(name):
                found += call(sample if name == "cond" else -sample, torch.full((2,), time))
        sample = sample - 0.1 * (3 * found[0] - 2 * found[1])
    return sample


def test_what_the_next_call_overwrites_is_not_read(memory: Memory) -> None:
    """Nor is the cache's record, which is read at the next step."""
    plain, graphs = (randomise(Denoiser()) for _ in range(2))
    expected = generate(compiled(plain, rdt=1e9, compiler="eager"))
    assert torch.equal(generate(compiled(graphs, rdt=1e9, mode="reduce-overhead")), expected)
    memory.overwrite()
    assert cache_stats(graphs).as_dict() == cache_stats(plain).as_dict()
    assert cache_stats(graphs).hits > 0


@pytest.mark.whole
@pytest.mark.parametrize("how", [{"mode": "reduce-overhead"}, {"inductor": {"triton.cudagraphs": True}}, {}], ids=str)
def test_results_are_copied_where_cuda_graphs_are_asked_for(memory: Memory, how: dict[str, Any]) -> None:
    with torch.no_grad():
        (found,) = compiled(randomise(Denoiser()), **how)(image_tokens(), torch.ones(2))
    memory.overwrite()
    assert bool(found.isfinite().all()) is bool(how)


@pytest.mark.whole
@pytest.mark.parametrize("name", ["visible_keys", "attention_to_visible", "attention_with_lse_to_visible"])
def test_what_depends_on_numbers_that_the_host_reads_is_not_recorded(name: str) -> None:
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.paracompile, name).default.tags
