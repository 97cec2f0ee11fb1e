"""The threshold: "auto", and `set_rdt` at run time."""

from __future__ import annotations

import gc
import math
import warnings
from typing import Any

import pytest
import torch
from denoising import STEPS, build, compiled, generate, prompts, steps_of
from families import ALL_FAMILIES
from random_tensors import randomise
from small_models import Transformer, image_tokens
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import paracompile
from paracompile import OptionError, cache_stats, reset_cache, set_rdt
from paracompile.report.report import Report
from paracompile.runtime.cached_call import CachedCall, caches_of
from paracompile.thresholds import default_rdt

KNOWN = {
    "FluxTransformer2DModel": (0.08, 0.12),
    "HunyuanVideoTransformer3DModel": (0.06, 0.06),
    "MochiTransformer3DModel": (0.035, 0.035),
    "CogVideoXTransformer3DModel": (0.025, 0.025),
}


def threshold_of(model: nn.Module) -> float:
    """What the options said, by the graph that was called."""
    ((like,),) = (tuple(held.slots) for cache in caches_of(model.parameters()) for held in cache.held.values())
    calls = (each for each in gc.get_objects() if type(each) is CachedCall)
    (threshold,) = (call.threshold for call in calls if call.like is like)
    return threshold


# "auto"


@pytest.mark.parametrize("name", KNOWN)
def test_known_thresholds(name: str) -> None:
    assert default_rdt(["Other", name, "Another"], quantised=False) == KNOWN[name][0]
    assert default_rdt([name], quantised=True) == KNOWN[name][1]


@pytest.mark.parametrize("names, said", [(["A", "B"], "no threshold is known for A:"), ([], "for this model:")])
def test_an_unknown_class_names_the_known(names: list[str], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        default_rdt(names, quantised=False)
    for word in ("'rdt' = 'auto'", said, "give a number", *KNOWN):
        assert word in str(caught.value)


@pytest.mark.slow
def test_auto_takes_the_class_s() -> None:
    model = compiled(build("cogvideox"), rdt="auto")
    next(steps_of(model, prompts("cogvideox")))
    assert threshold_of(model) == 0.025


@pytest.mark.slow
def test_auto_in_a_function_that_calls_the_model() -> None:
    model, of = build("flux"), prompts("flux")

    def denoise(**inputs: Any) -> Any:
        return model(**inputs)

    call = torch.compile(denoise, backend="paracompile", options={"compiler": "eager", "rdt": "auto"})
    generate(call, of, steps=1)
    assert threshold_of(model) == 0.08


@pytest.mark.slow
def test_auto_with_quantised_weights() -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    module = build("flux", heads=4)
    quantize_(module, Int8DynamicActivationInt8WeightConfig())
    model = compiled(module, rdt="auto")
    loop = steps_of(model, prompts("flux"))
    next(loop)
    assert threshold_of(model) == 0.12
    set_rdt(model, 1e9)
    *_, last = loop
    assert cache_stats(model).hits > 0
    assert torch.isfinite(last).all()


@pytest.mark.parametrize("as_function", [False, True], ids=["module", "function"])
def test_auto_for_a_model_that_is_not_known(as_function: bool) -> None:
    model = build("wan")
    options = {"compiler": "eager", "rdt": "auto"}
    call = torch.compile(
        (lambda **inputs: model(**inputs)) if as_function else model, backend="paracompile", options=options
    )
    with pytest.raises(BackendCompilerFailed, match="no threshold is known for WanTransformer3DModel: give a number"):
        generate(call, prompts("wan"), steps=1)


# set_rdt


@pytest.mark.slow
def test_it_changes_what_is_skipped_and_nothing_is_compiled_anew() -> None:
    reports: list[Report] = []
    model, of = compiled(build("wan"), rdt=1e-9, report=reports.append), prompts("wan")
    found = {}
    for rdt in (None, 1e9, 0, 1e9, 1e-9):
        if rdt is not None:
            set_rdt(model, rdt)
        found[rdt] = generate(model, of)
        assert cache_stats(model).steps == 2 * STEPS
        assert (cache_stats(model).hits > 0) == (rdt == 1e9)
    assert len(reports) == 1
    assert torch.equal(found[None], found[0])
    assert not torch.equal(found[1e9], found[0])


@pytest.mark.slow
def test_the_difference_of_a_step_is_what_it_is_compared_with() -> None:
    """A hit where the difference is below the threshold, by a hair on either side."""
    model, of = compiled(build("wan"), rdt=1e-9), prompts("wan")
    generate(model, of, naming="paracompile", steps=2)
    difference = cache_stats(model).slots["cond"][1].difference
    assert difference is not None
    for factor, hit in ((1.001, True), (0.999, False)):
        set_rdt(model, factor * difference)
        generate(model, of, naming="paracompile", steps=2)
        assert cache_stats(model).slots["cond"][1].hit is hit


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[] if name == "wan" else pytest.mark.full) for name in ALL_FAMILIES],
)
def test_zero_equals_a_graph_without_a_cache_bit_for_bit(family: str) -> None:
    model, of = compiled(build(family)), prompts(family)
    set_rdt(model, 0)
    computed = generate(model, of)
    assert cache_stats(model).as_dict().keys() == {"call 1", "call 2"}
    assert cache_stats(model).hits == 0
    torch._dynamo.reset()
    plain = torch.compile(build(family), backend="paracompile", options={"compiler": "eager"})
    assert torch.equal(computed, generate(plain, of))


@pytest.mark.slow
def test_before_the_first_call_and_again_after_dynamo_was_reset() -> None:
    model, of = compiled(build("wan")), prompts("wan")
    set_rdt(model, 0)
    for _ in range(2):
        generate(model, of)
        assert cache_stats(model).steps == 2 * STEPS
        assert cache_stats(model).hits == 0
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("given", ["the compiled module", "the model"])
def test_either_may_be_given(given: str) -> None:
    module = build("wan")
    model = compiled(module)
    owner, other = (model, module) if given == "the compiled module" else (module, model)
    set_rdt(owner, 0)
    generate(model, prompts("wan"))
    assert cache_stats(other).as_dict() == cache_stats(owner).as_dict()
    assert (cache_stats(owner).steps, cache_stats(owner).hits) == (2 * STEPS, 0)
    set_rdt(other, 1e9)
    generate(model, prompts("wan"))
    assert cache_stats(owner).hits > 0
    reset_cache(owner)


def test_a_model_compiled_in_place() -> None:
    model, of = build("wan"), prompts("wan")
    model.compile(backend="paracompile", options={"compiler": "eager", "rdt": 1e9})
    generate(model, of)
    assert cache_stats(model).hits > 0
    set_rdt(model, 0)
    generate(model, of)
    assert cache_stats(model).hits == 0


@pytest.mark.slow
def test_a_function_that_calls_the_model() -> None:
    model, of = build("wan"), prompts("wan")

    def denoise(**inputs: Any) -> Any:
        return model(**inputs)

    call = torch.compile(denoise, backend="paracompile", options={"compiler": "eager", "rdt": 1e9})
    generate(call, of)
    assert cache_stats(model).hits > 0
    set_rdt(model, 0)
    generate(call, of)
    assert cache_stats(model).hits == 0
    for ask in (cache_stats, reset_cache, lambda function: set_rdt(function, 0)):
        with pytest.raises(OptionError, match="give the compiled module, or the module that a compiled function calls"):
            ask(call)  # type: ignore[arg-type]


@pytest.mark.slow
def test_only_the_model_that_is_given() -> None:
    first, second = compiled(build("wan")), compiled(build("wan"))
    set_rdt(first, 0)
    for model in (first, second):
        generate(model, prompts("wan"))
    assert cache_stats(first).hits == 0
    assert cache_stats(second).hits > 0


@pytest.mark.parametrize("rdt", [-0.1, math.nan, math.inf, True, False, None, "0.1", "auto", [0.1], 1j])
def test_no_threshold(rdt: Any) -> None:
    with pytest.raises(OptionError, match="give a finite number of at least 0") as caught:
        set_rdt(nn.Linear(2, 2), rdt)
    assert repr(rdt) in str(caught.value)


@pytest.mark.parametrize(
    "model", [None, "model", torch.sin, [nn.Linear(2, 2)]], ids=["none", "text", "function", "list"]
)
def test_no_module(model: Any) -> None:
    for ask in (cache_stats, reset_cache, lambda given: set_rdt(given, 0.1)):
        with pytest.raises(OptionError, match="give the compiled module"):
            ask(model)


# Models that have no cache


def said_without_a_cache(model: Any) -> None:
    for ask in (cache_stats, lambda given: set_rdt(given, 0.1)):
        with pytest.raises(
            OptionError, match=r'compiled without a first block cache: give torch.compile options=\{"rdt"'
        ):
            ask(model)
    reset_cache(model)  # of nothing there is nothing to forget


@pytest.mark.parametrize("options", [{}, {"rdt": None}, {"rdt": 0}], ids=str)
def test_compiled_without_it_is_told_before_the_first_call_and_after(options: dict[str, Any]) -> None:
    module = randomise(Transformer())
    model = torch.compile(module, backend="paracompile", options={"compiler": "eager", **options})
    said_without_a_cache(model)
    with torch.no_grad():
        model(image_tokens())
    said_without_a_cache(model)
    said_without_a_cache(module)


def test_compiled_in_place_without_it_is_told_once_it_is_compiled() -> None:
    module = randomise(Transformer())
    module.compile(backend="paracompile", options={"compiler": "eager"})
    set_rdt(module, 0.1)  # who compiles it, and how, is not known yet
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="set_rdt was called for a model that is now compiled without"),
    ):
        module(image_tokens())
    said_without_a_cache(module)


@pytest.mark.slow
def test_a_model_that_is_compiled_both_ways_has_one() -> None:
    module, of = build("wan"), prompts("wan")
    plain = torch.compile(module, backend="paracompile", options={"compiler": "eager"})
    generate(plain, of, steps=1)
    model = compiled(module)
    set_rdt(model, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, of, steps=2)
    assert (cache_stats(module).steps, cache_stats(module).hits) == (4, 0)
    said_without_a_cache(plain)


def test_never_compiled_is_no_call_yet() -> None:
    assert str(paracompile.cache_stats(nn.Linear(2, 2))) == "first block cache: no call yet"
