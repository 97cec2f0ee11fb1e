"""The world of the small model: one coloured shape on a coloured background, its prompt and its picture.

Pictures are drawn here, so nothing is downloaded. A scene is what a prompt says; the picture of a scene still differs
from draw to draw, in where exactly the shape lies and in its exact size.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, fields

import torch

PICTURE_SIZE = 48
"""Height and width in pixels."""

COLOURS = {
    "red": (0.88, 0.12, 0.12),
    "green": (0.12, 0.66, 0.22),
    "blue": (0.14, 0.26, 0.90),
    "yellow": (0.96, 0.84, 0.14),
    "purple": (0.58, 0.18, 0.72),
    "white": (0.96, 0.96, 0.96),
    "black": (0.06, 0.06, 0.06),
}
SHAPES = ("circle", "square", "triangle", "ring", "cross")
RADII = {"small": 6.5, "large": 11.0}
"""Half the extent of a shape, in pixels."""

NEAR, MIDDLE, FAR = 13.0, 24.0, 35.0
POSITIONS = {
    "at the top left": (NEAR, NEAR),
    "at the top": (MIDDLE, NEAR),
    "at the top right": (FAR, NEAR),
    "on the left": (NEAR, MIDDLE),
    "in the middle": (MIDDLE, MIDDLE),
    "on the right": (FAR, MIDDLE),
    "at the bottom left": (NEAR, FAR),
    "at the bottom": (MIDDLE, FAR),
    "at the bottom right": (FAR, FAR),
}
"""Where the centre of a shape lies: x and y in pixels from the top left corner."""

CENTRE_JITTER = 1.5
"""Largest distance of a centre from its place along each axis, in pixels."""

RADIUS_JITTER = 0.05
"""Largest change of a radius, as a share of it."""

HELD_OUT_SHARE = 0.1
SUBPIXELS = 4


@dataclass(frozen=True, order=True)
class Scene:
    """What a prompt says of its picture."""

    background: str
    colour: str
    shape: str
    size: str
    position: str

    @property
    def prompt(self) -> str:
        return f"a {self.size} {self.colour} {self.shape} on a {self.background} background {self.position}"


ATTRIBUTES = tuple(field.name for field in fields(Scene))


@dataclass(frozen=True)
class Placement:
    """Where a shape lies and how large it is, in pixels."""

    x: float
    y: float
    radius: float


def all_scenes() -> list[Scene]:
    """Every combination in which the shape can be seen, in a fixed order."""
    combinations = itertools.product(COLOURS, COLOURS, SHAPES, RADII, POSITIONS)
    return [Scene(*values) for values in combinations if values[0] != values[1]]


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """The scenes to train on and the scenes held out, the latter in random order: any first n are a fair sample."""
    scenes = all_scenes()
    random.Random(0).shuffle(scenes)
    held_out = round(HELD_OUT_SHARE * len(scenes))
    return scenes[held_out:], scenes[:held_out]


def place(scene: Scene, random_source: random.Random | None = None) -> Placement:
    """The scene's placement, jittered if there is a source of random numbers."""
    x, y = POSITIONS[scene.position]
    radius = RADII[scene.size]
    if random_source is None:
        return Placement(x, y, radius)
    return Placement(
        x + random_source.uniform(-CENTRE_JITTER, CENTRE_JITTER),
        y + random_source.uniform(-CENTRE_JITTER, CENTRE_JITTER),
        radius * (1 + random_source.uniform(-RADIUS_JITTER, RADIUS_JITTER)),
    )


def inside(shape: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Whether points lie in a shape around the origin that reaches from -1 to 1, y pointing down."""
    distance = (x.square() + y.square()).sqrt()
    extent = torch.maximum(x.abs(), y.abs())
    match shape:
        case "circle":
            return distance <= 1
        case "square":
            return extent <= 0.9
        case "triangle":
            return (y <= 0.85) & (x.abs() <= (y + 1) * 0.55)
        case "ring":
            return (distance <= 1) & (distance >= 0.55)
        case "cross":
            return (torch.minimum(x.abs(), y.abs()) <= 0.32) & (extent <= 1)
        case _:
            raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}")


def coverage(shape: str, placement: Placement) -> torch.Tensor:
    """The share of each pixel that a shape covers, as (height, width) in [0, 1]."""
    points = (torch.arange(PICTURE_SIZE * SUBPIXELS) + 0.5) / SUBPIXELS
    x = (points[None, :] - placement.x) / placement.radius
    y = (points[:, None] - placement.y) / placement.radius
    covered = inside(shape, x, y).float()
    return covered.view(PICTURE_SIZE, SUBPIXELS, PICTURE_SIZE, SUBPIXELS).mean(dim=(1, 3))


def draw(scene: Scene, random_source: random.Random | None = None) -> torch.Tensor:
    """The scene's picture, as (3, height, width) in [0, 1]."""
    share = coverage(scene.shape, place(scene, random_source))
    foreground, background = (torch.tensor(COLOURS[name])[:, None, None] for name in (scene.colour, scene.background))
    return background + share * (foreground - background)
