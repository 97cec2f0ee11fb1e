"""One call sets a pipeline up: on one rank here, on several in `distributed/test_parallelize_on_gloo.py`."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import ALWAYS
from diffusers import DiffusionPipeline, FluxPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import paracompile
from paracompile import OptionError, cache_stats, parallelize, set_rdt

FOLDER = Path(__file__).parents[1] / "examples" / "tiny_flux"
PROMPT = "a large red circle on a blue background in the middle"


@cache
def _loaded() -> FluxPipeline:
    return FluxPipeline.from_pretrained(FOLDER, dtype=torch.float32)


def load() -> FluxPipeline:
    pipe = copy.copy(_loaded())
    pipe.transformer = copy.deepcopy(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **how: Any) -> Tensor:
    size, tokens = pipe.vae.config.sample_size, pipe.tokenizer_2.model_max_length
    how = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(1), **how}
    output = pipe(
        PROMPT, height=size, width=size, max_sequence_length=tokens, output_type="latent", return_dict=False, **how
    )
    found: Tensor = output[0]
    return found


def test_a_pipeline_is_compiled_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    pipe = load()
    transformer, kind = pipe.transformer, type(pipe)
    plain = latents(pipe)
    assert parallelize(pipe, rdt=ALWAYS, compiler="eager") is pipe
    assert pipe.transformer is transformer
    assert type(pipe) is kind  # on one rank there is nothing to keep together
    assert capsys.readouterr().out.splitlines() == [
        "paracompile: FluxPipeline on one rank",
        "  transformer (FluxTransformer2DModel): compiled at its first call, rdt=1000000000.0, compiler='eager'",
    ]
    cached = latents(pipe)
    assert cache_stats(transformer).hits == 3
    assert not torch.equal(cached, plain)
    set_rdt(transformer, 0)
    assert torch.allclose(latents(pipe), plain, rtol=1e-4, atol=1e-5)


def test_with_the_default_compiler() -> None:
    pipe = load()
    plain = latents(pipe)
    parallelize(pipe, rdt=ALWAYS)
    set_rdt(pipe.transformer, 0)
    assert torch.allclose(latents(pipe), plain, rtol=1e-4, atol=1e-4)


def test_again_with_other_options() -> None:
    pipe = load()
    parallelize(pipe, rdt=ALWAYS, compiler="eager")
    latents(pipe)
    parallelize(pipe, compiler="eager")
    latents(pipe)
    assert pipe.transformer._compiled_call_impl is not None


@pytest.mark.parametrize("how", ["int8", "configuration"])
def test_quantised(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    from torchao.quantization import Int8WeightOnlyConfig

    pipe = load()
    plain = latents(pipe)
    parallelize(pipe, quantize=Int8WeightOnlyConfig() if how == "configuration" else how, compiler="eager")
    assert "quantize=" in capsys.readouterr().out
    weights = [module.weight for module in pipe.transformer.modules() if isinstance(module, nn.Linear)]
    assert all(map(is_traceable_wrapper_subclass, weights))
    found = latents(pipe)
    difference = (found - plain).abs().max() / plain.abs().max()
    assert 0 < difference < 0.3


@pytest.mark.parametrize("how", ["fp8", "fp8-row"])
def test_what_the_device_cannot_multiply(how: str) -> None:
    pipe = load()
    with pytest.raises(OptionError, match=r'device cpu does not multiply in float8 .*"int8" works here'):
        parallelize(pipe, quantize=how)
    assert pipe.transformer._compiled_call_impl is None


class Other(DiffusionPipeline):
    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.register_modules(unet=unet)


def test_what_cannot_work_is_an_error() -> None:
    with pytest.raises(OptionError, match=r"it has no transformer \(its modules: unet\)"):
        parallelize(Other(nn.Linear(2, 2)))
    with pytest.raises(OptionError, match="there is no such option; did you mean 'rdt'"):
        parallelize(load(), rtd=0.1)
    with pytest.raises(OptionError, match='give "all" or "first"'):
        parallelize(load(), output="some")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="give one of int8"):
        parallelize(load(), quantize="int3")


def test_it_is_documented() -> None:
    options = inspect.signature(paracompile.parallelize).parameters
    documentation = inspect.getdoc(paracompile.parallelize) or ""
    assert all(f"{name}:" in documentation for name in options)
