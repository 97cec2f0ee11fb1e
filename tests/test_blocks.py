"""Which modules are a model's repeated blocks, and which stream of tokens runs through them to the output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from by_hand import IMAGE_SECOND
from capture import Captured, capture, captured
from families import ALL_FAMILIES, Inputs
from quick import quick
from random_tensors import draw, randomise
from small_models import BATCH, IMAGE, TEXT, WIDTH, Block, Denoiser, Joint, image_tokens, text_tokens
from torch import Tensor, fx, nn

from paracompile.mesh import Ranks
from paracompile.passes import pipeline, run_passes
from paracompile.patterns.blocks import Stream, brought_back, find_blocks, find_stream, residual_source


def in_aten(of: Captured) -> fx.GraphModule:
    """The graph in which blocks are looked for."""
    return run_passes(of.gm, of.example_inputs, pipeline(Ranks.simulated())[:3])


def named(name: str, number: int) -> list[str]:
    return [f"{name}.{index}" for index in range(number)]


BLOCKS = {
    "flux": named("transformer_blocks", 2) + named("single_transformer_blocks", 2),
    "stable_diffusion_3": named("transformer_blocks", 3),
    "wan": named("blocks", 3),
    "cogvideox": named("transformer_blocks", 3),
    "hunyuan_video": named("transformer_blocks", 2) + named("single_transformer_blocks", 2),
    "ltx_video": named("transformer_blocks", 2),
    "qwen_image": named("transformer_blocks", 2),
    "mochi": named("transformer_blocks", 2),
}
REFINERS = {"hunyuan_video": ["context_embedder.token_refiner.refiner_blocks.0"]}
"""Blocks of the text alone."""


def values_of(gm: fx.GraphModule, arguments: Sequence[Any], nodes: Sequence[fx.Node]) -> list[Tensor]:
    found: dict[fx.Node, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if n in nodes:
                found[n] = result
            return result

    with torch.no_grad():
        Keep(gm).run(*arguments)
    return [found[node] for node in nodes]


def image_of_each_block(family: str, of: Captured) -> tuple[Tensor, list[Tensor]]:
    """What the model's first block is given, and what each gives: of the image."""
    entered: list[Tensor] = []
    left: list[Tensor] = []
    place = int(family in IMAGE_SECOND)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.append(kwargs.get("hidden_states", args[0] if args else None))

    def leave(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        left.append(result[place] if isinstance(result, tuple) else result)

    blocks = [of.model.get_submodule(path) for path in BLOCKS[family]]
    hooks = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    hooks += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.no_grad():
            of.model(**of.inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return entered[0], left


@pytest.mark.parametrize("family", quick(ALL_FAMILIES, "flux", "wan"))
def test_the_blocks_and_the_stream_of_a_family(family: str) -> None:
    """All lists in sequence are one run, and the stream is the image's, value for value."""
    of = captured(family)
    gm = in_aten(of)
    assert [block.path for block in find_blocks(gm.graph)] == REFINERS.get(family, []) + BLOCKS[family]
    stream = find_stream(gm.graph)
    assert stream is not None
    assert [block.path for block in stream.blocks] == BLOCKS[family]
    found = values_of(gm, of.arguments, [stream.entries[0], *stream.exits])
    start, ends = image_of_each_block(family, of)
    for value, expected in zip(found, [start, *ends], strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.sampled(1)
@pytest.mark.parametrize("family", ["stable_diffusion_3", "mochi", "qwen_image"])
def test_a_last_block_that_drops_the_text_is_one_of_the_blocks(family: str) -> None:
    blocks = find_blocks(in_aten(captured(family)).graph)
    assert len(blocks[-1].nodes) < len(blocks[-2].nodes)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, sizes",
    quick([("flux", {"image": (2, 3)}), ("hunyuan_video", {"size": (1, 4, 6)})], ("flux", {"image": (2, 3)})),
)
def test_the_stream_is_the_image_s_also_where_the_text_is_longer(family: str, sizes: dict[str, Any]) -> None:
    of = captured(family, **sizes)
    gm = in_aten(of)
    stream = find_stream(gm.graph)
    assert stream is not None
    (found,) = values_of(gm, of.arguments, [stream.entries[0]])
    torch.testing.assert_close(found, image_of_each_block(family, of)[0], rtol=1e-5, atol=1e-5)


# Hand-written models


def graph_of(model: nn.Module, **inputs: Tensor) -> fx.Graph:
    return in_aten(capture(randomise(model), inputs)).graph


def noisy() -> Inputs:
    return {"hidden_states": image_tokens(), "timestep": torch.full((BATCH,), 0.5)}


def paths(stream: Stream | None) -> list[str]:
    return [] if stream is None else [block.path for block in stream.blocks]


def shape_of(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


class Of(nn.Module):
    """A function of tokens, made of the modules that it is given."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.do = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, **inputs: Tensor) -> tuple[Tensor]:
        return (self.do(self, **inputs),)


def chain(self: Any, x: Tensor) -> Tensor:
    for layer in self.layers:
        x = layer(x)
    return x


def pairs(kind: Callable[[], nn.Module], number: int = 3) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(number))


class Unlike(nn.Module):
    """A block without a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def test_blocks_of_one_list() -> None:
    graph = graph_of(Denoiser(4), **noisy())
    stream = find_stream(graph)
    assert paths(stream) == named("blocks", 4)
    assert stream is not None
    assert stream.entries[1:] == stream.exits[:-1]
    assert all(node in block.nodes for block, node in zip(stream.blocks, stream.exits, strict=True))
    assert stream.entries[0] not in stream.blocks[0].nodes


@pytest.mark.parametrize(
    "layers, blocks",
    [
        (lambda: nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4)), []),  # layers, not blocks
        (lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)), []),
        (lambda: pairs(Block, 1), named("layers", 1)),  # one block alone: nothing to skip
        (lambda: pairs(Unlike), named("layers", 3)),  # no stream that they add to
        (lambda: nn.ModuleList([Block(), Unlike()]), []),  # nothing alike
    ],
    ids=["linear layers", "an MLP", "one block", "no residual", "unlike"],
)
def test_what_is_no_run_of_blocks(layers: Callable[[], nn.Module], blocks: list[str]) -> None:
    graph = graph_of(Of(chain, layers=layers()), x=image_tokens(WIDTH))
    assert [block.path for block in find_blocks(graph)] == blocks
    assert find_stream(graph) is None


def test_a_model_without_lists() -> None:
    graph = graph_of(Of(lambda self, x: self.b(self.a(x)), a=Block(), b=Block()), x=image_tokens(WIDTH))
    assert find_blocks(graph) == []
    assert find_stream(graph) is None


def test_a_sequential_is_a_list() -> None:
    graph = graph_of(Of(lambda self, x: self.layers(x), layers=nn.Sequential(Block(), Block())), x=image_tokens(WIDTH))
    assert paths(find_stream(graph)) == named("layers", 2)


def test_of_nested_lists_the_outermost() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = pairs(Block, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.parts[1](self.parts[0](x))

    assert paths(find_stream(graph_of(Of(chain, layers=pairs(Nested)), x=image_tokens(WIDTH)))) == named("layers", 3)


class Runner(nn.Module):
    """Runs blocks that belong to another module."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_list_that_is_called_in_a_wrapper() -> None:
    graph = graph_of(Of(lambda self, x: self.inner(x), inner=Runner(pairs(Block))), x=image_tokens(WIDTH))
    assert paths(find_stream(graph)) == named("inner.blocks", 3)


def test_a_list_of_the_model_that_a_wrapper_calls() -> None:
    """One list under two names: its blocks are found under one of them, each once."""
    blocks = pairs(Block)
    model = Of(lambda self, x: self.runner(x), blocks=blocks, runner=Runner(blocks))
    found = paths(find_stream(graph_of(model, x=image_tokens(WIDTH))))
    assert found in (named("runner.blocks", 3), named("blocks", 3))


class Wrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = Block()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def test_blocks_that_are_wrapped_one_by_one() -> None:
    assert paths(find_stream(graph_of(Of(chain, layers=pairs(Wrapper)), x=image_tokens(WIDTH)))) == named("layers", 3)


class OtherType(nn.Module):
    """Adds in float32, as some models do, and goes on in the type that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH, elementwise_affine=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() + self.linear(self.norm(x.float()).type_as(x)).float()).type_as(x)


def test_a_stream_that_changes_its_type_and_back() -> None:
    model = Of(chain, layers=pairs(OtherType).bfloat16())
    stream = find_stream(graph_of(model, x=image_tokens(WIDTH).bfloat16()))
    assert paths(stream) == named("layers", 3)
    assert stream is not None
    assert {node.meta["val"].dtype for node in (*stream.entries, *stream.exits)} == {torch.bfloat16}


class Placed(Block):
    """Adds the places of the tokens to them first."""

    def forward(self, x: Tensor, places: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + places)


def test_what_each_block_adds_again_is_not_the_stream() -> None:
    """Although more was done for it."""

    def run(self: Any, x: Tensor) -> Tensor:
        places = self.places.weight.sin().tanh().exp().softmax(1).expand_as(x).clone()
        for block in self.blocks:
            x = block(x, places)
        return x

    model = Of(run, blocks=pairs(Placed), places=nn.Embedding(IMAGE, WIDTH))
    of = capture(randomise(model), {"x": image_tokens(WIDTH)})
    gm = in_aten(of)
    stream = find_stream(gm.graph)
    assert paths(stream) == named("blocks", 3)
    assert stream is not None
    assert stream.entries[1:] == stream.exits[:-1]
    (start,) = values_of(gm, of.arguments, stream.entries[:1])
    assert torch.equal(start, of.inputs["x"])


def test_blocks_that_take_turns() -> None:
    """On all tokens, and on every twelfth one; the stream is brought back behind those that leave it otherwise."""

    def run(self: Any, x: Tensor) -> Tensor:
        for block, other in zip(self.blocks, self.others, strict=True):
            x = block(x)
            x = x.unflatten(1, (-1, 12)).transpose(1, 2).flatten(0, 1)
            x = other(x)
            x = x.unflatten(0, (BATCH, 12)).transpose(1, 2).flatten(1, 2)
        return x

    stream = find_stream(graph_of(Of(run, blocks=pairs(Block), others=pairs(Block)), x=image_tokens(WIDTH)))
    assert stream is not None
    assert paths(stream) == [f"{name}.{number}" for number in range(3) for name in ("blocks", "others")]
    whole, twelfth = (BATCH, IMAGE, WIDTH), (BATCH * 12, IMAGE // 12, WIDTH)
    assert [shape_of(node) for node in stream.entries] == [whole, twelfth] * 3
    assert [shape_of(node) for node in stream.exits] == [whole, twelfth] * 3
    assert brought_back(stream, first=1, end=6) == brought_back(stream, first=2, end=5) == []
    assert shape_of(brought_back(stream, first=2, end=6)[-1]) == whole
    assert shape_of(brought_back(stream, first=1, end=5)[-1]) == twelfth


@pytest.mark.slow
def test_blocks_that_take_turns_on_as_many_frames_as_tokens() -> None:
    """The shapes are then equal and the order is not: what leaves is no residual of what entered until brought back."""
    side = 6

    def run(self: Any, x: Tensor) -> Tensor:
        for block, other in zip(self.blocks, self.others, strict=True):
            x = other(block(x).unflatten(0, (-1, side)).transpose(1, 2).flatten(0, 1))
            x = x.unflatten(0, (-1, side)).transpose(1, 2).flatten(0, 1)
        return x

    x = draw(BATCH * side, side, WIDTH)
    stream = find_stream(graph_of(Of(run, blocks=pairs(Block), others=pairs(Block)), x=x))
    assert stream is not None
    assert len(stream.blocks) == 6
    assert {shape_of(node) for node in (*stream.entries, *stream.exits)} == {tuple(x.shape)}
    for first, end in ((1, 5), (2, 6)):
        views = brought_back(stream, first, end)
        assert views
        entry = stream.entries[first]
        assert residual_source(views[-1], lambda node, entry=entry: node is not entry) is entry
        assert residual_source(stream.exits[end - 1], lambda node, entry=entry: node is not entry) is None
    assert brought_back(stream, 1, 6) == brought_back(stream, 2, 5) == []


class Rejoined(nn.Module):
    """A block that begins with a projection of the stream and an earlier one."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.block = nn.Linear(2 * WIDTH, WIDTH), Block()

    def forward(self, x: Tensor, earlier: Tensor) -> Tensor:
        return self.block(self.project(torch.cat([x, earlier], -1)))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("rejoined, of_the_stream", [(1, 3), (2, 3), (3, 0)])
def test_the_stream_before_blocks_that_project_it(rejoined: int, of_the_stream: int) -> None:
    """It is one if more than half of all blocks are on it."""

    def run(self: Any, x: Tensor) -> Tensor:
        left = []
        for block in self.blocks[:3]:
            x = block(x)
            left.append(x)
        for block in self.blocks[3:]:
            x = block(x, left.pop())
        return x

    blocks = nn.ModuleList([*pairs(Block), *pairs(Rejoined, rejoined)])
    graph = graph_of(Of(run, blocks=blocks), x=image_tokens(WIDTH))
    assert paths(find_stream(graph)) == named("blocks", of_the_stream)


class Doubles(nn.Module):
    """Blocks of two streams, then blocks of both as one, then the image is taken out again."""

    def __init__(self, *, text_first: bool, split: bool) -> None:
        super().__init__()
        self.doubles = nn.ModuleList(Joint(text_first=text_first) for _ in range(2))
        self.singles = pairs(Block, 2)
        self.text_first, self.split = text_first, split

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor]:
        length = text.shape[1]
        for block in self.doubles:
            image, text = block(image, text)
        x = torch.cat([text, image] if self.text_first else [image, text], dim=1)
        for block in self.singles:
            x = block(x)
        if self.split:
            lengths = [length, image.shape[1]][:: 1 if self.text_first else -1]
            return (x.split(lengths, dim=1)[int(self.text_first)],)
        return (x[:, length:] if self.text_first else x[:, : image.shape[1]],)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("image, text", [(IMAGE, TEXT), (TEXT, TEXT), (TEXT, IMAGE)])
def test_streams_that_are_joined_on_the_way(text_first: bool, split: bool, image: int, text: int) -> None:
    """The image is followed, which the output is made of, be it longer than the text, as long, or shorter."""
    model = Doubles(text_first=text_first, split=split)
    of = capture(
        randomise(model),
        {"image": image_tokens(WIDTH)[:, :image], "text": text_tokens(WIDTH).repeat(1, 2, 1)[:, :text]},
    )
    gm = in_aten(of)
    stream = find_stream(gm.graph)
    assert paths(stream) == named("doubles", 2) + named("singles", 2)
    assert stream is not None
    assert [shape_of(node)[1] for node in stream.exits] == [image, image, image + text, image + text]
    (start,) = values_of(gm, of.arguments, stream.entries[:1])
    assert torch.equal(start, of.inputs["image"])


class Pair(nn.Module):
    """Blocks of two streams; the output is made of one of them."""

    def __init__(self, *, image_out: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Joint() for _ in range(3))
        self.image_out = image_out

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor]:
        for block in self.blocks:
            image, text = block(image, text)
        return (image if self.image_out else text,)


@pytest.mark.parametrize("image_out", [True, False])
def test_of_two_streams_of_one_length_that_which_reaches_the_output(image_out: bool) -> None:
    """Shapes tell them apart no more."""
    inputs = {"image": image_tokens(WIDTH), "text": image_tokens(WIDTH, seed=5)}
    of = capture(randomise(Pair(image_out=image_out)), inputs)
    gm = in_aten(of)
    stream = find_stream(gm.graph)
    assert paths(stream) == named("blocks", 3)
    assert stream is not None
    (start,) = values_of(gm, of.arguments, stream.entries[:1])
    assert torch.equal(start, inputs["image" if image_out else "text"])


def test_refiners_beside_the_stream_are_outside() -> None:
    """More of them than there are blocks, and on longer text."""

    def run(self: Any, image: Tensor, text: Tensor) -> Tensor:
        for refiner in self.refiners:
            text = refiner(text)
        for block in self.blocks:
            image, _ = block(image, text)
        return image

    model = Of(run, refiners=pairs(Block, 3), blocks=nn.ModuleList(Joint() for _ in range(2)))
    graph = graph_of(model, image=text_tokens(WIDTH), text=image_tokens(WIDTH))
    assert {block.path for block in find_blocks(graph)} == {*named("refiners", 3), *named("blocks", 2)}
    assert paths(find_stream(graph)) == named("blocks", 2)


def test_an_encoder_whose_text_is_masked_before_the_blocks_read_it_is_outside() -> None:
    """So it leaves its list as the stream does, and has more blocks, but fewer tokens."""

    def run(self: Any, image: Tensor, text: Tensor) -> Tensor:
        for layer in self.encoder:
            text = layer(text)
        text = text * 2
        for block in self.blocks:
            image, _ = block(image, text)
        return image

    model = Of(run, encoder=pairs(Block, 3), blocks=nn.ModuleList(Joint() for _ in range(2)))
    assert paths(find_stream(graph_of(model, image=image_tokens(WIDTH), text=text_tokens(WIDTH)))) == named("blocks", 2)


class InParts(nn.Module):
    """Adds to all of its stream, then to what follows a few tokens only; joins the two again, in order or not."""

    def __init__(self, *, split: bool, swapped: bool) -> None:
        super().__init__()
        self.all, self.rest = Block(), Unlike()
        self.split, self.swapped = split, swapped

    def forward(self, x: Tensor) -> Tensor:
        x = self.all(x)
        first, rest = x.split([TEXT, IMAGE - TEXT], dim=1) if self.split else (x[:, :TEXT], x[:, TEXT:])
        parts = [first, rest + self.rest(rest)]
        return torch.cat(parts[::-1] if self.swapped else parts, dim=1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("swapped", [True, False])
def test_a_stream_that_each_block_takes_apart(split: bool, swapped: bool) -> None:
    """It is one as long as its parts are joined in their order."""
    layers = nn.ModuleList(InParts(split=split, swapped=swapped) for _ in range(3))
    graph = graph_of(Of(chain, layers=layers), x=image_tokens(WIDTH))
    assert paths(find_stream(graph)) == ([] if swapped else named("layers", 3))
    if not swapped:
        stream = find_stream(graph)
        assert stream is not None
        assert residual_source(stream.exits[-1], lambda node: node is not stream.entries[0]) is stream.entries[0]


def test_a_stream_that_is_a_part_of_what_was_written_to() -> None:
    """A functional graph takes the part anew where it is first read: in the first block."""

    def run(self: Any, image: Tensor, text: Tensor) -> Tensor:
        joined = image.new_zeros(BATCH, TEXT + IMAGE, WIDTH)
        joined[:, torch.arange(TEXT)] = text
        joined[:, torch.arange(TEXT, TEXT + IMAGE)] = image
        text, image = joined[:, :TEXT], joined[:, TEXT:]
        for block in self.blocks:
            image, text = block(image, text)
        return image

    model = Of(run, blocks=nn.ModuleList(Joint() for _ in range(3)))
    of = capture(randomise(model), {"image": image_tokens(WIDTH), "text": text_tokens(WIDTH)})
    gm = in_aten(of)
    stream = find_stream(gm.graph)
    assert paths(stream) == named("blocks", 3)
    assert stream is not None
    assert stream.entries[0] in stream.blocks[0].nodes
    (start,) = values_of(gm, of.arguments, stream.entries[:1])
    assert torch.equal(start, of.inputs["image"])
