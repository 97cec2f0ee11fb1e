"""More sizes than Dynamo compiles by itself: each is compiled and sharded, and what is held is bounded."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from random_tensors import draw, randomise
from small_models import BATCH, Transformer
from torch import Tensor, fx
from torch.testing._internal.distributed.fake_pg import FakeStore

from paracompile import recompiles
from paracompile.backend import paracompile
from paracompile.report.report import Report


@pytest.fixture
def _two_ranks() -> Iterator[None]:
    """This process is rank 0 of two; the other does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=3, accumulated_recompile_limit=5):
        yield


def tokens(count: int) -> Tensor:
    return draw(BATCH, count, 10)


@pytest.mark.slow
@pytest.mark.usefixtures("_two_ranks")
def test_no_size_runs_unsharded() -> None:
    reports: list[Report] = []
    options = {"compiler": "eager", "report": reports.append}
    compiled = torch.compile(randomise(Transformer()), backend="paracompile", dynamic=False, options=options)
    sizes = range(12, 28, 2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (*sizes, *sizes):
            assert compiled(tokens(count)).shape == (BATCH, count, 10)
    assert [report.ranks for report in reports] == [2] * len(sizes)


def test_what_is_held_is_bounded_and_the_least_recent_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompiles, "MOST_GRAPHS", 4)
    made: list[tuple[int, weakref.ref[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        call = paracompile(gm, example_inputs, options={"compiler": "eager", "rdt": 0.1})
        sample = next(each for each in example_inputs if isinstance(each, Tensor) and each.dim() == 3)
        made.append((sample.shape[1], weakref.ref(call)))
        return call

    model = randomise(Transformer(2))
    compiled = torch.compile(model, backend=backend, dynamic=False)

    def held() -> list[int]:
        gc.collect()
        return sorted(size for size, call in made if call() is not None)

    with torch.no_grad():
        for count in (12, 13, 14, 15):
            compiled(tokens(count))
        compiled(tokens(12))
        with pytest.warns(UserWarning, match="used least recently is let go"):
            compiled(tokens(16))
        assert held() == [12, 14, 15, 16]
        with pytest.warns(UserWarning, match="let go"):
            assert torch.equal(compiled(tokens(13)), model(tokens(13)))
        assert held() == [12, 13, 15, 16]
