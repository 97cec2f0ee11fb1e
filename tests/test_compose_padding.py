"""Padding that convolutions take over, and copies that are made to the measure of the window that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from random_tensors import draw, randomise
from small_models import assert_sharded, close, normalised, targets
from torch import Tensor, fx, nn

from paracompile.layout.graph import named_arguments
from paracompile.passes.compose_padding import compose_padding

aten = torch.ops.aten


def composed(model: Callable[[Tensor], Tensor], x: Tensor) -> fx.GraphModule:
    """The graph after the pass, run beside the model."""
    graph = compose_padding(normalised(model, x), ())
    with torch.no_grad():
        inputs = [x if node.meta["val"].shape == x.shape else None for node in graph.graph.find_nodes(op="placeholder")]
        assert None not in inputs
        (found,) = graph(*inputs)
        close(found, model(x))
    return graph


def convolution(pad: list[int], value: float = 0.0, **how: Any) -> Callable[[Tensor], Tensor]:
    return lambda x: F.conv2d(F.pad(x, pad, value=value), torch.ones_like(x)[:1, :, :3, :3], **how)


@pytest.mark.parametrize(
    "pad, own, left, padding",
    [
        ([1, 1, 2, 2], 0, None, [2, 1]),
        ([1, 1, 2, 2], (3, 0), None, [5, 1]),
        ([1, 1], 0, None, [0, 1]),
        ([0, 1, 0, 1], 0, [0, 1, 0, 1], [0, 0]),
        ([2, 1, 0, 4], 1, [1, 0, 0, 4], [1, 2]),
        ([-1, 2, 1, 1], 0, [-1, 2, 0, 0], [1, 0]),
        ([-1, -1, 1, 1], 0, [-1, -1, 0, 0], [1, 0]),
    ],
)
def test_what_is_padded_at_both_edges_goes_to_the_convolution(
    pad: list[int], own: Any, left: list[int] | None, padding: list[int]
) -> None:
    graph = composed(convolution(pad, padding=own), draw(2, 3, 7, 9))
    pads = [node for node in graph.graph.nodes if "pad" in str(node.target)]
    assert [list(named_arguments(node)["pad"]) for node in pads] == ([] if left is None else [left])
    (node,) = graph.graph.find_nodes(op="call_function", target=aten.conv2d.default)
    assert named_arguments(node)["padding"] == padding


@pytest.mark.parametrize(
    "model",
    [
        convolution([1, 1, 1, 1], value=0.5),
        lambda x: F.conv2d(F.pad(x, [1, 1, 1, 1], mode="reflect"), torch.ones_like(x)[:1, :, :3, :3]),
        lambda x: F.conv2d(F.pad(x, [0, 0, 0, 0, 1, 1]), torch.ones_like(x).repeat(1, 2, 1, 1)[:1, :5, :3, :3]),
    ],
)
def test_other_padding_stays(model: Callable[[Tensor], Tensor]) -> None:
    before = targets(normalised(model, draw(2, 3, 7, 9)))
    assert targets(composed(model, draw(2, 3, 7, 9))) == before


def test_padding_that_is_read_elsewhere_stays_as_well() -> None:
    def model(x: Tensor) -> Tensor:
        padded = F.pad(x, [1, 1, 1, 1])
        return F.conv2d(padded, torch.ones_like(x)[:1, :, :3, :3]) + padded[:, :1, 1:-1, 1:-1]

    graph = composed(model, draw(2, 3, 7, 9))
    assert targets(graph).count("pad.default") == 1


class Causal(nn.Module):
    """A convolution that is causal in time, in the middle of others."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.first, self.second, self.last = nn.Conv3d(3, 4, 3, padding=1), nn.Conv3d(4, 5, 3), nn.Conv3d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        return self.last(F.silu(self.second(F.pad(x, (1, 1, 1, 1, 2, 0), mode=self.mode))))


@pytest.mark.parametrize("mode", ["constant", "replicate", "reflect"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_edges_are_joined_before_padding(mode: str, ranks: int) -> None:
    """One join of what is not padded yet, and one copy that pads, at the outer edges too."""
    sharded = assert_sharded(randomise(Causal(mode)), [draw(1, 3, 3, 11, 5)], ranks, tolerance=5e-6)
    for graph in sharded.graphs:
        (_, second, _) = graph.graph.find_nodes(op="call_function", target=aten.conv3d.default)
        padded = second.args[0]
        assert "pad" in str(padded.target)
        assert padded.args[0].target is aten.cat.default
        assert all("pad" not in str(piece.target) for piece in padded.args[0].args[0])


@pytest.mark.parametrize("ranks", [2, 4])
def test_edges_are_exchanged_before_upsampling(ranks: int) -> None:
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Upsample(scale_factor=2), nn.Conv2d(4, 3, 3, padding=1))
    )
    sharded = assert_sharded(model, [draw(1, 3, 9, 5)], ranks, tolerance=5e-6)
    exchange = next(node for node in sharded.graphs[0].graph.nodes if "all_to_all_single" in str(node.target))
    assert sum(exchange.args[2]) == 4 * 5  # a row of the coarse image


def test_a_copy_that_others_read_as_well_is_made_once() -> None:
    def model(x: Tensor) -> Tensor:
        weight = torch.ones(3, 3, 3, 3)
        x = F.interpolate(F.conv2d(x, weight, padding=1), scale_factor=2)
        return F.conv2d(x, weight, padding=1) + x

    sharded = assert_sharded(model, [draw(1, 3, 9, 5)], 2, tolerance=5e-6)
    assert targets(sharded.graphs[0]).count("upsample_nearest2d.vec") == 1


def test_under_autocast() -> None:
    model = randomise(Causal("constant"))

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    assert_sharded(run, [draw(1, 3, 3, 11, 5)], 2, tolerance=3e-2)
