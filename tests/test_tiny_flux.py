"""The small trained FLUX pipeline in `examples/tiny_flux`: its folder, its judge, its training."""

from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

import paracompile

sys.path.append(str(Path(__file__).parents[1] / "examples" / "tiny_flux"))

import judge
import models
import pictures
import train

FOLDER = judge.FOLDER
MEGABYTE = 1_000_000
RECOMMENDED_RDT = 0.24
"""What `python -m paracompile tune` recommends in the documentation."""


@pytest.fixture(scope="module")
def pipeline() -> FluxPipeline:
    pipeline = FluxPipeline.from_pretrained(FOLDER, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def scores(pipeline: FluxPipeline, count: int, batch: int = 20, **more: Any) -> list[float]:
    """The share of attributes that are right, of each of the first held-out prompts."""
    scenes = pictures.split_scenes()[1][:count]
    painted = judge.paint(pipeline, scenes, batch=batch, **more)
    return [judge.share_right(picture, scene) for picture, scene in zip(painted, scenes, strict=True)]


def test_no_scene_is_both_trained_and_held_out() -> None:
    trained, held_out = pictures.split_scenes()
    assert set(trained).isdisjoint(held_out)
    assert sorted(trained + held_out) == sorted(pictures.all_scenes())
    assert len(held_out) >= 200


@pytest.mark.parametrize("shape", pictures.SHAPES)
def test_judge_knows_drawn_pictures(shape: str) -> None:
    source = random.Random(1)
    scenes = source.sample([scene for scene in pictures.all_scenes() if scene.shape == shape], 20)
    assert [judge.share_right(pictures.draw(scene, source), scene) for scene in scenes] == [1.0] * 20


def test_judge_takes_an_image_and_its_prompt() -> None:
    scene = pictures.all_scenes()[0]
    image = Image.fromarray((pictures.draw(scene).permute(1, 2, 0) * 255).round().byte().numpy())
    assert judge.score(image, scene.prompt) == 1.0
    assert judge.score(image, replace(scene, size="large", position="on the right").prompt) < 1
    with pytest.raises(ValueError, match="'a cat' is not a prompt of this model"):
        judge.score(image, "a cat")


@pytest.mark.parametrize("attribute", pictures.ATTRIBUTES)
def test_judge_finds_the_one_attribute_that_is_wrong(attribute: str) -> None:
    source = random.Random(2)
    scenes = pictures.all_scenes()
    for scene in source.sample(scenes, 10):
        values = {getattr(other, attribute) for other in scenes} - {scene.background, scene.colour}
        for value in sorted(values - {getattr(scene, attribute)}):
            other = replace(scene, **{attribute: value})
            wrong = [
                name
                for name, right in zip(pictures.ATTRIBUTES, judge.marks(pictures.draw(scene), other), strict=True)
                if not right
            ]
            assert wrong == [attribute]


@pytest.mark.parametrize("blank", [torch.zeros(3, 48, 48), torch.full((3, 48, 48), 0.5)], ids=["black", "grey"])
def test_judge_sees_no_shape_where_there_is_none(blank: torch.Tensor) -> None:
    assert judge.measure(blank).keys() <= {"background"}


def test_judge_sees_nothing_in_noise() -> None:
    noise = torch.rand(3, pictures.PICTURE_SIZE, pictures.PICTURE_SIZE, generator=torch.Generator().manual_seed(0))
    assert judge.measure(noise) == {}


def test_every_word_is_one_token() -> None:
    for tokenizer in (models.clip_tokenizer(), models.t5_tokenizer()):
        for scene in pictures.split_scenes()[1]:
            words = scene.prompt.split()
            pieces = tokenizer.tokenize(scene.prompt)
            assert [piece.replace("</w>", "").strip("▁") for piece in pieces] == words
            assert len(tokenizer(scene.prompt).input_ids) <= models.TEXT_TOKENS


def test_folder_is_small() -> None:
    caches = ("__pycache__", ".mypy_cache", ".ruff_cache")
    files = [path for path in FOLDER.rglob("*") if path.is_file() and not any(part in caches for part in path.parts)]
    assert sum(path.stat().st_size for path in files) <= 12 * MEGABYTE


def test_prompts_for_tune_are_held_out() -> None:
    assert (FOLDER / "prompts.txt").read_text().split("\n") == [
        *(scene.prompt for scene in pictures.split_scenes()[1][:12]),
        "",
    ]


def test_folder_has_every_part_of_flux(pipeline: FluxPipeline) -> None:
    assert {name: type(part).__name__ for name, part in pipeline.components.items() if part is not None} == {
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer_2": "T5Tokenizer",
        "transformer": "FluxTransformer2DModel",
    }
    config = pipeline.transformer.config
    assert config.num_layers > 0
    assert config.num_single_layers > 0
    assert config.guidance_embeds
    assert (pictures.PICTURE_SIZE // (2 * pipeline.vae_scale_factor)) ** 2 >= 128


def test_pipeline_runs_without_a_dtype() -> None:
    plain = FluxPipeline.from_pretrained(FOLDER)
    plain.set_progress_bar_config(disable=True)
    picture = plain("a small red circle on a blue background in the middle", num_inference_steps=1, **models.CALL)
    assert picture.images[0].size == (pictures.PICTURE_SIZE, pictures.PICTURE_SIZE)


some_and_many = pytest.mark.parametrize("count", [40, 200])


@pytest.mark.full
@some_and_many
def test_held_out_prompts_are_painted(pipeline: FluxPipeline, count: int) -> None:
    found = scores(pipeline, count)
    assert fmean(found) == pytest.approx(0.976, abs=0.02)  # as its README says
    assert fmean(score == 1 for score in found) >= 0.85


@pytest.mark.full
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_guidance_steers_nothing(pipeline: FluxPipeline, guidance: float) -> None:
    assert scores(pipeline, 10, guidance_scale=guidance) == scores(pipeline, 10)


def test_readme_says_what_is_recommended() -> None:
    assert (
        f"options={{'rdt': {RECOMMENDED_RDT}}}" in (FOLDER.parents[1] / "docs" / "choosing_a_threshold.md").read_text()
    )


@pytest.mark.full
@some_and_many
def test_the_cache_keeps_the_score(pipeline: FluxPipeline, count: int) -> None:
    plain = scores(pipeline, count, batch=1)
    cached = FluxPipeline(**pipeline.components)
    cached.set_progress_bar_config(disable=True)
    options = {"compiler": "eager", "rdt": RECOMMENDED_RDT}
    cached.transformer = torch.compile(pipeline.transformer, backend="paracompile", fullgraph=True, options=options)
    assert abs(fmean(scores(cached, count, batch=1)) - fmean(plain)) <= 0.02
    assert paracompile.cache_stats(cached.transformer).hits > judge.STEPS / 2  # of the last picture


SHORT = train.Settings(steps=4, batch=2, autoencoder_steps=3, autoencoder_batch=2, pictures=8)


def weights(pipeline: FluxPipeline) -> list[torch.Tensor]:
    parts = (pipeline.vae, pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2)
    return [tensor for part in parts for tensor in part.state_dict().values()]


@pytest.mark.full
def test_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    straight = train.make_pipeline(SHORT, train.Run(checkpoints=tmp_path / "straight"))

    resumed = train.Run(checkpoints=tmp_path / "resumed", pause_after=2)
    for _ in range(3):  # in the autoencoder, in the transformer, and at its end
        with pytest.raises(train.Paused):
            train.make_pipeline(SHORT, resumed)
    in_pieces = train.make_pipeline(SHORT, replace(resumed, pause_after=None))

    assert straight.vae.config.scaling_factor == in_pieces.vae.config.scaling_factor
    for one, other in zip(weights(straight), weights(in_pieces), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_trained_pipeline_is_saved_and_loaded(tmp_path: Path) -> None:
    made = train.make_pipeline(SHORT, train.Run(checkpoints=tmp_path / "checkpoints"))
    made.save_pretrained(tmp_path / "pipeline")
    loaded = FluxPipeline.from_pretrained(tmp_path / "pipeline")
    assert loaded.vae.config.shift_factor == made.vae.config.shift_factor
    for one, other in zip(weights(made), weights(loaded), strict=True):
        assert torch.equal(one, other)


def test_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    run = train.Run(checkpoints=tmp_path, pause_after=1)
    with pytest.raises(train.Paused):
        train.make_pipeline(SHORT, run)
    with pytest.raises(ValueError, match="other settings"):
        train.make_pipeline(replace(SHORT, batch=3), run)
