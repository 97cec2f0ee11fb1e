"""`options={"verify": True}`: the first call of each graph is compared with the original."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from denoising import build, compiled, generate, prompts
from quick import quick
from random_tensors import draw, randomise
from small_models import Transformer, close, image_tokens
from torch import Tensor, nn

from paracompile import ParacompileError, backend, cache_stats, calling
from paracompile.runtime.verified_call import VerifiedCall

pytestmark = pytest.mark.whole


class Counting(nn.Module):
    """Writes to a buffer and to an input, and has outputs of several kinds."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = Transformer(2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, total: Tensor) -> tuple[Tensor, Tensor, int]:
        self.calls += 1
        result = self.inner(x) * self.calls
        total += result.sum()
        return result, result > 0, x.shape[1]


def verified(model: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(model, backend="paracompile", options={"verify": True, **options})


OPTIONS = [{"compiler": "eager"}, {"compiler": "eager", "rdt": 0.1}, {}, {"regions": False}]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("options", quick(OPTIONS, *OPTIONS[:2], slow=OPTIONS), ids=str)
@pytest.mark.filterwarnings("ignore:paracompile. rdt was given")
def test_what_is_right_passes_and_is_written_once(options: dict[str, Any]) -> None:
    model, other = randomise(Counting()), randomise(Counting())
    call = verified(model, **options)
    totals = [torch.zeros(()), torch.zeros(())]
    for seed in range(3):
        x = image_tokens(seed=seed)
        with torch.no_grad():
            close(call(x, totals[0]), other(x, totals[1]), 1e-5)
    close([model.calls, totals[0]], [torch.tensor(3.0), totals[1]], 1e-5)


def test_gradients_remain_where_nothing_is_shared() -> None:
    model = randomise(Transformer()).requires_grad_()
    verified(model, compiler="aot_eager")(image_tokens()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_only_the_first_call_of_each_shape_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[VerifiedCall] = []

    def kept(*args: Any, **kwargs: Any) -> VerifiedCall:
        made.append(VerifiedCall(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(calling, "VerifiedCall", kept)
    model, call = randomise(Transformer()), None
    call = verified(model, compiler="eager")
    with torch.no_grad():
        for length in (48, 40, 48):
            call(draw(2, length, 10))
            assert all(each.original is None for each in made)
    assert len(made) == 2


def wrong_by(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every graph that is compiled in regions has its first output wrong."""
    compile_regions = backend.compile_regions

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        program, compilation = compile_regions(*args, **kwargs)

        def run(*arguments: Any) -> tuple[Any, ...]:
            first, *others = program(*arguments)
            return (first * factor, *others)

        return run, compilation

    monkeypatch.setattr(backend, "compile_regions", spoiled)


@pytest.mark.slow
def test_a_wrong_graph_with_a_cache_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    of = prompts("wan")
    model = compiled(build("wan"), verify=True)
    assert generate(model, of).isfinite().all()
    assert cache_stats(model).hits > 0  # later steps are not compared
    torch._dynamo.reset()
    wrong_by(1.01, monkeypatch)
    generate(compiled(build("wan")), of)
    with pytest.raises(ParacompileError, match=r'"verify": .* output 0 \(.*transformer_wan.py:\d+, in forward'):
        generate(compiled(build("wan"), verify=True), of)


def call_of(found: Any, expected: Any, tolerance: float = 1e-3) -> VerifiedCall:
    return VerifiedCall(lambda *_: (found, "more"), lambda *_: (expected,), ["'x'"], ["0 (add)"], tolerance)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "found, expected, told",
    [
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0019]), None),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.1]), r"by 0.1, and 0.0021 is the tolerance .*2.1\)"),
        (torch.tensor([1.0, NAN, INF]), torch.tensor([1.0, NAN, INF]), None),
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, 2.0]), "by inf, and 0.002"),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, NAN]), "by inf, and 0.001"),
        (torch.tensor([1.0, INF]), torch.tensor([1.0, -INF]), "by inf"),
        (torch.tensor([3, 4]), torch.tensor([3, 5]), "by 1, and 0 is the tolerance"),
        (torch.tensor([True]), torch.tensor([False]), "by 1"),
        (torch.tensor([1j]), torch.tensor([1.1j]), "by 0.1"),
        (torch.empty(0), torch.empty(0), None),
        (torch.ones(2), torch.ones(3), r"float32 of shape \[2\] instead of float32 of shape \[3\]"),
        (torch.ones(2), torch.ones(2).double(), r"float32 of shape \[2\] instead of float64"),
        (7, 7, None),
        (7, 8, "7 instead of 8"),
        (None, None, None),
    ],
    ids=str,
)
def test_what_is_a_difference(found: Any, expected: Any, told: str | None) -> None:
    call = call_of(found, expected)
    if told is None:
        assert call(torch.ones(2))[1] == "more"
        assert call.original is None
        return
    for _ in range(2):  # it stays unverified
        with pytest.raises(ParacompileError, match=rf"differ in output 0 \(add\): {told}"):
            call(torch.ones(2))


def test_an_input_that_is_left_unwritten_is_told() -> None:
    x = torch.zeros(2)
    call = VerifiedCall(lambda x: (), lambda x: (x.add_(1), ())[1], ["'x'"], [], 1e-3)
    with pytest.raises(ParacompileError, match=re.escape("differ in input 'x' after the call: by 1, and 0.001")):
        call(x)
    assert not x.any()
