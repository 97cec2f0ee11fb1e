"""diffusers' own pipelines, small: generations start clean and passes are told apart without the user's help."""

from __future__ import annotations

import ast
import contextlib
import copy
import importlib
import importlib.util
import io
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from denoising import ALWAYS, PASSES, Cut, build, compiled, generate, prompts, slots_of
from diffusers import (
    AutoencoderKL,
    CacheMixin,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from quick import quick
from random_tensors import draw, randomise
from torch import Tensor, nn

from paracompile import cache_stats, set_rdt
from paracompile.integrations import diffusers as diffusers_integration
from paracompile.integrations.diffusers import listen
from paracompile.runtime.slots import current_generation

pytestmark = pytest.mark.shares_graphs

TINY_FLUX = Path(__file__).parents[1] / "examples" / "tiny_flux"
TEXT_WIDTH = 64  # of both its text encoders
STEPS = 5
SIDE = 64
OPTIONS: dict[str, Any] = {"max_consecutive_hits": 2}


@dataclass(frozen=True)
class Case:
    """A pipeline, and how to call it.

    attributes:
        build: makes it, with the transformer not compiled.
        embeds: the prompts of a seed, as tensors.
        extra: further arguments.
        slots: the hits of each slot.
    """

    build: Callable[[], Any]
    embeds: Callable[[int], dict[str, Tensor]]
    extra: dict[str, Any]
    slots: dict[str, list[bool]]


def _flux(kind: type[Any]) -> Any:
    return kind.from_pretrained(TINY_FLUX, dtype=torch.float32)


def _flux_embeds(seed: int) -> dict[str, Tensor]:
    return {
        "prompt_embeds": draw(1, 12, TEXT_WIDTH, seed=seed),
        "pooled_prompt_embeds": draw(1, TEXT_WIDTH, seed=seed + 1),
        "negative_prompt_embeds": draw(1, 12, TEXT_WIDTH, seed=seed + 2),
        "negative_pooled_prompt_embeds": draw(1, TEXT_WIDTH, seed=seed + 3),
    }


def _stable_diffusion_3() -> Any:
    transformer = SD3Transformer2DModel(
        sample_size=SIDE // 8,
        patch_size=2,
        in_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=28,
        caption_projection_dim=64,
        pooled_projection_dim=36,
        out_channels=16,
        pos_embed_max_size=24,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
    )
    nothing = dict.fromkeys(
        ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3"]
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer=randomise(transformer), scheduler=scheduler, vae=vae, **nothing)


def _stable_diffusion_3_embeds(seed: int) -> dict[str, Tensor]:
    return {
        "prompt_embeds": draw(1, 12, 28, seed=seed),
        "pooled_prompt_embeds": draw(1, 36, seed=seed + 1),
        "negative_prompt_embeds": draw(1, 12, 28, seed=seed + 2),
        "negative_pooled_prompt_embeds": draw(1, 36, seed=seed + 3),
    }


def _wan() -> Any:
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=4,
        attention_head_dim=18,
        in_channels=16,
        out_channels=16,
        text_dim=28,
        freq_dim=32,
        ffn_dim=104,
        num_layers=3,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return WanPipeline(
        transformer=randomise(transformer), scheduler=scheduler, vae=None, text_encoder=None, tokenizer=None
    )


def _wan_embeds(seed: int) -> dict[str, Tensor]:
    return {
        "prompt_embeds": draw(1, 12, 28, seed=seed),
        "negative_prompt_embeds": draw(1, 12, 28, seed=seed + 1),
    }


PICTURE = torch.sigmoid(draw(1, 3, SIDE, SIDE, seed=5))
MASK = (draw(1, 1, SIDE, SIDE, seed=6) > 0).float()
HITS = [False, True, True, False, True]
BY_PLACE = {"call 1": HITS, "call 2": HITS}

CASES = {
    "FLUX": Case(lambda: _flux(FluxPipeline), _flux_embeds, {"true_cfg_scale": 2.0}, dict.fromkeys(PASSES, HITS)),
    "FLUX img2img": Case(
        lambda: _flux(FluxImg2ImgPipeline),
        _flux_embeds,
        {"true_cfg_scale": 2.0, "image": PICTURE, "strength": 1.0},
        BY_PLACE,
    ),
    "FLUX inpaint": Case(
        lambda: _flux(FluxInpaintPipeline),
        _flux_embeds,
        {"true_cfg_scale": 2.0, "image": PICTURE, "mask_image": MASK, "strength": 1.0},
        BY_PLACE,
    ),
    "Stable Diffusion 3": Case(
        _stable_diffusion_3, _stable_diffusion_3_embeds, {"guidance_scale": 4.0}, {"call 1": HITS}
    ),
    "Wan": Case(_wan, _wan_embeds, {"guidance_scale": 4.0, "num_frames": 9}, dict.fromkeys(PASSES, HITS)),
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    if not request.param.startswith("FLUX"):  # these share one model
        torch._dynamo.reset()
    return CASES[request.param]


@cache
def _plain(build: Callable[[], Any]) -> Any:
    return build()


def fresh(case: Case) -> Any:
    """A pipeline whose transformer was never called; what is compiled for one is used by all."""
    plain = _plain(case.build)
    pipeline = copy.copy(plain)
    pipeline.transformer = compiled(copy.deepcopy(plain.transformer), **OPTIONS)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run(case: Case, pipeline: Any, embeds: dict[str, Tensor], seed: int, **more: Any) -> Tensor:
    size = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "output_type": "latent"}
    given = {**size, **case.extra, **embeds, **more}
    result = pipeline(generator=torch.Generator().manual_seed(seed), **given)
    latents: Tensor = result[0]
    return latents


def alone(case: Case, seed: int) -> Tensor:
    return run(case, fresh(case), case.embeds(seed), seed)


def hits(pipeline: Any) -> dict[str, list[bool]]:
    stats = cache_stats(pipeline.transformer)
    return {name: [step.hit for step in steps] for name, steps in stats.slots.items()}


@pytest.mark.slow
@pytest.mark.sampled(2)
def test_steps_are_skipped_in_the_slots_that_one_expects(case: Case) -> None:
    pipeline = fresh(case)
    cached = run(case, pipeline, case.embeds(1), 1)
    assert hits(pipeline) == case.slots
    set_rdt(pipeline.transformer, 0)
    computed = run(case, pipeline, case.embeds(1), 1)
    assert cache_stats(pipeline.transformer).hits == 0
    assert (cached - computed).abs().max() > 1e-3 * computed.abs().max()


@pytest.mark.sampled(2)
def test_two_prompts_one_after_the_other(case: Case) -> None:
    pipeline = fresh(case)
    for seed in (1, 2, 1):
        assert torch.equal(run(case, pipeline, case.embeds(seed), seed), alone(case, seed))
        assert hits(pipeline) == case.slots


def test_one_prompt_s_very_tensors_for_two_images(case: Case) -> None:
    pipeline, embeds = fresh(case), case.embeds(1)
    run(case, pipeline, embeds, 3)
    assert torch.equal(run(case, pipeline, embeds, 1), alone(case, 1))
    assert hits(pipeline) == case.slots


@pytest.mark.parametrize("step", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_after_a_callback_that_raised(case: Case, step: int) -> None:
    def stop(owner: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == step:
            raise Cut
        return values

    pipeline, embeds = fresh(case), case.embeds(1)
    with pytest.raises(Cut):
        run(case, pipeline, embeds, 2, callback_on_step_end=stop)
    assert {len(steps) for steps in hits(pipeline).values()} == {step + 1}
    assert torch.equal(run(case, pipeline, embeds, 1), alone(case, 1))
    assert hits(pipeline) == case.slots


def test_after_a_warm_up_of_one_step(case: Case) -> None:
    pipeline, embeds = fresh(case), case.embeds(1)
    run(case, pipeline, embeds, 2, num_inference_steps=1)
    assert torch.equal(run(case, pipeline, embeds, 1), alone(case, 1))
    assert hits(pipeline) == case.slots


def test_state_is_gone_at_the_end(case: Case) -> None:
    pipeline = fresh(case)
    run(case, pipeline, case.embeds(1), 1, num_inference_steps=3)
    assert slots_of(pipeline.transformer) == []


@pytest.mark.sampled(4)
@pytest.mark.parametrize("inner_steps", [STEPS, 2])
def test_a_pipeline_that_is_called_in_a_step_of_another(case: Case, inner_steps: int) -> None:
    """With 2 steps it ends at a higher time than the other one goes on at."""

    def draw_another(owner: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            found.append(run(case, inner, case.embeds(2), 2, num_inference_steps=inner_steps))
        return values

    pipeline = fresh(case)
    inner = copy.copy(pipeline)
    inner.scheduler = copy.deepcopy(pipeline.scheduler)
    found: list[Tensor] = []
    outer = run(case, pipeline, case.embeds(1), 1, callback_on_step_end=draw_another)
    assert torch.equal(outer, alone(case, 1))
    assert hits(pipeline) == case.slots
    assert torch.equal(found[0], run(case, fresh(case), case.embeds(2), 2, num_inference_steps=inner_steps))


def test_pipelines_in_two_threads(case: Case) -> None:
    alone(case, 3)  # or Dynamo compiles in each thread, and a call finds nothing stored of the other thread's graph
    first = fresh(case)
    second = copy.copy(first)
    second.scheduler = copy.deepcopy(first.scheduler)
    turns = threading.Barrier(2, timeout=60)

    def take_turns(owner: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
        turns.wait()
        return values

    with ThreadPoolExecutor(2) as threads:
        runs = [
            threads.submit(run, case, pipeline, case.embeds(seed), seed, callback_on_step_end=take_turns)
            for seed, pipeline in ((1, first), (2, second))
        ]
        found = [each.result() for each in runs]
    for seed, latents in zip((1, 2), found, strict=True):
        assert torch.equal(latents, alone(case, seed))


def test_a_bar_that_is_never_closed_ends_its_generation_when_it_is_gone() -> None:
    torch._dynamo.reset()
    model = compiled(build("wan"), **OPTIONS)
    pipeline = Own(model._orig_mod, "note")
    for config in ({"disable": True}, {"file": io.StringIO()}):
        pipeline.set_progress_bar_config(**config)
        bar = pipeline.progress_bar(total=2)
        generate(model, prompts("wan"), steps=2)
        assert len(slots_of(model)) == 2
        assert current_generation().outer is not None
        del bar
        assert slots_of(model) == []
        assert current_generation().outer is None


@pytest.mark.slow
def test_a_prompt_of_words_and_less_noise() -> None:
    """img2img starts in the middle of the times; the prompts are encoded anew at each call."""
    case = CASES["FLUX img2img"]
    pipeline = fresh(case)

    def picture(of: Any, words: str) -> Tensor:
        given = {"prompt": words, "negative_prompt": "green", "max_sequence_length": 12, "strength": 0.6}
        return run(case, of, {}, 1, **given)

    found = [picture(pipeline, words) for words in ("a red circle", "a blue square", "a red circle")]
    expected = [picture(fresh(case), words) for words in ("a red circle", "a blue square")]
    for one, other in zip(found, [*expected, expected[0]], strict=True):
        assert torch.equal(one, other)
    assert hits(pipeline) == {"call 1": [False, True, True], "call 2": [False, True, True]}


# Passes that come and go


def _half(owner: Any, index: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:
    """Ends guidance, as diffusers' documentation has it: the batch is then half as large."""
    if index == 2:
        owner._guidance_scale = 0.0
        values = {name: value.chunk(2)[-1] for name, value in values.items() if name != "latents"}
    return values


GUIDED: dict[str, tuple[dict[str, Any], dict[str, list[bool]]]] = {
    "layers skipped in a pass of its own": (
        {
            "skip_guidance_layers": [1],
            "skip_layer_guidance_start": 0.0,
            "skip_layer_guidance_stop": 0.7,
        },
        {"call 1": HITS, "call 1, graph 2": [False, True, True]},
    ),
    "guidance that ends": (
        {
            "callback_on_step_end": _half,
            "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
        },
        {"call 1": [False, True, True], "call 1, graph 2": [False, True]},
    ),
    "a sampler that evaluates twice": (
        {"scheduler": FlowMatchHeunDiscreteScheduler()},
        {"call 1": [False, True, True] * 3},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", quick(GUIDED, *list(GUIDED)[:1]))
def test_passes_that_come_and_go(kind: str) -> None:
    """Stable Diffusion 3 names nothing; computed it is the plain picture, cached it is the same each time."""
    torch._dynamo.reset()
    case = CASES["Stable Diffusion 3"]
    more, expected = GUIDED[kind]
    more = dict(more)
    scheduler = more.pop("scheduler", None)
    pipeline, plain = fresh(case), copy.copy(_plain(case.build))
    plain.set_progress_bar_config(disable=True)
    for each in (pipeline, plain):
        each.scheduler = copy.deepcopy(scheduler or each.scheduler)
    found = [run(case, pipeline, case.embeds(seed), seed, **more) for seed in (1, 2, 1)]
    assert hits(pipeline) == expected
    assert torch.equal(found[0], found[2])
    set_rdt(pipeline.transformer, 0)
    computed, exact = (run(case, each, case.embeds(1), 1, **more) for each in (pipeline, plain))
    assert torch.allclose(computed, exact, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], exact, rtol=1e-4, atol=1e-5)


# What is listened to


def _depth(function: Any) -> int:
    return 1 + _depth(function.__wrapped__) if hasattr(function, "__wrapped__") else 0


def test_listening_twice_is_listening_once() -> None:
    methods = [vars(CacheMixin)["_reset_stateful_cache"], vars(DiffusionPipeline)["progress_bar"]]
    depths = [_depth(method) for method in methods]
    listen()
    assert [vars(CacheMixin)["_reset_stateful_cache"], vars(DiffusionPipeline)["progress_bar"]] == methods
    assert [_depth(method) for method in methods] == depths


LATE = """
import sys
import paracompile.backend
assert "diffusers" not in sys.modules
from diffusers import CacheMixin, DiffusionPipeline, LoopSequentialPipelineBlocks
for method in (CacheMixin.cache_context, DiffusionPipeline.progress_bar, LoopSequentialPipelineBlocks.progress_bar):
    assert hasattr(method, "_paracompile_listens")
"""


def test_a_diffusers_that_lost_what_is_listened_to_is_told_of() -> None:
    module = types.ModuleType("diffusers.models.cache_utils")
    with (
        pytest.warns(UserWarning, match="has no cache_context"),
        pytest.warns(UserWarning, match="has no _reset_state"),
    ):
        diffusers_integration._wrap(module)


@pytest.mark.slow
def test_diffusers_may_be_imported_after_the_backend() -> None:
    subprocess.run([sys.executable, "-c", LATE], check=True, capture_output=True)


class Own(DiffusionPipeline):
    """A pipeline of one's own, whose `components` raise: not all that it takes is registered."""

    def __init__(self, transformer: nn.Module, note: str) -> None:
        super().__init__()
        self.register_modules(transformer=transformer)


def test_a_progress_bar_ends_the_generation_of_the_pipeline_s_models_only() -> None:
    torch._dynamo.reset()
    inside, outside = compiled(build("wan"), **OPTIONS), compiled(build("wan"), **OPTIONS)
    pipeline = Own(inside._orig_mod, "note")
    with pytest.raises(ValueError, match="incorrectly"):
        _ = pipeline.components
    for model in (inside, outside):
        generate(model, prompts("wan"), steps=2)
    assert pipeline.set_progress_bar_config(disable=True) is None
    with pipeline.progress_bar(total=1):
        assert slots_of(inside) == []
        assert len(slots_of(outside)) == 2
    assert list(pipeline.progress_bar([1, 2])) == [1, 2]


def test_a_progress_bar_of_modular_blocks_ends_every_generation() -> None:
    from diffusers.modular_pipelines.modular_pipeline import LoopSequentialPipelineBlocks

    torch._dynamo.reset()
    model = compiled(build("wan"), rdt=ALWAYS)
    generate(model, prompts("wan"), steps=2)
    with LoopSequentialPipelineBlocks().progress_bar(total=1):
        assert slots_of(model) == []


# Where a progress bar does not begin the loop of calls, times tell generations apart, or nothing is denoised.
WITHOUT_BAR = {
    "pipelines/anyflow/pipeline_anyflow_far.py",  # a bar of its own for each part of a video
    "pipelines/deprecated/unidiffuser/modeling_text_decoder.py",  # a text model
    "pipelines/glm_image/pipeline_glm_image.py",  # pictures to edit are encoded before the loop
    "pipelines/ltx2/pipeline_ltx2_dfr.py",  # the bar begins before the function with the loop is called
    "pipelines/ltx2/pipeline_ltx2_dfr_temporal_refine.py",
    "modular_pipelines/helios/denoise.py",  # a loop over parts of a video, whose inner loops have bars of tqdm
    "modular_pipelines/wan_animate_2/denoise.py",
}
CALLED = {
    "pipelines": {"transformer", "transformer_2", "current_model", "denoiser_model"},
    "modular_pipelines": {"loop_step"},
}


def _name(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _calls(node: ast.AST, names: set[str], loops: bool = False, bar: bool = False) -> Iterator[bool]:
    """For each call in a loop of one of these names: whether a progress bar begins a loop or block around it."""
    heads = [node.iter] if isinstance(node, ast.For) else [item.context_expr for item in getattr(node, "items", [])]
    loops = loops or isinstance(node, (ast.For, ast.While))
    bar = bar or any(
        isinstance(inner, ast.Call) and _name(inner.func) == "progress_bar"
        for head in heads
        for inner in ast.walk(head)
    )
    if loops and isinstance(node, ast.Call) and _name(node.func) in names:
        yield bar
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, names, loops, bar)


def _sources(folder: str) -> Iterator[tuple[str, str]]:
    """The files of one of diffusers' folders: path and text."""
    found = importlib.util.find_spec("diffusers")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    for file in (root / folder).rglob("*.py"):
        yield file.relative_to(root).as_posix(), file.read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_loop_of_diffusers_begins_with_a_progress_bar() -> None:
    """But those named above, all of which still exist."""
    found = {
        path: list(_calls(ast.parse(text), names))
        for folder, names in CALLED.items()
        for path, text in _sources(folder)
        if any(f"{name}(" in text for name in names)
    }
    assert sum(map(len, found.values())) > 150
    assert {path for path, bars in found.items() if not all(bars)} == WITHOUT_BAR


def test_every_loop_of_diffusers_says_when_a_step_ends() -> None:
    """By its scheduler or by its bar; all schedulers are heard."""
    denoising = {
        path: text
        for path, text in _sources("pipelines")
        if any(f"self.{name}(" in text for name in CALLED["pipelines"]) and "scheduler" in text
    }
    assert len(denoising) > 100
    assert [path for path, text in denoising.items() if ".step(" not in text and ".update(" not in text] == []
    listen()
    stepping = [
        member
        for module in _schedulers()
        for member in vars(module).values()
        if isinstance(member, type) and member.__module__ == module.__name__ and "step" in vars(member)
    ]
    assert len(stepping) > 30
    assert all(hasattr(member.step, "_paracompile_listens") for member in stepping)


def _schedulers() -> Iterator[types.ModuleType]:
    for path, text in _sources("schedulers"):
        if "def step(" in text and "deprecated" not in path:
            with contextlib.suppress(ImportError):  # one needs a package of its own
                yield importlib.import_module(f"diffusers.{path[:-3].replace('/', '.')}")


def test_no_pipeline_has_a_progress_bar_that_is_not_heard() -> None:
    """Combined pipelines have one that only calls that of the pipeline inside; Marigold's models are UNets."""
    own = {path for folder in CALLED for path, text in _sources(folder) if "def progress_bar(" in text}
    relaying = {path for path, text in _sources("pipelines") if "pipe.progress_bar(iterable" in text}
    heard = {"pipelines/pipeline_utils.py", "modular_pipelines/modular_pipeline.py"}
    assert heard < own
    assert {path for path in own - relaying - heard if "/marigold/" not in path} == set()
