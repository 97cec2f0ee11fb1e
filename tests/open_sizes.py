"""Twelve sizes of each family's inputs: every resolution and every length another, many of which do not divide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from families import ALL_FAMILIES, Inputs
from torch import fx, nn

from paracompile.passes.regions import cut_into_regions

_ROWS = (6, 7, 9, 8, 5, 12, 10, 7, 11, 8, 6, 13)
_COLUMNS = (8, 11, 7, 10, 13, 6, 10, 9, 5, 8, 14, 9)
_FRAMES = (3, 5, 4, 2, 7, 3, 6, 4, 5, 3, 2, 6)
_WORDS = (20, 23, 17, 40, 31, 16, 25, 28, 33, 19, 48, 21)

Sizes = dict[str, Any]


def _tokens(rows: int, columns: int, frames: int, words: int) -> Sizes:
    return {"image": (rows, columns), "text": words}


def _pixels(rows: int, columns: int, frames: int, words: int) -> Sizes:
    return {"size": (2 * rows, 2 * columns), "text": words}


def _video(rows: int, columns: int, frames: int, words: int) -> Sizes:
    return {"size": (frames, 2 * rows, 2 * columns), "text": words}


def _latents(rows: int, columns: int, frames: int, words: int) -> Sizes:
    return {"size": (frames, rows, columns), "text": words}


_OF: dict[str, Callable[..., Sizes]] = {
    "flux": _tokens,
    "stable_diffusion_3": _pixels,
    "wan": _video,
    "qwen_image": _tokens,
    "hunyuan_video": _video,
    "cogvideox": _video,
    "ltx_video": _latents,
    "mochi": _video,
}

FAMILIES = tuple(family for family in _OF if family != "mochi")
"""All but Mochi, whose own code asks for the numbers of rows and columns."""


def built(family: str, number: int, *, masked: bool = False, **more: Any) -> tuple[nn.Module, Inputs]:
    """The family's model and its inputs at one of twelve sizes. The models of all sizes are equal.

    args:
        masked: whether Qwen-Image is given a mask: its pipeline does so where a prompt is padded. Diffusers makes a
            tensor of the prompt's length then, which Dynamo takes for a constant.
    """
    sizes = _OF[family](*(each[number] for each in (_ROWS, _COLUMNS, _FRAMES, _WORDS)))
    model, inputs = ALL_FAMILIES[family].build(batch=1, **sizes, **more)
    if family == "qwen_image" and not masked:
        inputs["encoder_hidden_states_mask"] = None
    return model, inputs


COUNT = len(_ROWS)


def runnable(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The graph in regions, which calculate what sizes are open; the graph itself stays as it is."""
    return cut_into_regions(copy.deepcopy(graph), example_inputs)
