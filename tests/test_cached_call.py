"""The callable of a graph with a cache: one graph, and what happens when a call fails or gives no numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from denoising import Cut, Prompts, build, compiled, generate, prompts, slots_of, steps_of
from random_tensors import draw, randomise
from small_models import image_tokens
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from paracompile import ParacompileError, cache_stats, set_rdt
from paracompile.report.report import Report
from paracompile.runtime.cached_call import caches_of

HITS = [False, False, True, True, True]


def hits(model: nn.Module, slot: str = "call 1") -> list[bool]:
    return [step.hit for step in cache_stats(model).slots[slot]]


# One graph


def test_there_is_one_graph_without_a_break_for_hits_misses_and_every_threshold() -> None:
    torch._dynamo.utils.counters.clear()
    reports: list[Report] = []
    model, of = compiled(build("flux"), report=reports.append), prompts("flux")
    for rdt in (1e9, 0, 0.5):
        set_rdt(model, rdt)
        for naming in ("unnamed", "paracompile", "diffusers"):
            generate(model, of, naming=naming, steps=3)
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    (report,) = reports
    assert (report.blocks, report.blocks_skipped, report.notes) == (4, 3, ())
    assert 0.5 < report.flops_skipped / report.flops_rank < 1
    residual = of.noise.shape[0] * of.noise.shape[1] * 64 * 4  # float32 of the image's tokens, 4 heads of 16
    assert report.state_bytes == 2 * residual
    with torch.no_grad():
        outputs = model(hidden_states=of.noise, timestep=torch.full((3,), 0.5), **of.conditioning["cond"])
    assert isinstance(outputs, tuple)
    assert len(outputs) == 1


def test_without_rdt_there_is_no_trace() -> None:
    reports: list[Report] = []
    options = {"compiler": "eager", "report": reports.append}
    model = torch.compile(build("wan"), backend="paracompile", fullgraph=True, options=options)
    assert isinstance(model, nn.Module)
    generate(model, prompts("wan"), steps=2)
    assert reports == [Report(ranks=1)]
    assert slots_of(model) == []


@pytest.mark.slow
def test_under_aot_eager_it_is_the_same() -> None:
    of = prompts("wan")
    eager = generate(compiled(build("wan")), of)
    torch._dynamo.reset()
    model = compiled(build("wan"), compiler="aot_eager")
    traced = generate(model, of)
    assert hits(model) == HITS
    assert (traced - eager).abs().max() < 1e-4 * eager.abs().max()


@pytest.mark.slow
def test_inference_mode_and_no_grad_in_turn() -> None:
    """State is made outside inference mode, so that either may write to it."""
    model, of = compiled(build("wan")), prompts("wan")
    expected = generate(model, of, naming="paracompile")
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            assert torch.equal(generate(model, of, naming="paracompile"), expected)
        assert hits(model, "cond") == [False, True, True, True, True]
        assert not any(value.is_inference() for slot in slots_of(model) for value in slot.state)


# A call that fails

tripped: list[bool] = []


@torch.library.custom_op("paracompile_tests::trip", mutates_args=())
def trip(x: Tensor) -> Tensor:
    """Raises when `tripped` says so, and else copies."""
    if tripped:
        raise Cut("inside the model")
    return x.clone()


@trip.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Trip(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = trip(self.inner(x))
        return result


@pytest.fixture
def _repaired() -> Iterator[None]:
    yield
    tripped.clear()


def with_trip(where: str) -> nn.Module:
    module: Any = build("wan")
    if where == "after the blocks":
        module.norm_out = Trip(module.norm_out)
    else:
        block = module.blocks[0 if where == "the first block" else 1]
        block.ffn = Trip(block.ffn)
    return compiled(module)


@pytest.mark.sampled(1)
@pytest.mark.usefixtures("_repaired")
@pytest.mark.parametrize("where", ["the first block", "the blocks that are skipped", "after the blocks"])
def test_a_call_that_fails_leaves_no_state(where: str) -> None:
    """In the first step and in the third; where some state was written already, too."""
    of = prompts("wan", seed=1)
    other = Prompts(prompts("wan", seed=2).noise, of.scale, of.conditioning)
    for naming in ("unnamed", "paracompile"):
        alone = generate(with_trip(where), of, naming=naming)
        for step in (0, 2):
            model = with_trip(where)
            if where == "the blocks that are skipped":  # or the third step would not come there
                set_rdt(model, 1e-9)
            loop = steps_of(model, other, naming=naming)
            for _ in range(step):
                next(loop)
            tripped.append(True)
            with pytest.raises(Cut, match="inside the model"):
                next(loop)
            tripped.clear()
            assert cache_stats(model).steps == 2 * step  # a call that failed is no step
            assert len(slots_of(model)) == (1 if step else 0)  # of the other pass
            for cache in caches_of(model.parameters()):
                cache.threshold = None  # as it was, and nothing forgotten
            assert torch.equal(generate(model, of, naming=naming), alone)
            assert cache_stats(model).hits > 0


# No numbers


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("order", [0, 1])
def test_what_is_no_number_is_computed_and_never_reused(bad: float, order: int) -> None:
    module, of = build("wan"), prompts("wan")
    model = compiled(module, taylor_order=order)
    conditioning = of.conditioning["cond"]
    samples = [draw(*of.noise.shape, seed=seed) for seed in range(7)]
    samples[3][0, 0, 0, 0, 0] = bad
    with torch.no_grad():
        for number, sample in enumerate(samples):
            times = torch.full((len(sample),), 900.0 - 100 * number)
            (found,) = model(sample, timestep=times, **conditioning)
            (expected,) = module(sample, timestep=times, **conditioning)
            assert bool(found.isfinite().all()) == (number != 3)
            if number == 4:  # what was stored in step 3 is no number: computed
                assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert hits(model) == [False, False, True, False, False, True, True]
    assert cache_stats(model).slots["call 1"][3].difference is None


# What is declined


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("of", ["the weights", "the input"])
def test_wanted_gradients_are_declined_on_one_rank_too(of: str) -> None:
    module, given = build("wan"), prompts("wan")
    sample = given.noise.clone()
    (module if of == "the weights" else sample).requires_grad_(True)
    model = compiled(module)

    def call() -> Any:
        return model(sample, timestep=torch.full((len(sample),), 900.0), **given.conditioning["cond"])

    with pytest.raises(BackendCompilerFailed, match="sharded or cached has none: call the model under") as caught:
        call()
    assert isinstance(caught.value.inner_exception, ParacompileError)
    with torch.no_grad():
        (output,) = call()
    assert output.shape == sample.shape


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(10, 10)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return x + torch.nn.functional.scaled_dot_product_attention(x, self.linear(x), x) * timestep


def test_a_model_without_blocks_is_told() -> None:
    reports: list[Report] = []
    module = randomise(OneBlock())
    model = compiled(module, report=reports.append)
    steps = [(image_tokens(seed=step), torch.tensor(0.9 - 0.1 * step)) for step in range(3)]
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="rdt was given, and this graph has no repeated blocks") as caught,
    ):
        found = [model(*step) for step in steps]
    assert len([each for each in caught if "no repeated blocks" in str(each.message)]) == 1
    for step, output in zip(steps, found, strict=True):
        assert torch.allclose(output, module(*step), atol=1e-5)
    (report,) = reports
    assert (report.blocks, report.blocks_skipped, report.state_bytes) == (0, 0, 0)
    (note,) = report.notes
    assert "nothing of it is ever skipped" in note
    assert "no repeated blocks" in str(report)
    assert cache_stats(model).plain == 1
    said = "first block cache: graphs of the model without blocks to skip, whose calls are not counted: 1"
    assert str(cache_stats(model)) == said


def test_a_model_with_blocks_is_not() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(steps_of(compiled(build("wan")), prompts("wan")))


@pytest.mark.slow
def test_a_threshold_that_was_set_ends_where_the_model_is_compiled_with_another() -> None:
    module, of = build("wan"), prompts("wan")
    model = compiled(module)
    set_rdt(model, 0)
    generate(model, of, naming="paracompile")
    assert cache_stats(model).hits == 0
    larger = prompts("wan", batch=2)  # one more graph of the same options: what was set stays
    generate(model, larger, naming="paracompile")
    assert cache_stats(model).hits == 0
    again = compiled(module, rdt=1e8)
    generate(again, of, naming="paracompile")
    assert cache_stats(again).hits > 0
