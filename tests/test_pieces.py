"""What a piece of a model is, and what pieces hand to each other, in one process."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pieces import glm_image, lumina2
from random_tensors import draw
from torch import Tensor, fx, nn

from paracompile.runtime.pieces import handing_on, is_handed_on
from paracompile.seen_again import seen_again_as_captured

OPTIONS = {"compiler": "eager", "rdt": 0.1}


class Layer(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _plainly(x: Tensor) -> Tensor:
    return x.sin()


class BrokenInALoop(nn.Module):
    """Dynamo leaves its `forward` to Python, with no break on record, and compiles what that calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(8, 8), Layer(8, 8)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(_plainly(x))
        return x


def warnings_of(call: object, *args: object, **kwargs: object) -> list[str]:
    assert callable(call)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        call(*args, **kwargs)
    return [str(each.message) for each in caught if str(each.message).startswith("paracompile")]


def test_a_model_in_one_graph_is_no_piece() -> None:
    compiled = torch.compile(nn.Sequential(Layer(8, 8)), backend="paracompile", options=OPTIONS)
    assert not any("piece" in text for text in warnings_of(compiled, draw(2, 8)))


@pytest.mark.slow
def test_the_break_of_another_model_is_not_named() -> None:
    model, inputs = lumina2()
    told = warnings_of(torch.compile(model, backend="paracompile", options=OPTIONS), **inputs)
    assert any("broken at" in text and "lumina2" in text for text in told)
    assert not any("rank" in text for text in told)  # there is one

    told = warnings_of(torch.compile(BrokenInALoop(), backend="paracompile", options=OPTIONS), draw(2, 8))
    assert any("called by code that Dynamo does not compile" in text for text in told)
    assert not any("lumina2" in text for text in told)


def test_asking_what_is_seen_again_leaves_the_graph_alone() -> None:
    """Arguments of the model that this piece does not read are no inputs of it."""
    model, inputs = glm_image()
    asked: list[tuple[list[fx.Node], list[fx.Node]]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Tensor]) -> Callable[..., Any]:
        before = list(gm.graph.nodes)
        seen_again_as_captured(gm)
        asked.append((before, list(gm.graph.nodes)))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend)(**inputs)
    assert asked  # in two pieces with torch 2.13, in one with 2.11
    assert all(before == after for before, after in asked)


def test_what_a_piece_returns_is_known_but_not_what_it_returns_of_its_inputs() -> None:
    x = draw(2, 3)
    itself, view, new = handing_on(lambda x: (x, x.view(-1), x + 1), list, [0])(x)
    assert [is_handed_on(value) for value in (x, itself, view, new)] == [False, False, False, True]
    new.add_(1)
    assert not is_handed_on(new)
