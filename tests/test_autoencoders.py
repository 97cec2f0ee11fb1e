"""diffusers' autoencoders, decoded and encoded by all ranks in one process: what the plain model makes, to rounding."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from autoencoders import AUTOENCODERS, decoding, encoding
from quick import quick
from small_models import assert_sharded
from torch import nn

ROWS, COLUMNS = 5, 7  # of a latent: a share of 2 or 4 ranks is no whole number of rows


@cache
def built(name: str) -> Any:
    return AUTOENCODERS[name].build()


cases = pytest.mark.parametrize("name", AUTOENCODERS)
on_ranks = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.full)])


@pytest.mark.sampled(2)
@cases
@on_ranks
def test_decoding(name: str, ranks: int) -> None:
    latents = AUTOENCODERS[name].latents(ROWS, COLUMNS)
    sharded = assert_sharded(decoding(built(name)), [latents], ranks, tolerance=1e-5)
    assert sharded.report.notes[0].startswith("images are cut along their ")
    assert sharded.share < 1.25 / ranks + 0.1


@pytest.mark.parametrize("name", quick(AUTOENCODERS, "flux"))
@on_ranks
def test_encoding(name: str, ranks: int) -> None:
    pixels = AUTOENCODERS[name].pixels(ROWS, COLUMNS)
    sharded = assert_sharded(encoding(built(name)), [pixels], ranks, tolerance=1e-5)
    assert sharded.share < 1.25 / ranks + 0.1


@cases
def test_every_row_depends_on_the_ones_beside_it(name: str) -> None:
    """Of the tests above: where a rank forgot its neighbour's rows, they would show it."""
    latents = AUTOENCODERS[name].latents(ROWS, COLUMNS)
    with torch.no_grad():
        whole = decoding(built(name))(latents)
        other = latents.clone()
        other[..., 3:, :] = 0
        changed = decoding(built(name))(other)
    above = 3 * AUTOENCODERS[name].scale - 1
    difference = (whole - changed)[..., above, :].abs().max()
    assert float(difference) > 1e-3 * float(whole.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", quick(["flux", "wan"], "flux"))
def test_the_other_spatial_dimension_is_cut_where_there_is_more_of_it(name: str) -> None:
    sharded = assert_sharded(decoding(built(name)), [AUTOENCODERS[name].latents(3, 8)], 4, tolerance=1e-5)
    assert sharded.report.notes[0].startswith("images are cut along their width, 8 positions")


@pytest.mark.slow
def test_the_decoder_is_no_class_that_is_known() -> None:
    """The same layers, in a class of one's own."""
    inner = built("flux").decoder

    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.inner(x).flip(1)
            return result

    assert_sharded(Mine(), [AUTOENCODERS["flux"].latents(ROWS, COLUMNS)], 2, tolerance=1e-5)


@pytest.mark.slow
def test_tiles_are_shared_and_give_the_tiled_picture() -> None:
    """Every rank does its part of each tile, here in one graph of all tiles."""
    vae = AUTOENCODERS["flux"].build()
    latents = AUTOENCODERS["flux"].latents(9, 6)
    with torch.no_grad():
        untiled = decoding(vae)(latents)
    vae.enable_tiling()
    vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 32
    sharded = assert_sharded(decoding(vae), [latents], 2, tolerance=1e-5)
    assert float((sharded.result - untiled).abs().max()) > 1e-3
    assert sharded.share < 0.7
