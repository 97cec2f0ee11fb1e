"""Models quantised by torchao, before they are compiled: whichever way, the same picture as the quantised model's.

Bounds are of the largest value. On one rank and interpreted, nothing differs. Where anything is computed in another
order, rounding may move a value that is quantised to its neighbour: 8 bits are then off by one. Ranks that exchange
all tokens' range by Ulysses give the very same numbers.
"""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from denoising import ALWAYS
from diffusers import FluxPipeline, FluxTransformer2DModel, PipelineQuantizationConfig, TorchAoConfig
from quantised import BY_TENSOR, KINDS, WIDTH, block, quantise, tokens
from quick import quick
from random_tensors import draw, randomise
from small_models import Denoiser, mesh_name, shard
from test_parallelize import FOLDER, latents, load
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import paracompile
from paracompile.errors import GraphError
from paracompile.passes.shared_scales import scales_all_at_once

EXACT = 1e-6
ONE_OFF = 0.05
"""What values that are quantised to their neighbours make of a picture, at most."""


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


# One rank


def trained(how: TorchAoConfig | None = None) -> Any:
    """With all its blocks, as they were trained: what rounding makes of a picture depends on them."""
    pipe = load()
    pipe.transformer = FluxTransformer2DModel.from_pretrained(
        FOLDER, subfolder="transformer", quantization_config=how, dtype=torch.float32
    )
    return pipe


def by_quantize_(kind: str) -> Any:
    pipe = trained()
    quantise(pipe.transformer, kind)
    return pipe


def by_model(kind: str) -> Any:
    return trained(TorchAoConfig(KINDS[kind]()))


def by_pipeline(kind: str) -> Any:
    how = PipelineQuantizationConfig(quant_mapping={"transformer": TorchAoConfig(KINDS[kind]())})
    pipe = FluxPipeline.from_pretrained(FOLDER, quantization_config=how, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


WAYS = {"quantize_": by_quantize_, "TorchAoConfig": by_model, "PipelineQuantizationConfig": by_pipeline}
QUICK = {("float8 weights", "quantize_"), ("int8 weights", "TorchAoConfig"), ("int8", "PipelineQuantizationConfig")}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, way",
    [pytest.param(kind, way, marks=[] if (kind, way) in QUICK else pytest.mark.full) for kind in KINDS for way in WAYS],
)
def test_each_way_of_quantising_with_the_cache(kind: str, way: str) -> None:
    pipe = WAYS[way](kind)
    weights = [parameter for parameter in pipe.transformer.parameters() if is_traceable_wrapper_subclass(parameter)]
    assert len(weights) > 50
    expected = latents(pipe)
    assert 0.001 < difference(expected, latents(trained())) < ONE_OFF
    paracompile.parallelize(pipe, rdt=ALWAYS, compiler="eager", fullgraph=True)
    skipped = latents(pipe)
    assert paracompile.cache_stats(pipe.transformer).hits == 3
    assert difference(skipped, expected) > 0.1
    paracompile.set_rdt(pipe.transformer, 0)
    assert torch.equal(latents(pipe), expected)


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("kind, bound", [("float8 weights", 1e-5), ("int8 weights", 1e-5), ("int8", ONE_OFF)])
def test_under_inductor_with_the_cache(kind: str, bound: float) -> None:
    pipe = by_quantize_(kind)
    expected = latents(pipe, num_inference_steps=2)
    paracompile.parallelize(pipe, rdt=ALWAYS)
    skipped = latents(pipe, num_inference_steps=2)
    assert paracompile.cache_stats(pipe.transformer).hits == 1
    assert difference(skipped, expected) > 0.1
    paracompile.set_rdt(pipe.transformer, 0)
    assert difference(latents(pipe, num_inference_steps=2), expected) < bound


@pytest.mark.parametrize("kind", quick(["int8", "int8 weights"], "int8"))
def test_a_model_is_moved_after_its_first_call(kind: str) -> None:
    """As offloading does. torch moves a quantised weight only if nothing refers to it weakly."""
    model = quantise(randomise(Denoiser(channels=WIDTH)), kind)
    torch._dynamo.reset()
    call = torch.compile(model, backend="paracompile", fullgraph=True, options={"rdt": 1e-9, "compiler": "eager"})
    sample = draw(2, 12, WIDTH)
    for threshold, hits in ((ALWAYS, [False, True, True]), (0, [False, False, False])):
        paracompile.set_rdt(model, threshold)
        paracompile.reset_cache(model)
        with torch.no_grad(), paracompile.cache_context("cond"):
            for time in (0.9, 0.8, 0.7):
                (found,) = call(sample, torch.full((2,), time))
                model.to("cpu")
        assert [step.hit for step in paracompile.cache_stats(model).slots["cond"]] == hits
    with torch.no_grad():
        assert torch.equal(found, model(sample, torch.full((2,), time))[0])


# Several ranks, in lockstep

MESHES: list[Any] = [2, 3, {"batch": 2, "ulysses": 2}]
RING: dict[str, int] = {"ring": 2, "ulysses": 2}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mesh", quick(MESHES, 2, {"batch": 2, "ulysses": 2}), ids=mesh_name)
@pytest.mark.parametrize("kind", [*KINDS, "float8, by row"])
def test_ranks_give_what_one_gives_and_exchange_nothing_for_it(kind: str, mesh: Any) -> None:
    model, x = block(kind), tokens(kind)
    with torch.no_grad():
        expected = model(x)
    sharded = shard(model, [x], mesh)
    assert difference(sharded.result, expected) < EXACT
    assert "all_reduce" not in sharded.collectives


@pytest.mark.sampled(3)
@pytest.mark.parametrize("mesh", quick(MESHES, 2, {"batch": 2, "ulysses": 2}), ids=mesh_name)
@pytest.mark.parametrize("kind", BY_TENSOR)
def test_one_scale_for_all_tokens_is_of_all_ranks_tokens(kind: str, mesh: Any) -> None:
    """Queries, keys and values share one exchange; three more layers have one each."""
    model, x = block(kind), tokens(kind)
    with torch.no_grad():
        expected = model(x)
    sharded = shard(model, [x], mesh)
    assert difference(sharded.result, expected) < EXACT
    assert sharded.collectives["all_reduce"] == 4
    assert "one scale for all tokens: quantised layers exchange the range of 4 inputs in a call" in str(sharded.report)


@pytest.mark.parametrize("kind", ["int8", "int8, by tensor"])
def test_in_a_ring_a_value_may_be_quantised_to_its_neighbour(kind: str) -> None:
    model, x = block(kind), tokens(kind)
    with torch.no_grad():
        expected = model(x)
    assert difference(shard(model, [x], RING).result, expected) < ONE_OFF


@pytest.mark.parametrize("kind", ["int8, by tensor", "float8, by tensor"])
def test_without_the_exchange_ranks_would_give_another_picture(kind: str) -> None:
    model, x = block(kind), tokens(kind)
    with torch.no_grad():
        expected = model(x)
    lower = importlib.import_module("paracompile.passes.lower")  # the package's name for it is the pass's
    with mock.patch.object(lower, "scales_all_at_once", return_value=False):
        assert difference(shard(model, [x], 2).result, expected) > 0.001


def test_a_rank_without_tokens_cannot_have_their_scale() -> None:
    kind = "int8, by tensor"
    with pytest.raises(GraphError, match=r"quantise with a scale for each row \(torchao's PerRow\)"):
        shard(block(kind), [tokens(kind, length=2)], 3)


def test_which_weights_take_one_scale() -> None:
    assert {kind: scales_all_at_once(block(kind).mlp[0].weight) for kind in (*KINDS, "float8, by row", *BY_TENSOR)} == {
        **dict.fromkeys(KINDS, False),
        "float8, by row": False,
        **dict.fromkeys(BY_TENSOR, True),
    }
    assert not scales_all_at_once(draw(WIDTH, WIDTH))


# What hardware refuses


@pytest.mark.parametrize("how", ["fp8", "fp8-row"])
@pytest.mark.parametrize(
    "device, here", [("cpu", "device cpu"), ("cuda", "NVIDIA A100")], ids=["a CPU", "a GPU before Ada"]
)
def test_what_works_instead_is_told_in_a_line(how: str, device: str, here: str) -> None:
    from paracompile.quantization import quantise as by_name

    module = mock.MagicMock()
    module.parameters.return_value = iter([mock.Mock(device=torch.device(device))])
    with (
        mock.patch("torch.cuda.get_device_capability", return_value=(8, 0)),
        mock.patch("torch.cuda.get_device_name", return_value="NVIDIA A100"),
        pytest.raises(paracompile.OptionError) as refused,
    ):
        by_name(module, how)
    told = str(refused.value)
    assert "\n" not in told
    assert f'{here} does not multiply in float8 (from compute capability 8.9 on): "int8" works here' in told
