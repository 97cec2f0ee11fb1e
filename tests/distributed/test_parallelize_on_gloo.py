"""Pipelines that were set up by one call, on two ranks: all end with rank 0's picture, whatever each would draw."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Iterator
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_vae_too(two_ranks: Pool) -> None:
    (expected, picture), (_, dropped) = two_ranks.run(decoded)
    assert dropped is None
    assert (picture - expected).abs().max() < 1e-5


def other_generators(rank: int) -> Tensor:
    pipe = paracompile.parallelize(load(), compiler="eager")
    return latents(pipe, generator=torch.Generator() if rank == 0 else None)


@pytest.mark.full
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


def with_encoders() -> Any:
    """A pipeline whose text encoders are its own."""
    pipe = load()
    pipe.text_encoder, pipe.text_encoder_2 = copy.deepcopy(pipe.text_encoder), copy.deepcopy(pipe.text_encoder_2)
    return pipe


def bytes_of(module: torch.nn.Module) -> int:
    return sum(weight.numel() * weight.element_size() for weight in module.parameters())


def placed(rank: int) -> dict[str, Any]:
    """What a rank holds and encodes where each text encoder is on one rank."""
    plain = load()
    found: dict[str, Any] = {}
    embeds = plain.encode_prompt("a circle", "a circle", max_sequence_length=plain.tokenizer_2.model_max_length)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        pipe = paracompile.parallelize(with_encoders(), compiler="eager", text_encoders=True)
    paracompile.parallelize(pipe, compiler="eager", text_encoders=True)  # once more does no harm
    found["said"] = said.getvalue().splitlines()
    found["held"] = [bytes_of(encoder) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
    found["whole"] = [bytes_of(encoder) for encoder in (plain.text_encoder, plain.text_encoder_2)]
    found["first output"] = type(pipe.text_encoder(torch.tensor([[1, 2]]), output_hidden_states=False)).__name__
    here = pipe.encode_prompt("a circle", "a circle", max_sequence_length=plain.tokenizer_2.model_max_length)
    found["embeds"] = [torch.allclose(one, other, atol=1e-5) for one, other in zip(here, embeds, strict=True)]
    return found


def test_each_text_encoder_is_on_one_rank(two_ranks: Pool) -> None:
    first, second = two_ranks.run(placed)
    large, small = first["whole"]
    assert 0 < small < large
    assert first["held"] == [large, 0]
    assert second["held"] == [0, small]
    assert first["said"][2:] == [
        "  text_encoder (CLIPTextModel): on rank 0",
        "  text_encoder_2 (T5EncoderModel): on rank 1",
    ]
    for each in (first, second):
        assert all(each["embeds"])
        assert each["first output"] == "BaseModelOutputWithPooling"


def of_placed_encoders(rank: int) -> tuple[Tensor, Tensor]:
    plain, pipe = load(), paracompile.parallelize(with_encoders(), compiler="eager", text_encoders=True)
    return latents(plain), latents(pipe)


@pytest.mark.slow
def test_the_picture_of_encoders_on_different_ranks(two_ranks: Pool) -> None:
    (plain, first), (_, second) = two_ranks.run(of_placed_encoders)
    check(first, plain)
    assert torch.equal(first, second)


def misused(rank: int) -> list[str]:
    """What a rank is told where the other one got another prompt, or asks for weights that it has not."""
    pipe = paracompile.parallelize(with_encoders(), compiler="eager", text_encoders=True)
    ids = torch.tensor([[1, 2]])

    def its_part() -> None:
        pipe.text_encoder_2.get_input_embeddings()(ids)
        pipe.text_encoder_2(ids)

    def its_weights() -> None:
        pipe.text_encoder_2.state_dict()
        pipe.text_encoder_2(ids)

    def calls() -> Iterator[Callable[[], object]]:
        yield lambda: pipe.text_encoder(ids + rank)
        yield its_part
        yield its_weights

    told = []
    for call in calls():
        with pytest.raises(paracompile.ParacompileError) as error:
            call()
        told.append(str(error.value))
    return told


def test_what_needs_the_weights_elsewhere_is_an_error_on_all_ranks(two_ranks: Pool) -> None:
    elsewhere = "text_encoder_2 is on rank 1, and its weights, or a part of it, are wanted on rank 0"
    for told in two_ranks.run(misused):
        for message, why in zip(told, ("ranks differ in 'inputs'", elsewhere, elsewhere), strict=True):
            assert why in message
