"""Weights that are tensor subclasses, as torchao's: asked as such, also in a branch of a conditional."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import ALL_FAMILIES, Inputs
from lockstep import run_lockstep
from quick import quick
from random_tensors import draw, randomise
from small_models import BATCH, Denoiser, Transformer, image_tokens, shard
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import paracompile
from paracompile.passes.first_block_cache import COMPUTE, COND, REUSE
from paracompile.passes.subclasses import dispatch_on_subclasses

quantization = pytest.importorskip("torchao.quantization")

aten = torch.ops.aten
KINDS = ["Int8DynamicActivationInt8WeightConfig", "Int8WeightOnlyConfig"]
PLACES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "all blocks": lambda model: model.blocks,
    "skipped blocks": lambda model: model.blocks[1:],
    "the first block": lambda model: model.blocks[0],
    "the whole model": lambda model: model,
}


def inputs_of(number: int) -> Inputs:
    noise = number * 0.1 * image_tokens(seed=100 + number)
    return {"hidden_states": image_tokens() + noise, "timestep": torch.full((BATCH,), 0.9 - 0.1 * number)}


def quantised(place: str = "all blocks", kind: str = KINDS[0]) -> nn.Module:
    model = randomise(Denoiser(3))
    quantization.quantize_(PLACES[place](model), getattr(quantization, kind)())
    return model


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    chosen = {"compiler": "eager", "rdt": 1e9, **options}
    return torch.compile(model, backend="paracompile", fullgraph=True, options=chosen)


def by_formula(model: nn.Module) -> Tensor:
    """The second step if what the blocks but the first add is that of the first step."""
    exits: list[list[Tensor]] = []
    for number in range(2):
        inputs = inputs_of(number)
        x = model.proj_in(inputs["hidden_states"]) * (1 + inputs["timestep"].reshape(-1, 1, 1))
        exits.append([x := block(x) for block in model.blocks])
    return model.proj_out(exits[1][0] + (exits[0][-1] - exits[0][0]))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("mode", quick([torch.no_grad, torch.inference_mode], torch.inference_mode))
@pytest.mark.parametrize(
    "place, kind", [*((place, KINDS[0]) for place in PLACES), ("all blocks", KINDS[1])], ids=lambda given: given
)
def test_a_quantised_model_with_the_cache(place: str, kind: str, mode: Callable[[], Any]) -> None:
    """Computed, skipped, and computed again after `set_rdt`: bit for bit the quantised model, or the formula."""
    model = quantised(place, kind)
    call = compiled(model)
    with mode(), paracompile.cache_context("only"):
        first, second = (call(**inputs_of(number))[0].clone() for number in range(2))
        assert [step.hit for step in paracompile.cache_stats(model).slots["only"]] == [False, True]
        assert torch.equal(first, model(**inputs_of(0))[0])
        torch.testing.assert_close(second, by_formula(model), rtol=1e-5, atol=1e-5)
        assert float((second - model(**inputs_of(1))[0]).abs().max()) > 1e-2
        paracompile.set_rdt(model, 0)
        for number in range(3):
            assert torch.equal(call(**inputs_of(number))[0], model(**inputs_of(number))[0])
        assert paracompile.cache_stats(model).hits == 0


@pytest.mark.slow
@pytest.mark.parametrize("family", quick(["flux", "wan"], "wan"))
def test_a_quantised_family_with_the_cache(family: str) -> None:
    model, inputs = ALL_FAMILIES[family].build()
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    assert sum(map(is_traceable_wrapper_subclass, model.parameters())) > 10
    call = compiled(model)
    with torch.no_grad(), paracompile.cache_context("only"):
        first = call(**inputs)[0]
        assert torch.equal(first, model(**inputs)[0])
        later = {**inputs, "timestep": inputs["timestep"] * 0.9}
        call(**later)
        paracompile.set_rdt(model, 0)
        assert torch.equal(call(**later)[0], model(**later)[0])


def test_statistics_tell_hits_of_a_quantised_model() -> None:
    model = quantised()
    call = compiled(model, max_consecutive_hits=1)
    with torch.no_grad(), paracompile.cache_context("only"):
        for number in range(4):
            call(**inputs_of(number))
    assert paracompile.cache_stats(model).as_dict()["only"]["hit"] == [False, True, False, True]


# The pass


class Held(torch.Tensor):
    """A weight that holds another one, which may be a subclass itself, and stands for a multiple of it."""

    inner: Tensor
    factor: float

    @staticmethod
    def __new__(cls, inner: Tensor, factor: float) -> Held:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())
        made.inner, made.factor = inner, factor
        return made

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["inner"], self.factor

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], factor: float, size: Any, stride: Any) -> Held:
        return Held(inner["inner"], factor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and isinstance(args[1], Held):
            x, weight, *bias = args
            return F.linear(x, weight.inner, *bias) * weight.factor
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} was not asked as a function")


def int8(out: int, width: int) -> Tensor:
    layer = nn.Linear(width, out, bias=False)
    layer.weight.data = draw(out, width, seed=out)
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    return layer.weight.data


def weights() -> dict[str, Tensor]:
    """Weights of 6 by 6."""
    inner = int8(6, 6)
    return {
        "plain": draw(6, 6),
        "int8": inner,
        "held": Held(draw(6, 6), 3.0),
        "held int8": Held(inner, 3.0),
        "held held int8": Held(Held(inner, 3.0), 0.5),
    }


def linear_node(graph: fx.Graph, x: fx.Node, weight: fx.Node) -> fx.Node:
    return graph.call_function(aten.linear.default, (x, weight))


def straight() -> fx.GraphModule:
    """Twice the same weight."""
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    graph.output((linear_node(graph, linear_node(graph, x, weight), weight),))
    return with_values(fx.GraphModule(nn.Module(), graph))


def conditional(*, outside: bool) -> fx.GraphModule:
    """The weight is read in one branch of a conditional, twice, and perhaps outside as well."""
    compute = fx.Graph()
    x, weight = compute.placeholder("x"), compute.placeholder("weight")
    compute.output((linear_node(compute, linear_node(compute, x, weight), weight),))
    reuse = fx.Graph()
    x = reuse.placeholder("x")
    reuse.placeholder("weight")
    reuse.output((reuse.call_function(aten.mul.Tensor, (x, 2)),))
    root = nn.Module()
    root.add_module(REUSE, fx.GraphModule(nn.Module(), reuse))
    root.add_module(COMPUTE, fx.GraphModule(nn.Module(), compute))
    graph = fx.Graph()
    x, weight, hit = (graph.placeholder(name) for name in ("x", "weight", "hit"))
    start = linear_node(graph, x, weight) if outside else x
    branches = (graph.get_attr(REUSE), graph.get_attr(COMPUTE))
    chosen = graph.call_function(COND, (hit, *branches, (start, weight)))
    graph.output((graph.call_function(operator.getitem, (chosen, 0)),))
    return with_values(fx.GraphModule(root, graph))


def with_values(gm: fx.GraphModule) -> fx.GraphModule:
    for each in (gm, *gm.children()):
        for node in each.graph.nodes:
            node.meta["val"] = None
    return gm


@pytest.mark.parametrize("name", weights())
def test_a_linear_asks_the_subclass(name: str) -> None:
    weight = weights()[name]
    x = draw(2, 5, 6)
    gm = dispatch_on_subclasses(straight(), [x, weight])
    assert torch.equal(gm(x, weight)[0], F.linear(F.linear(x, weight), weight))
    assert set(linears(gm)) == {aten.linear.default if name == "plain" else F.linear}


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("name", weights())
def test_so_does_one_in_a_branch_of_a_conditional(name: str, outside: bool) -> None:
    weight = weights()[name]
    x = draw(2, 5, 6)
    gm = dispatch_on_subclasses(conditional(outside=outside), [x, weight, torch.tensor(True)])
    gm.graph.lint()
    for hit in (True, False):
        start = F.linear(x, weight) if outside else x
        expected = start * 2 if hit else F.linear(F.linear(start, weight), weight)
        ((output,),) = run_lockstep([gm], [[x, weight, torch.tensor(hit)]])
        assert torch.equal(output, expected)
    found = [*linears(gm), *linears(gm.get_submodule(COMPUTE))]
    assert set(found) == {aten.linear.default if name == "plain" else F.linear}
    assert len(found) == 2 + outside


def linears(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.target in (aten.linear.default, F.linear)]


def test_the_report_of_a_quantised_model() -> None:
    """Its products count as the plain one's."""
    reports: list[Any] = []
    for model in (quantised(), randomise(Denoiser(3))):
        with torch.no_grad():
            compiled(model, report=reports.append)(**inputs_of(0))
    report, plain = reports
    assert (report.blocks, report.blocks_skipped) == (3, 2)
    assert report.flops_whole == report.flops_rank == plain.flops_rank > 0
    assert report.flops_skipped == plain.flops_skipped > 0


def test_and_of_a_rank_of_two() -> None:
    model = randomise(Transformer())
    plain = shard(model, [image_tokens()], 2).report
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    report = shard(model, [image_tokens()], 2).report
    assert (report.flops_rank, report.flops_whole) == (plain.flops_rank, plain.flops_whole)
    assert report.flops_rank < 0.6 * report.flops_whole
