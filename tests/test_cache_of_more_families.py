"""The first block cache on more of diffusers' transformers, whose streams lie otherwise than those of `families`.

Each is held against the model itself in float64, as in `test_first_block_cache`.
"""

from __future__ import annotations

from functools import cache
from itertools import product

import pytest
import torch
from by_hand import ByHand, check_generation
from cached import CachedGraphs, cached
from capture import Captured, capture
from families import Inputs
from more_families import MORE_FAMILIES, CachedFamily
from other_families import OTHER_FAMILIES
from quick import quick
from torch import nn


class OfOneVideo(nn.Module):
    """Takes and gives one video instead of lists of videos, sounds and actions."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        videos, _, _ = self.model(
            **{**self.inputs, "vision_tokens": [hidden_states], "vision_timesteps": timestep}, return_dict=False
        )
        return (videos[0],)


def cosmos_3() -> tuple[nn.Module, Inputs]:
    model, inputs = OTHER_FAMILIES["cosmos_3"]()
    inputs.pop("return_dict", None)
    video = {"hidden_states": inputs["vision_tokens"][0], "timestep": inputs["vision_timesteps"]}
    return OfOneVideo(model, inputs), video


FAMILIES = {
    **MORE_FAMILIES,
    # a block adds to the latents' tokens apart from those of their history
    "helios": CachedFamily(OTHER_FAMILIES["helios"], lists=("blocks",)),
    # both streams are taken out of one that text and latents were written to
    "cosmos_3": CachedFamily(cosmos_3, lists=("model.layers",), image=1, change=0.3),
}

QUICK = ("bria_fibo", "helios")
SLOW = ("flux2-klein", "sana")

CASES = quick(
    product(FAMILIES, (1, 2, 4)),
    *product(QUICK, (2,)),
    slow=product(SLOW, (2,)),
)

BATCH = 2
STATE = {  # tokens of the first block's residual, and of what is stored
    "krea2": (60, 60),  # the text's among them, which are joined to the image's before the first block
    "stable_audio_3": (60, 60),
    "minimax_music3": (48, 48),
    "latte": (72, 72),
    "latte-both-at-front": (72, 72),
    "flux2-single-at-front": (60, 60),
    "hunyuan_dit": (48, 48, 48),  # what leaves the second block is read again by the last
    "sana_video": (72, 72),
    "helios": (104, 104),
    "cosmos_3": (24, 7, 24),
}
IMAGE_ONLY = (48, 48)
WHOLE = ("sana", "sana_video", "cosmos_3")
"""Of these each rank stores the second whole: what a convolution makes, text with causal attention."""


@cache
def captured(name: str) -> Captured:
    return capture(*FAMILIES[name].build())


@cache
def graphs_of(name: str, ranks: int, last_blocks: int = 0) -> CachedGraphs:
    first_blocks = FAMILIES[name].first_blocks
    mesh = {"ulysses": ranks} if ranks > 1 else None
    return cached(captured(name), mesh, first_blocks=first_blocks, last_blocks=last_blocks)


def by_hand(name: str, last: int = 0) -> ByHand:
    family = FAMILIES[name]
    last += family.behind
    return ByHand(
        captured(name), family.lists, family.image, in_turn=family.in_turn, first=family.first_blocks, last=last
    )


@pytest.mark.parametrize("name, ranks", CASES)
def test_a_family(name: str, ranks: int) -> None:
    """Computed, skipped, computed; each on every rank, against the model and the formula."""
    check_generation(graphs_of(name, ranks), by_hand(name), change=FAMILIES[name].change)


@pytest.mark.whole
@pytest.mark.parametrize("name, ranks", CASES)
def test_all_blocks_but_the_first_are_skipped_and_the_image_is_stored(name: str, ranks: int) -> None:
    layouts = graphs_of(name, ranks).layouts
    for layout in layouts:
        assert len(layout.skipped.blocks) == len(by_hand(name).blocks) - FAMILIES[name].behind
    residual, stored, *others = STATE.get(name, IMAGE_ONLY)
    batch = 1 if name == "cosmos_3" else BATCH
    by_rank = [[value.shape[:-1].numel() // batch for value in layout.state] for layout in layouts]
    stored *= ranks if name in WHOLE else 1
    assert [sum(tokens) for tokens in zip(*by_rank, strict=True)] == [residual, stored, *others]


@pytest.mark.parametrize(
    "name, ranks", [("flux2-klein", 1), ("flux2-klein", 2), pytest.param("auraflow", 1, marks=pytest.mark.full)]
)
def test_streams_that_skipped_blocks_join_are_stored_apart(name: str, ranks: int) -> None:
    """The last block is computed and reads both as one."""
    graphs = graphs_of(name, ranks, last_blocks=1)
    for layout in graphs.layouts:
        assert [value.shape[1] for value in layout.state] == [48 // ranks, 12 // ranks, 48 // ranks]
    check_generation(graphs, by_hand(name, last=1))
