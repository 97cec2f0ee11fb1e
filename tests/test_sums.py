"""Sums over what is cut: ranks add up what they make of their parts, where that is less than what would be gathered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock
from quick import quick
from random_tensors import draw, randomise
from rule_check import check
from small_models import (
    BATCH,
    IMAGE,
    WIDTH,
    Mesh,
    SelfAttention,
    Transformer,
    assert_sharded,
    heads,
    image_tokens,
    merge,
    shard,
)
from torch import Tensor, nn

aten = torch.ops.aten


@pytest.mark.whole
@pytest.mark.parametrize(
    "target, arguments, sums",
    [
        (aten.matmul.default, (draw(2, 5, 6), draw(2, 6, 4)), 1),
        (aten.matmul.default, (draw(6), draw(6, 4)), 1),
        (aten.matmul.default, (draw(5, 6), draw(6)), 1),
        (aten.matmul.default, (draw(6), draw(6)), 1),
        (aten.bmm.default, (draw(2, 5, 6), draw(2, 6, 4)), 1),
        (aten.einsum.default, ("bnd,bne->de", [draw(2, 5, 6), draw(2, 5, 4)]), 2),
        (aten.einsum.default, ("ni,ni->n", [draw(5, 6), draw(5, 6)]), 1),
        (aten.einsum.default, ("ii->", [draw(5, 5)]), 0),
        (aten.linear.default, (draw(2, 5, 6), draw(4, 6), draw(4)), 0),
        (aten.addmm.default, (draw(5, 4), draw(5, 6), draw(6, 4)), 0),
        (aten.sum.dim_IntList, (draw(2, 5, 6), [1]), 1),
        (aten.sum.dim_IntList, (draw(2, 5, 6), [-1, 0], True), 2),
        (aten.mean.dim, (draw(2, 5, 6), [1, 2]), 2),
        (aten.mean.default, (draw(2, 5),), 2),
        (aten.sum.default, (draw(3, 5).to(torch.complex64),), 0),
    ],
)
def test_sums_of_parts(target: Any, arguments: tuple[Any, ...], sums: int) -> None:
    verdict = check(target, *arguments, search=False)
    assert (verdict.wrong, verdict.sums) == ([], sums)


def linear_attention(x: Tensor) -> Tensor:
    """As Sana has it: keys times values over all tokens, with a row of ones that counts what is summed."""
    q, k, v = (heads(F.relu(part)).mT for part in (x, x * 0.5 + 0.1, x - 0.2))
    scores = F.pad(v, (0, 0, 0, 1), value=1.0) @ k.mT
    found = (scores @ q).mT
    return x + merge(found[..., :-1] / (found[..., -1:] + 1e-6))


def masked_mean(x: Tensor) -> Tensor:
    weight = (torch.arange(x.shape[1]) % 3 > 0).to(x.dtype).view(1, -1, 1)
    return x + (x * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


MIDDLES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "mean": (lambda x: x + x.mean(1, keepdim=True), 1),
    "mean of tokens and channels": (lambda x: x * x.mean((1, 2), keepdim=True), 1),
    "sum of rows and tokens": (lambda x: x + x.sum((0, 1)) / 100, 1),
    "masked mean": (masked_mean, 1),
    "linear attention": (linear_attention, 1),
    "einsum": (lambda x: x + torch.einsum("bnc,bnd->bcd", x[..., :9], x).mean(1, keepdim=True) / 10, 1),
    "gate": (lambda x: x * torch.sigmoid(F.linear(x.mean(1), torch.ones(WIDTH, WIDTH) / WIDTH))[:, None], 1),
}


def model(middle: Callable[[Tensor], Tensor]) -> nn.Module:
    return randomise(Transformer(2, middle=middle))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "mesh", quick([2, 3, {"ring": 2, "ulysses": 2}, {"batch": 2, "ulysses": 2}], {"batch": 2, "ulysses": 2}), ids=str
)
@pytest.mark.parametrize("name", MIDDLES)
def test_sums_in_the_middle_of_blocks(name: str, mesh: Mesh) -> None:
    middle, sums = MIDDLES[name]
    sharded = assert_sharded(model(middle), [image_tokens()], mesh, tolerance=5e-6)
    if mesh in (2, 3):
        assert sharded.collectives["all_reduce"] == 2 * sums
        assert sharded.collectives["all_gather_into_tensor"] == 1  # the result
        assert sharded.whole_operations() == ["aten.linear.default"] * 2 * (name == "gate")  # of one token


def test_what_is_no_smaller_than_what_it_is_made_of_is_not_summed_in_parts() -> None:
    """Tokens are gathered for the sum over all: here it has more elements than they have."""

    def middle(x: Tensor) -> Tensor:
        tall = torch.ones(8 * IMAGE, IMAGE) / IMAGE
        return x + (tall @ x).unflatten(1, (8, IMAGE)).sum(1)

    sharded = assert_sharded(model(middle), [image_tokens()], 2, tolerance=5e-6)
    assert "all_reduce" not in sharded.collectives


def test_a_sum_of_what_is_gathered_anyway_is_not_made_in_parts() -> None:
    def middle(x: Tensor) -> Tensor:
        return x.flip(1) + x.mean(1, keepdim=True)

    sharded = assert_sharded(model(middle), [image_tokens()], 2, tolerance=5e-6)
    assert "all_reduce" not in sharded.collectives


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_of_half_precision(dtype: torch.dtype) -> None:
    """Their sums are added, and divided, in float32: a sum over tokens need not fit into half precision."""
    attention = randomise(SelfAttention()).to(dtype)

    def mean(x: Tensor) -> Tensor:
        return (attention(x) * 0.1 + 30000).mean(1)

    x = image_tokens(WIDTH).to(dtype)
    with torch.no_grad():
        expected = mean(x)
    sharded = shard(mean, [x], 2)
    assert sharded.collectives["all_reduce"] == 1
    assert sharded.result.dtype == dtype
    torch.testing.assert_close(sharded.result, expected)


def test_ranks_without_tokens_add_nothing() -> None:
    attention = randomise(SelfAttention())

    def mean(x: Tensor) -> Tensor:
        return attention(x).mean(1) + attention(x).mT.matmul(x).mean(1)

    assert_sharded(mean, [draw(BATCH, 3, WIDTH)], 4, tolerance=5e-6)


class Squeezed(nn.Module):
    """Convolutions of images with a gate for each channel, of the mean over all pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.gate = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        return self.last(x * self.gate(x.mean((2, 3)))[..., None, None].sigmoid())


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_means_over_pixels(ranks: int) -> None:
    sharded = assert_sharded(randomise(Squeezed()), [draw(1, 3, 11, 5)], ranks, tolerance=5e-6)
    assert sharded.collectives["all_reduce"] == 1
    assert sharded.collectives["all_gather_into_tensor"] == 1


@pytest.mark.parametrize("ranks", [2, 3])
def test_linear_attention_among_pixels(ranks: int) -> None:
    """A block of AutoencoderDC's, between convolutions: keys times values are added up, and nothing is gathered."""
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        EfficientViTBlock(16, attention_head_dim=4, qkv_multiscales=(5,), norm_type="rms_norm"),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Conv2d(16, 3, 3, padding=1),
    )
    sharded = assert_sharded(randomise(model), [draw(1, 3, 14, 11)], ranks, tolerance=1e-5)
    assert sharded.collectives["all_reduce"] == 1
    assert sharded.collectives["all_gather_into_tensor"] == 1
    assert sharded.whole_operations() == []
