"""Python collects no garbage while a graph is compiled, and does afterwards what it did before."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from small_models import WIDTH, SelfAttention, image_tokens
from torch._dynamo.exc import BackendCompilerFailed


@pytest.fixture(params=[True, False], ids=["on", "off"])
def collecting(request: pytest.FixtureRequest) -> Iterator[bool]:
    assert gc.isenabled()
    if not request.param:
        gc.disable()
    yield request.param
    gc.enable()


def test_the_collector_rests_while_a_graph_is_compiled(collecting: bool) -> None:
    while_compiled: list[bool] = []
    options = {"compiler": "eager", "report": lambda report: while_compiled.append(gc.isenabled())}
    with torch.no_grad():
        torch.compile(SelfAttention(), backend="paracompile", options=options)(image_tokens(WIDTH))
    assert while_compiled == [False]
    assert gc.isenabled() is collecting


def test_the_collector_goes_on_after_an_error(collecting: bool) -> None:
    model = torch.compile(SelfAttention(), backend="paracompile", options={"compiler": "none"})
    with pytest.raises(BackendCompilerFailed), torch.no_grad():
        model(image_tokens(WIDTH))
    assert gc.isenabled() is collecting
