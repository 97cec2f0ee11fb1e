"""Of equal blocks one is traced: the graph is the one that tracing all of them gives."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture import Captured, capture, captured
from families import ALL_FAMILIES
from quick import quick
from random_tensors import randomise
from small_models import WIDTH, Block, Denoiser, image_tokens
from torch import Tensor, fx, nn

from paracompile.errors import module_paths, source_line
from paracompile.layout.graph import writes
from paracompile.passes.equal_blocks import fold_equal_blocks
from paracompile.passes.normalise import normalise


def both(of: Captured, monkeypatch: pytest.MonkeyPatch) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The graph with equal blocks traced once, and with all of them traced."""
    folded = normalise(of.gm, of.example_inputs)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.import_module("paracompile.passes.normalise"), "fold_equal_blocks", lambda gm: None)
        return folded, normalise(of.gm, of.example_inputs)


def looks(gm: fx.GraphModule) -> list[Any]:
    """Each node with what it computes of what, how its value looks, and where in the model it comes from."""
    number = {node: index for index, node in enumerate(gm.graph.nodes)}
    return [
        (
            str(node.target) if node.op == "call_function" else node.op,
            str(fx.map_arg((node.args, node.kwargs), lambda source: f"#{number[source]}")),
            str([(value.shape, value.stride(), value.dtype) for value in values(node)]),
            module_paths(node)[-1:] if node.op == "call_function" else None,
            source_line(node) if node.op == "call_function" else None,
        )
        for node in gm.graph.nodes
    ]


def values(node: fx.Node) -> list[Tensor]:
    made = node.meta.get("val")
    return [made] if isinstance(made, Tensor) else list(made) if isinstance(made, (list, tuple)) else []


class WithConstants(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([0.5]) + super().forward(x) * torch.tensor([0.25]) + torch.tensor(0.125)


@pytest.mark.parametrize("depth", [3, 5])
def test_several_constants_in_each_block(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomise(Denoiser(depth, block=WithConstants)).requires_grad_(False)
    of = capture(model, {"hidden_states": image_tokens(), "timestep": torch.ones(2)})
    folded, traced = both(of, monkeypatch)
    for graph in (folded, traced):
        assert torch.equal(graph(*of.arguments)[0], of.expected)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", quick(ALL_FAMILIES, "flux", "mochi"))
def test_the_same_graph_whether_all_blocks_are_traced_or_one(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    of = captured(family)
    folded, traced = both(of, monkeypatch)
    with torch.no_grad():
        assert torch.equal(folded(*of.arguments)[0], traced(*of.arguments)[0])
    assert looks(folded) == looks(traced)


def test_equal_blocks_are_found() -> None:
    folded = fold_equal_blocks(captured("wan").gm)
    assert folded is not None
    assert len(folded.bodies) == 1
    assert len(folded.members) == 3


class Chain(nn.Module):
    """Blocks, and what happens to what leaves the first."""

    def __init__(self, between: Callable[[Tensor], Any] = lambda x: None, block: type[nn.Module] = Block) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.between = between

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x = block(x)
            self.between(x)
        return (x,)


class Writes(Block):
    """Writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class HandsOn(Block):
    """Gives back a view of what it is given, and adds to it."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.view(*x.shape)
        y += super().forward(x)
        return y


class Draws(Block):
    """Sizes depend on data."""

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x[0, :, 0] > 0).nonzero()[:, 0]
        return super().forward(x) + x[:, chosen].sum()


class Parted(Block):
    """Also gives a view of what it gives."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = super().forward(x)
        return x, x[:, :5]


class Overlapping(nn.Module):
    """Writes to one of two values that leave a block; the other must see it."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Parted() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            x, part = block(x)
            part.zero_()
        return (x,)


class Cloned(nn.Module):
    """The model on a copy, which it may write to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor]:
        output: tuple[Tensor] = self.model(x.clone())
        return output


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "model",
    [
        Chain(lambda x: x[:, :5].zero_()),
        Chain(),
        Chain(lambda x: x.add_(1)),
        Chain(block=Writes),
        Chain(block=HandsOn),
        Overlapping(),
    ],
    ids=["a part written outside", "plain", "written outside", "writes to its input", "hands its input on", "overlap"],
)
def test_writing_across_the_edge_of_a_block(model: nn.Module) -> None:
    """Where memory is shared, all blocks are traced; the result is the model's in any case."""
    randomise(model)
    of = capture(Cloned(model), {"x": image_tokens(WIDTH)})
    gm = normalise(of.gm, of.example_inputs)
    assert not any(map(writes, gm.graph.nodes))
    with torch.no_grad():
        torch.testing.assert_close(gm(*of.arguments)[0], of.expected, rtol=0, atol=0)


def test_autocast_around_blocks_reaches_into_them() -> None:
    class Around(Chain):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    of = capture(randomise(Around()), {"x": image_tokens(WIDTH)})
    assert fold_equal_blocks(of.gm) is None
    gm = normalise(of.gm, of.example_inputs)
    with torch.no_grad():
        torch.testing.assert_close(gm(*of.arguments)[0], of.expected, rtol=0, atol=0)


def test_blocks_that_differ_in_a_number_are_not_equal() -> None:
    model = Chain()
    model.blocks = nn.ModuleList([*model.blocks[:1], *copy.deepcopy(list(model.blocks[:1])), Half()])
    of = capture(randomise(model), {"x": image_tokens(WIDTH)})
    folded = fold_equal_blocks(of.gm)
    assert folded is not None
    assert len(folded.members) == 2
    gm = normalise(of.gm, of.example_inputs)
    with torch.no_grad():
        assert torch.equal(gm(*of.arguments)[0], of.expected)


class Half(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 0.5


def test_sizes_that_depend_on_data_are_left_alone() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        of = capture(randomise(Chain(block=Draws)), {"x": image_tokens(WIDTH)})
        assert fold_equal_blocks(of.gm) is None
        gm = normalise(of.gm, of.example_inputs)
    with torch.no_grad():
        assert torch.equal(gm(*of.arguments)[0], of.expected)
