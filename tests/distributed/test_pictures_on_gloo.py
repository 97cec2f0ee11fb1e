"""The trained small pipeline: two ranks draw the picture that one draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from pool import Pool

import paracompile

FOLDER = Path(__file__).parents[2] / "examples" / "tiny_flux"
PROMPTS = (
    "a large red circle on a blue background in the middle",
    "a small green ring on a white background at the top",
)


def picture(pipeline: FluxPipeline, prompt: str) -> np.ndarray[Any, Any]:
    """The picture, (height, width, 3), whole numbers up to 255."""
    size, tokens = pipeline.vae.config.sample_size, pipeline.tokenizer_2.model_max_length
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline(
        prompt,
        height=size,
        width=size,
        max_sequence_length=tokens,
        num_inference_steps=28,
        generator=torch.Generator().manual_seed(0),
    )
    return np.asarray(output.images[0]).astype(int)


def load() -> FluxPipeline:
    return FluxPipeline.from_pretrained(FOLDER, dtype=torch.float32)


def drawn(rank: int, rdt: float | None) -> list[np.ndarray[Any, Any]]:
    pipeline = load()
    options = {"compiler": "eager", "mesh": paracompile.init_mesh("cpu"), "rdt": rdt}
    pipeline.transformer = torch.compile(pipeline.transformer, backend="paracompile", fullgraph=True, options=options)
    pictures = [picture(pipeline, prompt) for prompt in PROMPTS]
    assert rdt is None or paracompile.cache_stats(pipeline.transformer).hits > 3
    return pictures


@pytest.mark.full
def test_two_ranks_draw_what_one_draws(two_ranks: Pool) -> None:
    pipeline = load()
    expected = [picture(pipeline, prompt) for prompt in PROMPTS]
    assert np.abs(expected[0] - expected[1]).max() > 100
    for pictures in two_ranks.run(drawn, None):
        for found, plain in zip(pictures, expected, strict=True):
            assert np.abs(found - plain).max() <= 1


@pytest.mark.full
def test_two_ranks_with_the_cache_draw_alike(two_ranks: Pool) -> None:
    pipeline = load()
    expected = [picture(pipeline, prompt) for prompt in PROMPTS]
    first, second = two_ranks.run(drawn, 0.08)
    for found, other, plain in zip(first, second, expected, strict=True):
        assert np.array_equal(found, other)
        assert 0 < np.abs(found - plain).mean() < 3  # of 255: another picture, and hardly so
