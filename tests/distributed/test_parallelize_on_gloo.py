"""Pipelines that were set up by one call, on two ranks: all end with rank 0's picture, whatever each would draw."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any
from unittest import mock

import pytest
import torch
from denoising import ALWAYS
from pool import Pool, PoolError
from test_parallelize import latents, load, with_adapters
from torch import Tensor

import paracompile


def pictures(rank: int) -> dict[str, Any]:
    """What a rank ends with and shows, for several ways to call."""
    found: dict[str, Any] = {}
    plain = load()
    torch.manual_seed(7)
    found["plain"] = latents(plain, generator=None)
    found["plain, generator"] = latents(plain, generator=torch.Generator().manual_seed(3))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        pipe = paracompile.parallelize(load(), compiler="eager")
    found["said"] = said.getvalue()
    found["name"] = type(pipe).__name__
    found["bar"] = pipe._progress_bar_config
    torch.manual_seed(7 + rank)
    found["no generator"] = latents(pipe, generator=None)
    found["generator"] = latents(pipe, generator=torch.Generator().manual_seed(3 + rank))
    found["generators"] = latents(pipe, generator=[torch.Generator().manual_seed(3 + rank)])
    return found


def check(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_all_ranks_end_with_the_picture_of_the_first(two_ranks: Pool) -> None:
    first, second = two_ranks.run(pictures)
    assert first["said"].splitlines()[0] == "paracompile: FluxPipeline on 2 ranks (ulysses 2)"
    assert second["said"] == ""
    assert (first["name"], second["name"]) == ("FluxPipeline", "FluxPipeline")
    assert first["bar"] == {"disable": True}  # as `load` has it
    assert second["bar"]["disable"] is True
    assert torch.equal(first["no generator"], second["no generator"])
    check(first["no generator"], first["plain"])
    for way in ("generator", "generators"):
        assert torch.equal(first[way], second[way])
        check(first[way], first["plain, generator"])
    assert (first["no generator"] - first["generator"]).abs().max() > 0.1


def first_only(rank: int) -> list[Any]:
    pipe = paracompile.parallelize(load(), compiler="eager", output="first")
    paracompile.parallelize(pipe, compiler="eager", output="first")  # once more does no harm
    size, tokens = pipe.vae.config.sample_size, pipe.tokenizer_2.model_max_length
    with mock.patch.object(pipe.vae, "decode", wraps=pipe.vae.decode) as decode:
        output = pipe("a circle", height=size, width=size, max_sequence_length=tokens, num_inference_steps=1)
    marks = sum("_paracompile_ranks" in vars(base) for base in type(pipe).__mro__)
    return [output is None, decode.call_count, marks]


def test_the_result_may_be_the_first_rank_s_alone(two_ranks: Pool) -> None:
    """The second neither returns nor decodes it."""
    assert two_ranks.run(first_only) == [[False, 1, 1], [True, 0, 1]]


def decoded(rank: int) -> list[Any]:
    """The picture, plain and with the VAE shared, and what a rank that drops it got."""
    plain = load()
    size, tokens = plain.vae.config.sample_size, plain.tokenizer_2.model_max_length
    how = dict(height=size, width=size, max_sequence_length=tokens, num_inference_steps=2, output_type="pt")
    expected = plain("a circle", generator=torch.Generator().manual_seed(3), **how).images
    pipe = load()
    pipe.vae = copy.deepcopy(pipe.vae)
    paracompile.parallelize(pipe, compiler="eager", vae=True, output="first")
    output = pipe("a circle", generator=torch.Generator().manual_seed(3), **how)
    return [expected, output and output.images]


def test_the_vae_too(two_ranks: Pool) -> None:
    (expected, picture), (_, dropped) = two_ranks.run(decoded)
    assert dropped is None
    assert (picture - expected).abs().max() < 1e-5


def other_generators(rank: int) -> Tensor:
    pipe = paracompile.parallelize(load(), compiler="eager")
    return latents(pipe, generator=torch.Generator() if rank == 0 else None)


def test_ranks_with_other_generators_are_told_so() -> None:
    pool = Pool(2)
    with pytest.raises(PoolError, match="ranks differ in 'generators'"):
        pool.run(other_generators)
    pool.close()


def adapters(rank: int) -> list[float]:
    """How far each picture is from the plain one; the cache is on, and skips nothing."""
    torch._dynamo.reset()
    pipe = paracompile.parallelize(load(), rdt=ALWAYS, compiler="eager")
    paracompile.set_rdt(pipe.transformer, 0)
    pairs = zip(with_adapters(pipe), with_adapters(load()), strict=True)
    return [float((found - plain).abs().max() / plain.abs().max()) for found, plain in pairs]


@pytest.mark.full
def test_adapters_come_and_go_on_two_ranks(two_ranks: Pool) -> None:
    for differences in two_ranks.run(adapters):
        assert len(differences) == 11
        assert max(differences) < 1e-5
