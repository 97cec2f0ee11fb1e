"""One call sets a pipeline up: on one rank here, on several in `distributed/test_parallelize_on_gloo.py`."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from denoising import ALWAYS
from diffusers import DiffusionPipeline, FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict
from random_tensors import draw, randomise
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import paracompile
from paracompile import OptionError, cache_stats, parallelize, set_rdt

FOLDER = Path(__file__).parents[1] / "examples" / "tiny_flux"
PROMPT = "a large red circle on a blue background in the middle"


@cache
def _loaded() -> FluxPipeline:
    """With two blocks: which picture it makes does not matter here."""
    pipe = FluxPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    config = {**pipe.transformer.config, "num_layers": 1, "num_single_layers": 1}
    pipe.transformer = randomise(type(pipe.transformer).from_config(config))
    return pipe


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


def test_the_vae_too(capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    plain, pipe = load(), load()
    pipe.vae = copy.deepcopy(pipe.vae)
    size = pipe.vae.config.sample_size
    parallelize(pipe, rdt=ALWAYS, taylor_order=1, compiler="eager", vae=True)
    said = capsys.readouterr().out.splitlines()
    assert said[2:] == [
        f"  vae.{name}: compiled at its first call, compiler='eager'"
        for name in ("encoder (Encoder)", "decoder (Decoder)")
    ]
    image = draw(1, 3, size, size).sigmoid()
    with torch.no_grad():
        latent = plain.vae.encode(image).latent_dist.mode()
        assert torch.allclose(pipe.vae.encode(image).latent_dist.mode(), latent, rtol=1e-4, atol=1e-5)
        assert torch.allclose(pipe.vae.decode(latent).sample, plain.vae.decode(latent).sample, rtol=1e-4, atol=1e-5)
    assert all(half._compiled_call_impl is not None for half in (pipe.vae.encoder, pipe.vae.decoder))


def test_one_rank_holds_all_text_encoders() -> None:
    pipe = parallelize(load(), compiler="eager", text_encoders=True)
    assert torch.equal(latents(pipe), latents(load()))


@pytest.mark.full
def test_with_the_default_compiler() -> None:
    plain, interpreted, pipe = load(), load(), load()
    parallelize(interpreted, rdt=ALWAYS, compiler="eager")
    parallelize(pipe, rdt=ALWAYS)
    assert torch.allclose(latents(pipe), latents(interpreted), rtol=1e-4, atol=1e-4)
    assert cache_stats(pipe.transformer).hits == 3
    set_rdt(pipe.transformer, 0)
    assert torch.allclose(latents(pipe), latents(plain), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_again_with_other_options() -> None:
    pipe = load()
    parallelize(pipe, rdt=ALWAYS, compiler="eager")
    latents(pipe)
    parallelize(pipe, compiler="eager")
    latents(pipe)
    assert pipe.transformer._compiled_call_impl is not None


def with_adapters(pipe: Any) -> Iterator[Tensor]:
    """What a pipeline draws as adapters come, change their scale, are fused and go."""

    def add(name: str, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_mlp"]
            config = LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets)
            pipe.transformer.add_adapter(config, adapter_name=name)

    yield latents(pipe)
    add("one", 1)
    yield latents(pipe)
    for scale in (0.5, 0.25, 0.125):
        pipe.set_adapters(["one"], [scale])
        yield latents(pipe)
    add("two", 2)
    for scales in ([0.5, 0.75], [0.25, 0.5], [0.125, 0.25]):
        pipe.set_adapters(["one", "two"], scales)
        yield latents(pipe)
    pipe.fuse_lora(adapter_names=["one"])
    yield latents(pipe)
    pipe.unfuse_lora()
    yield latents(pipe)
    pipe.unload_lora_weights()
    yield latents(pipe)


@pytest.mark.full
def test_adapters_come_and_go_and_a_scale_that_changes_compiles_nothing() -> None:
    torch._dynamo.reset()
    pipe = parallelize(load(), rdt=ALWAYS, compiler="eager")
    set_rdt(pipe.transformer, 0)
    expected, compiled = list(with_adapters(load())), []
    counters.clear()
    for found, plain in zip(with_adapters(pipe), expected, strict=True):
        assert torch.allclose(found, plain, rtol=1e-4, atol=1e-5)
        compiled.append(counters["stats"]["unique_graphs"])
    assert len({tuple(each.flatten()[:8].tolist()) for each in expected}) >= 8  # each state draws another picture
    assert compiled[2] == compiled[3] == compiled[4]  # the first change of a scale shows that it changes
    assert compiled[6] == compiled[7]
    assert compiled[-1] <= 8


def saved_adapter(folder: Path, seed: int, rank: int) -> Path:
    pipe = load()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"])
        pipe.transformer.add_adapter(config)
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer))
    return folder


@pytest.mark.slow
def test_adapters_that_are_swapped_compile_nothing(tmp_path: Path) -> None:
    torch._dynamo.reset()
    folders = [saved_adapter(tmp_path / str(seed), seed, rank) for seed, rank in ((1, 4), (2, 2))]
    plain, pipe = load(), load()
    for each in (plain, pipe):
        each.enable_lora_hotswap(target_rank=8)
        each.load_lora_weights(folders[0], adapter_name="one")
    parallelize(pipe, rdt=ALWAYS, compiler="eager")
    set_rdt(pipe.transformer, 0)
    counters.clear()
    pictures = []
    for folder in (None, folders[1], folders[0]):
        for each in (plain, pipe):
            if folder is not None:
                each.load_lora_weights(folder, adapter_name="one", hotswap=True)
        pictures.append(latents(plain))
        assert torch.allclose(latents(pipe), pictures[-1], rtol=1e-4, atol=1e-5)
    assert (pictures[0] - pictures[1]).abs().max() > 0.1
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("offloaded_first", [True, False])
def test_a_transformer_that_is_offloaded_as_a_whole_skips(offloaded_first: bool) -> None:
    """What `enable_model_cpu_offload` does, to a device that is here."""
    torch._dynamo.reset()
    plain, pipe = latents(load()), load()
    if not offloaded_first:
        parallelize(pipe, rdt=ALWAYS, compiler="eager")
    pipe.transformer, _ = cpu_offload_with_hook(pipe.transformer, "cpu")
    if offloaded_first:
        parallelize(pipe, rdt=ALWAYS, compiler="eager")
    counters.clear()
    latents(pipe)
    assert cache_stats(pipe.transformer).hits == 3
    assert counters["stats"]["unique_graphs"] == 1
    set_rdt(pipe.transformer, 0)
    assert torch.allclose(latents(pipe), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_transformer_that_is_offloaded_block_by_block_runs_in_pieces_and_says_so() -> None:
    torch._dynamo.reset()
    plain, pipe = latents(load()), parallelize(load(), rdt=ALWAYS, compiler="eager")
    cpu_offload(pipe.transformer, "cpu")
    with pytest.warns(UserWarning, match="enable_model_cpu_offload in the place of sequential"):
        assert torch.allclose(latents(pipe), plain, rtol=1e-4, atol=1e-5)


@pytest.mark.whole
@pytest.mark.parametrize("how", ["configuration", "int8"])
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
    without = load()
    without.vae = None
    with pytest.raises(OptionError, match="FluxPipeline has no VAE"):
        parallelize(without, vae=True)
    without.text_encoder = without.text_encoder_2 = None
    with pytest.raises(OptionError, match="FluxPipeline has no text encoder"):
        parallelize(without, text_encoders=True)
    with pytest.raises(OptionError, match="give one of int8"):
        parallelize(load(), quantize="int3")


def test_processes_that_did_not_join_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would make the whole picture, and nobody would know."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OptionError, match="they would each run alone: call init_process_group before"):
        parallelize(load())


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.core.config", None)
    with pytest.raises(OptionError, match=r"it needs torchao: pip install 'paracompile\[quantization\]'"):
        parallelize(load(), quantize="int8")


def test_it_is_documented() -> None:
    options = inspect.signature(paracompile.parallelize).parameters
    documentation = inspect.getdoc(paracompile.parallelize) or ""
    assert all(f"{name}:" in documentation for name in options)
