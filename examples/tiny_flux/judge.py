"""Judges pictures without a network: what a picture shows is measured in its pixels and compared to its prompt.

python examples/tiny_flux/judge.py            # the pipeline on 200 prompts held out from training
python examples/tiny_flux/judge.py --drawn    # the judge itself: drawn pictures, with right and with wrong prompts
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from models import CALL
from pictures import (
    ATTRIBUTES,
    COLOURS,
    POSITIONS,
    RADII,
    SHAPES,
    Placement,
    Scene,
    all_scenes,
    coverage,
    draw,
    split_scenes,
)
from PIL import Image
from tqdm import tqdm

FOLDER = Path(__file__).parent
STEPS = 28

COLOUR_TOLERANCE = 0.2
"""Largest distance in RGB, each in [0, 1], at which a pixel counts as having a colour."""

BORDER_SHARE = 0.8
"""Share of the outermost pixels that must have the background's colour."""

LEAST_OVERLAP = 0.7
"""Least intersection over union with a drawn shape at which a shape counts as recognised."""

COLOUR_NAMES = tuple(COLOURS)
SCENES = {scene.prompt: scene for scene in all_scenes()}
PALETTE = torch.tensor(list(COLOURS.values()))


def nearest_colours(pixels: torch.Tensor) -> torch.Tensor:
    """The index of each pixel's colour, -1 where none is near. Takes (..., 3) in [0, 1]."""
    distances = (pixels[..., None, :] - PALETTE).norm(dim=-1)
    nearest, index = distances.min(dim=-1)
    return torch.where(nearest <= COLOUR_TOLERANCE, index, -1)


def most_frequent(indices: torch.Tensor) -> tuple[int, int]:
    """The most frequent index that is not negative, and how often it occurs: -1 and 0 where there is none."""
    counts = torch.bincount(indices[indices >= 0], minlength=1)
    return (int(counts.argmax()), int(counts.max())) if counts.max() > 0 else (-1, 0)


def fit_shape(share: torch.Tensor) -> tuple[str, str, Placement] | None:
    """The shape and size whose drawing overlaps best with what a picture shows, None if none does well.

    Takes the share of each pixel that is covered, (height, width) in [0, 1]. The drawing is laid centroid on centroid.
    """
    best_overlap, best = LEAST_OVERLAP, None
    x, y = centroid(share)
    for shape, (size, radius) in itertools.product(SHAPES, RADII.items()):
        offset_x, offset_y = CENTROIDS[shape]
        placement = Placement(x - offset_x * radius, y - offset_y * radius, radius)
        drawn = coverage(shape, placement)
        overlap = float(torch.minimum(drawn, share).sum() / torch.maximum(drawn, share).sum())
        if overlap > best_overlap:
            best_overlap, best = overlap, (shape, size, placement)
    return best


def centroid(share: torch.Tensor) -> tuple[float, float]:
    points = torch.arange(share.shape[-1]) + 0.5
    total = share.sum()
    return float((share.sum(dim=0) * points).sum() / total), float((share.sum(dim=1) * points).sum() / total)


def shape_centroid(shape: str) -> tuple[float, float]:
    """Where the centroid of a shape of radius 1 lies, seen from its centre."""
    middle, radius = 24.0, 20.0
    x, y = centroid(coverage(shape, Placement(middle, middle, radius)))
    return (x - middle) / radius, (y - middle) / radius


CENTROIDS = {shape: shape_centroid(shape) for shape in SHAPES}


def nearest_position(placement: Placement) -> str:
    return min(POSITIONS, key=lambda name: math.dist(POSITIONS[name], (placement.x, placement.y)))


def measure(picture: torch.Tensor) -> dict[str, str]:
    """What a picture of (3, height, width) in [0, 1] shows: each attribute that can be told."""
    pixels = picture.permute(1, 2, 0).float()
    colours = nearest_colours(pixels)
    border = torch.cat([colours[0], colours[-1], colours[1:-1, 0], colours[1:-1, -1]])
    background, count = most_frequent(border)
    if count < BORDER_SHARE * border.numel():
        return {}
    colour, _ = most_frequent(colours[colours != background])
    seen = {"background": COLOUR_NAMES[background]}
    if colour < 0:
        return seen
    seen["colour"] = COLOUR_NAMES[colour]

    # A pixel at an edge lies between the two colours: how far along is the share that is covered. Any other colour is
    # seen as covered too, so that a third colour spoils the shape.
    towards = PALETTE[colour] - PALETTE[background]
    along = ((pixels - PALETTE[background]) @ towards / towards.square().sum()).clamp(0, 1)
    beside = (pixels - PALETTE[background] - along[..., None] * towards).norm(dim=-1)
    share = torch.where(beside <= COLOUR_TOLERANCE, along, 1.0)
    share = torch.where(colours == background, 0.0, share)
    if (fitted := fit_shape(share)) is not None:
        seen["shape"], seen["size"], placement = fitted
        seen["position"] = nearest_position(placement)
    return seen


def marks(picture: torch.Tensor, scene: Scene) -> list[bool]:
    """For each attribute of the scene, in the order of `ATTRIBUTES`, whether the picture shows it."""
    seen = measure(picture)
    return [seen.get(attribute) == getattr(scene, attribute) for attribute in ATTRIBUTES]


def share_right(picture: torch.Tensor, scene: Scene) -> float:
    """The share of the scene's attributes that a picture of (3, height, width) in [0, 1] shows: 1 if all are right."""
    return sum(marks(picture, scene)) / len(ATTRIBUTES)


def score(image: Image.Image, prompt: str) -> float:
    """The same for an image and its prompt, as `python -m paracompile tune --judge` asks.

    Raises:
        ValueError: a prompt that is no scene's.
    """
    scene = SCENES.get(prompt)
    if scene is None:
        raise ValueError(f"{prompt!r} is not a prompt of this model; one is {next(iter(SCENES))!r}")
    return share_right(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, scene)


def paint(
    pipeline: FluxPipeline, scenes: Sequence[Scene], steps: int = STEPS, batch: int = 20, seed: int = 0, **more: Any
) -> Iterator[torch.Tensor]:
    """The pipeline's picture of each scene, one after another. Picture i starts from the noise of seed + i.

    `more` goes to the pipeline's call.
    """
    for start in range(0, len(scenes), batch):
        some = scenes[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + offset) for offset in range(len(some))]
        prompts = [scene.prompt for scene in some]
        yield from pipeline(
            prompts, num_inference_steps=steps, generator=generators, output_type="pt", **CALL, **more
        ).images.cpu()


def table(title: str, judged: Sequence[Sequence[bool]]) -> str:
    """The share of right pictures for each attribute, on average and all at once."""
    right = torch.tensor(judged).double()
    shares = dict(zip(ATTRIBUTES, right.mean(dim=0).tolist(), strict=True))
    shares["score, their mean"] = float(right.mean())
    shares["all right"] = float(right.prod(dim=1).mean())
    return "\n".join([f"{title} ({len(judged)})", *(f"  {name:<18} {share:>7.1%}" for name, share in shares.items())])


def judge_drawn(count: int) -> None:
    """Judges drawn pictures with their own prompts and with prompts of other pictures."""
    source = random.Random(0)
    scenes = source.choices(all_scenes(), k=count)
    drawn = [draw(scene, source) for scene in tqdm(scenes, desc="drawing")]
    print(table("drawn, own prompt", [marks(picture, scene) for picture, scene in zip(drawn, scenes, strict=True)]))
    others = scenes[1:] + scenes[:1]
    print(table("drawn, other prompt", [marks(picture, scene) for picture, scene in zip(drawn, others, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description="measures how often the pipeline draws what the prompt says")
    parser.add_argument("--pipeline", type=Path, default=FOLDER, help="the pipeline's folder")
    parser.add_argument("--prompts", type=int, default=200, help="how many held-out prompts")
    parser.add_argument("--steps", type=int, default=STEPS, help="denoising steps a picture")
    parser.add_argument("--guidance", type=float, default=3.5, help="trained with 1 to 5")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture's noise")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="threads for the CPU; torch's choice by default")
    parser.add_argument("--drawn", action="store_true", help="judge drawn pictures instead: tests the judge")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.drawn:
        judge_drawn(options.prompts)
        return

    pipeline = FluxPipeline.from_pretrained(options.pipeline, dtype=torch.float32).to(options.device)
    pipeline.set_progress_bar_config(disable=True)
    scenes = split_scenes()[1][: options.prompts]
    pictures = paint(pipeline, scenes, steps=options.steps, seed=options.seed, guidance_scale=options.guidance)
    judged = [marks(picture, scene) for picture, scene in zip(tqdm(pictures, total=len(scenes)), scenes, strict=True)]
    print(table("held-out prompts", judged))


if __name__ == "__main__":
    main()
