"""diffusers' autoencoders through `torch.compile(..., backend="paracompile")` on two real processes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from autoencoders import AUTOENCODERS, decoding, encoding
from capture import assert_equal
from pool import Pool
from quick import quick
from random_tensors import draw, randomise
from torch import Tensor, nn

from paracompile import init_mesh
from paracompile.report.report import Report


def compiled_decoder(rank: int, name: str, compiler: str) -> tuple[list[Tensor], list[Tensor], list[Report]]:
    """What two latents become, plainly and with the decoder compiled, and the report of every graph."""
    vae: Any = AUTOENCODERS[name].build()
    latents = [AUTOENCODERS[name].latents(5, 7), -AUTOENCODERS[name].latents(5, 7)]
    reports: list[Report] = []
    options = {"mesh": init_mesh("cpu"), "compiler": compiler, "report": reports.append, "timeout": 120}
    with torch.no_grad():
        expected = [decoding(vae)(each) for each in latents]
        vae.decoder = torch.compile(vae.decoder, backend="paracompile", options=options)
        found = [decoding(vae)(each) for each in latents]
    return found, expected, reports


@pytest.mark.slow
@pytest.mark.parametrize("compiler", quick(["eager", "inductor"], "eager"))
def test_a_compiled_decoder_gives_the_plain_one_s_picture(compiler: str, two_ranks: Pool) -> None:
    for found, expected, reports in two_ranks.run(compiled_decoder, "flux", compiler):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
        (report,) = reports
        assert report.ranks == 2
        assert report.collectives["all_to_all_single"] > 10
        assert report.flops_rank < 0.65 * report.flops_whole


@pytest.mark.slow
@pytest.mark.parametrize("name", quick(["wan", "cogvideox"], "wan"))
def test_a_loop_over_frames_in_python_stays_and_its_pieces_are_shared(name: str, two_ranks: Pool) -> None:
    for found, expected, reports in two_ranks.run(compiled_decoder, name, "eager"):
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
        assert all(report.ranks == 2 for report in reports)


def compiled_encoder(rank: int, name: str) -> tuple[Tensor, Tensor]:
    vae: Any = AUTOENCODERS[name].build()
    pixels = AUTOENCODERS[name].pixels(5, 7)
    with torch.no_grad():
        expected = encoding(vae)(pixels)
        vae.encoder.compile(backend="paracompile", options={"compiler": "eager", "timeout": 120})
        return encoding(vae)(pixels), expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux"])
def test_a_compiled_encoder_gives_the_plain_one_s_latents(name: str, two_ranks: Pool) -> None:
    for found, expected in two_ranks.run(compiled_encoder, name):
        assert_equal(found, expected)


class Broken(nn.Module):
    """A graph break between convolutions, and after them a piece without any."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 5, padding=2)
        self.out = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        torch._dynamo.graph_break()
        x = self.after(x)
        torch._dynamo.graph_break()
        return self.out(x)


def broken(rank: int) -> tuple[Tensor, Tensor, list[int]]:
    model, x = randomise(Broken()), draw(1, 3, 9, 7)
    reports: list[Report] = []
    options = {"compiler": "eager", "report": reports.append, "timeout": 120}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = model(x)
        found = torch.compile(model, backend="paracompile", options=options)(x)
    return found, expected, [report.ranks for report in reports]


def test_pieces_that_convolve_are_shared_and_others_run_whole(two_ranks: Pool) -> None:
    for found, expected, ranks in two_ranks.run(broken):
        assert_equal(found, expected)
        assert ranks == [2, 2, 1]


def tiled(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """A picture in diffusers' tiles, plainly and with the decoder compiled, and the untiled one."""
    vae: Any = AUTOENCODERS["flux"].build()
    latents = AUTOENCODERS["flux"].latents(7, 10)
    with torch.no_grad():
        untiled = decoding(vae)(latents)
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = 8, 32
        expected = decoding(vae)(latents)
        vae.decoder = torch.compile(vae.decoder, backend="paracompile", options={"compiler": "eager", "timeout": 120})
        return decoding(vae)(latents), expected, untiled


@pytest.mark.full
def test_tiles_of_several_sizes_are_shared_and_give_the_tiled_picture(two_ranks: Pool) -> None:
    for found, expected, untiled in two_ranks.run(tiled):
        assert_equal(found, expected)
        assert float((expected - untiled).abs().max()) > 1e-3
