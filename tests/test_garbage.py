"""Python collects no garbage while a graph is rewritten and compiled, and does afterwards what it did before."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from small_models import Denoiser, image_tokens
from torch._dynamo.exc import BackendCompilerFailed

from paracompile import backend, compiler
from paracompile.passes import run_passes


@pytest.fixture(params=[True, False], ids=["on", "off"])
def collecting(request: pytest.FixtureRequest) -> Iterator[bool]:
    assert gc.isenabled()
    if not request.param:
        gc.disable()
    yield request.param
    gc.enable()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Whether the collector was on at the end of the passes, and of each call of Inductor."""
    found: list[tuple[str, bool]] = []

    def passes(*args: Any, **kwargs: Any) -> Any:
        made = run_passes(*args, **kwargs)
        found.append(("passes", gc.isenabled()))
        return made

    def compile_fx(gm: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(("compiler", gc.isenabled()))
        return gm.forward

    monkeypatch.setattr(backend, "run_passes", passes)
    monkeypatch.setattr(compiler, "compile_fx", compile_fx)
    return found


def call(**options: Any) -> None:
    model = torch.compile(Denoiser().requires_grad_(False), backend="paracompile", options=options)
    model(image_tokens(), torch.ones(2))


@pytest.mark.parametrize("regions", [True, False])
def test_the_collector_rests_while_a_graph_is_compiled(
    collecting: bool, seen: list[tuple[str, bool]], regions: bool
) -> None:
    reported: list[bool] = []
    call(rdt=0.1, regions=regions, report=lambda report: reported.append(gc.isenabled()))
    assert {part for part, _ in seen} == {"passes", "compiler"}
    assert not any(on for _, on in seen)
    assert reported == [collecting]  # what is not compiling does not stop it
    assert gc.isenabled() is collecting


def test_the_collector_goes_on_after_an_error(
    collecting: bool, seen: list[tuple[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("cannot compile this")

    monkeypatch.setattr(compiler, "compile_fx", fails)
    with pytest.raises(BackendCompilerFailed, match="cannot compile this"):
        call(rdt=0.1)
    assert gc.isenabled() is collecting
