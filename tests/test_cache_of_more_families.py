"""The first block cache on more of diffusers' transformers, whose streams lie otherwise than those of `families`.

Each is held against the model itself in float64, as in `test_first_block_cache`.
"""

from __future__ import annotations

from functools import cache

import pytest
from by_hand import ByHand, check_generation
from cached import CachedGraphs, cached
from capture import Captured, capture
from more_families import MORE_FAMILIES

QUICK = ("krea2", "flux2-klein", "bria_fibo", "sana")

CASES = [
    pytest.param(name, ranks, marks=[] if name in QUICK and ranks == 2 else pytest.mark.full)
    for name in MORE_FAMILIES
    for ranks in (1, 2, 4)
]

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
}
IMAGE_ONLY = (48, 48)


@cache
def captured(name: str) -> Captured:
    return capture(*MORE_FAMILIES[name].build())


@cache
def graphs_of(name: str, ranks: int, last_blocks: int = 0) -> CachedGraphs:
    first_blocks = MORE_FAMILIES[name].first_blocks
    mesh = {"ulysses": ranks} if ranks > 1 else None
    return cached(captured(name), mesh, first_blocks=first_blocks, last_blocks=last_blocks)


def by_hand(name: str, last: int = 0) -> ByHand:
    family = MORE_FAMILIES[name]
    last += family.behind
    return ByHand(
        captured(name), family.lists, family.image, in_turn=family.in_turn, first=family.first_blocks, last=last
    )


@pytest.mark.parametrize("name, ranks", CASES)
def test_a_family(name: str, ranks: int) -> None:
    """Computed, skipped, computed; each on every rank, against the model and the formula."""
    check_generation(graphs_of(name, ranks), by_hand(name), change=MORE_FAMILIES[name].change)


@pytest.mark.parametrize("name, ranks", CASES)
def test_all_blocks_but_the_first_are_skipped_and_the_image_is_stored(name: str, ranks: int) -> None:
    for layout in graphs_of(name, ranks).layouts:
        blocks = by_hand(name).blocks
        assert len(layout.skipped.blocks) == len(blocks) - MORE_FAMILIES[name].behind
        residual, *stored = STATE.get(name, IMAGE_ONLY)
        # What a convolution makes is whole on each rank, and so is stored.
        share = 1 if name.startswith("sana") else ranks
        expected = [residual // ranks, *(tokens // share for tokens in stored)]
        assert [value.shape[:-1].numel() // BATCH for value in layout.state] == expected


@pytest.mark.parametrize(
    "name, ranks", [("flux2-klein", 1), ("flux2-klein", 2), pytest.param("auraflow", 1, marks=pytest.mark.full)]
)
def test_streams_that_skipped_blocks_join_are_stored_apart(name: str, ranks: int) -> None:
    """The last block is computed and reads both as one."""
    graphs = graphs_of(name, ranks, last_blocks=1)
    for layout in graphs.layouts:
        assert [value.shape[1] for value in layout.state] == [48 // ranks, 12 // ranks, 48 // ranks]
    check_generation(graphs, by_hand(name, last=1))
