"""What of a graph may be skipped: its parts, the streams that enter and leave them, and what cannot be taken out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from by_hand import ByHand
from cached import ALWAYS, NEVER, CachedGraphs, cached
from capture import Captured, assert_equal, capture, captured
from families import Inputs
from pieces import framepack
from quick import quick
from random_tensors import draw, randomise
from small_models import BATCH, IMAGE, WIDTH, Block, Denoiser, SelfAttention, count, heads, image_tokens, merge
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from paracompile.cache_options import CacheOptions
from paracompile.errors import GraphError, OptionError, module_paths
from paracompile.mesh import Ranks
from paracompile.passes import Found, pipeline, run_passes
from paracompile.passes.mark_blocks import Skipped, mark_blocks, part_of, roles_of

ROUNDING = 1e-5


def inputs_of(number: int, **more: Tensor) -> Inputs:
    time = torch.full((BATCH,), 0.9 - 0.1 * number)
    noise = number * 0.1 * image_tokens(seed=100 + number)
    return {"hidden_states": image_tokens() + noise, "timestep": time, **more}


def of_model(model: nn.Module, **more: Tensor) -> Captured:
    return capture(randomise(model), inputs_of(0, **more))


def marked(of: Captured, **kept: int) -> tuple[fx.Graph, list[Skipped]]:
    """The graph after `mark_blocks`, and what was found."""
    found = Found()
    gm = run_passes(of.gm, of.example_inputs, pipeline(Ranks.simulated())[:3])
    graph = mark_blocks(gm, of.example_inputs, found=found, **kept).graph
    return graph, [] if found.skipped is None else [found.skipped]


def block_of(node: fx.Node) -> int | None:
    return next((int(path.split(".")[1]) for path in module_paths(node) if path.startswith("blocks.")), None)


def with_role(graph: fx.Graph, role: str) -> fx.Node:
    (node,) = (node for node in graph.nodes if role in roles_of(node))
    return node


@cache
def denoiser() -> Captured:
    return of_model(Denoiser(5))


# Parts and roles


@pytest.mark.parametrize("first, last", [(1, 0), (1, 1), (2, 0), (2, 2), (4, 0), (1, 3)])
def test_parts(first: int, last: int) -> None:
    graph, (skipped,) = marked(denoiser(), first_blocks=first, last_blocks=last)
    for node in graph.nodes:
        index = block_of(node)
        if node.op == "call_function" and index is not None:
            assert part_of(node) == ("front" if index < first else "middle" if index < 5 - last else "back")
    assert skipped.blocks == tuple(f"blocks.{index}" for index in range(5))
    assert skipped.middle == skipped.blocks[first : 5 - last]
    linears = {module_paths(node)[-1]: node for node in graph.nodes if node.target is torch.ops.aten.linear.default}
    assert part_of(linears["proj_in"]) == "front"
    assert part_of(linears["proj_out"]) == "back"


@pytest.mark.parametrize("first, last", [(1, 0), (2, 1)])
def test_roles(first: int, last: int) -> None:
    """The residual is taken from where the stream enters the first block; the middle's from where it ends."""
    graph, _ = marked(denoiser(), first_blocks=first, last_blocks=last)
    before, after, enter, leave = (with_role(graph, role) for role in ("before", "after", "enter 0", "leave 0"))
    assert (block_of(before), block_of(after)) == (None, first - 1)
    assert before.target is torch.ops.aten.mul.Tensor  # with the time, after the projection
    assert enter is after
    assert block_of(leave) == 4 - last
    assert {block_of(user) for user in leave.users} == {5 - last if last else None}
    assert sum(len(roles_of(node)) for node in graph.nodes) == 4


def test_the_sample_and_the_times() -> None:
    graph, (skipped,) = marked(denoiser())
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    assert skipped.sample is not None
    assert "hidden_states" in names[skipped.sample]
    assert ["timestep" in names[place] for place in skipped.times] == [True]


@pytest.mark.parametrize(
    "family, times",
    quick([("flux", 2), ("hunyuan_video", 2), ("wan", 1), ("ltx_video", 1)], ("flux", 2), ("wan", 1)),
)
def test_the_sample_and_the_times_of_families(family: str, times: int) -> None:
    """Timestep, and guidance where there is one; never the text, which may be longer than the image."""
    of = captured(family)
    graph, (skipped,) = marked(of)
    assert skipped.sample is not None
    assert of.arguments[skipped.sample] is of.inputs["hidden_states"]
    names = [graph.find_nodes(op="placeholder")[place].name for place in skipped.times]
    assert len(names) == times
    assert all("timestep" in name or "guidance" in name for name in names)


def test_nothing_is_marked_without_blocks() -> None:
    of = of_model(Denoiser(1))
    graph, found = marked(of)
    assert found == []
    assert not any("cache_part" in node.meta or "cache_roles" in node.meta for node in graph.nodes)


@pytest.mark.parametrize(
    "kept, key, rest",
    [
        ({"first_blocks": 5}, "first_blocks", "with 5 computed at the front and 0 at the end"),
        ({"first_blocks": 9, "last_blocks": 2}, "first_blocks", "with 9 computed at the front and 2 at the end"),
        ({"last_blocks": 4}, "last_blocks", "with 1 computed at the front and 4 at the end"),
        ({"first_blocks": 3, "last_blocks": 2}, "last_blocks", "with 3 computed at the front and 2 at the end"),
    ],
)
def test_blocks_that_are_kept_must_leave_one_to_skip(kept: dict[str, int], key: str, rest: str) -> None:
    with pytest.raises(OptionError) as caught:
        marked(denoiser(), **kept)
    assert str(caught.value) == (
        f"paracompile option {key!r} = {kept[key]}: the model has 5 blocks, blocks.0 to blocks.4: {rest}, none is left "
        "to skip"
    )


# Code between blocks


class Steered(Denoiser):
    """Something from outside is added to the stream after each block, as a ControlNet does."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, steer: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x = self.proj_in(hidden_states) * (1 + timestep.reshape(-1, 1, 1))
        for block in self.blocks:
            x = block(x) + steer
        return (self.proj_out(x),)


@pytest.mark.parametrize("ranks", [1, 2])
def test_code_between_blocks(ranks: int) -> None:
    """Between skipped blocks it is skipped as well; behind the last of them it is not."""
    steer = draw(BATCH, IMAGE, WIDTH, seed=8)
    of = of_model(Steered(4), steer=steer)
    graph, _ = marked(of)
    (added,) = (node for node in graph.find_nodes(op="placeholder") if "steer" in node.name)
    assert [part_of(user) for user in added.users] == ["front", "middle", "middle", "back"]
    steps = [inputs_of(number, steer=steer) for number in range(2)]
    graphs = cached(of, {"ulysses": ranks} if ranks > 1 else None)
    computed, skipped = graphs.run(steps, ALWAYS)
    with torch.no_grad():
        assert_equal(computed.output, of.model(**steps[0])[0])
    model = ByHand(of)
    close(skipped.output, model.skipped(steps[1], model.computed(steps[0]).added))


def close(found: Tensor, expected: Tensor) -> None:
    assert float((found.double() - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


# Values of the middle that the back reads


class Telling(Block):
    """Tells besides how large its tokens are, which is no stream."""

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x = super().forward(x)
        return x, x.square().mean(dim=-1, keepdim=True)


class ToldSizes(Denoiser):
    """The output is divided by what the block before the last told."""

    def __init__(self, kind: Callable[[], nn.Module] = Telling) -> None:
        super().__init__(4, block=kind)

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        time = timestep.reshape(-1, 1, 1)
        x, told = self.proj_in(hidden_states) * (1 + time), []
        for block in self.blocks:
            x, size = block(x, time)
            told.append(size)
        return (self.proj_out(x) / told[2],)


class TellingOfTime(Block):
    """Tells besides what it made of the time, which no token has a part in."""

    def __init__(self) -> None:
        super().__init__()
        self.of_time = nn.Linear(1, 10)

    def forward(self, x: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), self.of_time(time)


def both(of: Captured, ranks: int) -> tuple[CachedGraphs, Tensor, Tensor, Tensor, Tensor]:
    """A skipped step after a computed one; both streams in float64, and what was told in each."""
    graphs = cached(of, {"ulysses": ranks} if ranks > 1 else None)
    inputs = [inputs_of(0), inputs_of(1)]
    computed, skipped = graphs.run(inputs, ALWAYS)
    assert (computed.hit, skipped.hit) == (False, True)
    with torch.no_grad():
        assert_equal(computed.output, of.model(**inputs[0])[0])
    model = of.model.double()
    told: list[Tensor] = []
    front: list[Tensor] = []
    ends: list[Tensor] = []
    hooks = [
        model.blocks[0].register_forward_hook(lambda module, args, result: front.append(result[0])),
        model.blocks[2].register_forward_hook(lambda module, args, result: told.append(result[1])),
        model.blocks[3].register_forward_hook(lambda module, args, result: ends.append(result[0])),
    ]
    with torch.no_grad():
        for each in inputs:
            model(**{name: value.double() for name, value in each.items()})
        stream = model.proj_out(front[1] + ends[0] - front[0])
    for hook in hooks:
        hook.remove()
    of.model.float()
    return graphs, skipped.output, stream, told[0], told[1]


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_is_no_stream_is_stored_as_it_is(ranks: int) -> None:
    graphs, found, stream, before, now = both(of_model(ToldSizes()), ranks)
    for layout in graphs.layouts:
        tokens = IMAGE // ranks
        assert sorted(tuple(value.shape)[1:] for value in layout.state) == [(tokens, 1), *[(tokens, WIDTH)] * 2]
    close(found, stream / before)
    assert float((stream / before - stream / now).abs().max()) > 100 * ROUNDING * float((stream / before).abs().max())


@pytest.mark.parametrize("ranks", [1, 2])
def test_what_depends_on_no_token_is_computed_at_each_step(ranks: int) -> None:
    """It is written in a block that is skipped, and moved out of it."""
    graphs, found, stream, before, now = both(of_model(ToldSizes(TellingOfTime)), ranks)
    assert [len(layout.state) for layout in graphs.layouts] == [2] * ranks
    close(found, stream / now)
    assert float((stream / before - stream / now).abs().max()) > 100 * ROUNDING * float((stream / before).abs().max())


def test_two_streams_that_the_back_reads_are_stored_both() -> None:
    """The last block's exit, and that of an earlier one, which a long skip connection brings to the end."""

    class LongSkip(Denoiser):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:  # type: ignore[override]
            x, exits = self.proj_in(hidden_states) * (1 + timestep.reshape(-1, 1, 1)), []
            for block in self.blocks:
                x = block(x)
                exits.append(x)
            return (self.proj_out(x) * exits[1].mean(dim=-1, keepdim=True),)

    of = of_model(LongSkip(4))
    graphs = cached(of)
    assert [tuple(value.shape) for value in graphs.layouts[0].state] == [(BATCH, IMAGE, WIDTH)] * 3
    steps = [inputs_of(0), inputs_of(1)]
    skipped = graphs.run(steps, ALWAYS)[1]
    model = of.model.double()
    exits: list[list[Tensor]] = []
    with torch.no_grad():
        for each in steps:
            x = model.proj_in(each["hidden_states"].double()) * (1 + each["timestep"].double().reshape(-1, 1, 1))
            exits.append([x := block(x) for block in model.blocks])
        front = exits[1][0]
        one, end = (front + exits[0][index] - exits[0][0] for index in (1, 3))
        expected = model.proj_out(end) * one.mean(dim=-1, keepdim=True)
    close(skipped.output, expected)


# Autocast


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


class Around(Denoiser):
    """Autocast around some of the blocks: those from `start` to before `end`."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__(4)
        self.start, self.end = start, end

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        x = self.proj_in(hidden_states) * (1 + timestep.reshape(-1, 1, 1))
        for block in self.blocks[: self.start]:
            x = block(x)
        with autocast():
            for block in self.blocks[self.start : self.end]:
                x = block(x)
        for block in self.blocks[self.end :]:
            x = block(x)
        return (self.proj_out(x),)


class Within(Block):
    def forward(self, x: Tensor) -> Tensor:
        with autocast():
            return super().forward(x)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("start, end", [(0, 4), (1, 4)])
@pytest.mark.parametrize("ranks", [1, 2])
def test_autocast_around_all_that_may_be_skipped(start: int, end: int, ranks: int) -> None:
    check_formula(Around(start, end), ranks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_autocast_regions_within_blocks(ranks: int) -> None:
    check_formula(Denoiser(4, block=Within), ranks)


def check_formula(model: nn.Module, ranks: int) -> None:
    """Computed steps equal the model, and a skipped one what the last computed step says."""
    of = of_model(model)
    graphs = cached(of, {"ulysses": ranks} if ranks > 1 else None)
    computed, skipped, again = (
        (generation := graphs.begin()).step(inputs_of(0), ALWAYS),
        generation.step(inputs_of(1), ALWAYS),
        generation.step(inputs_of(2), NEVER),
    )
    assert [computed.hit, skipped.hit, again.hit] == [False, True, False]
    with torch.no_grad():
        exact = [of.model(**inputs_of(number))[0] for number in range(3)]
    exit_of_front: list[Tensor] = []
    end: list[Tensor] = []
    hooks = [
        of.model.blocks[0].register_forward_hook(lambda module, args, result: exit_of_front.append(result)),
        of.model.blocks[-1].register_forward_hook(lambda module, args, result: end.append(result)),
    ]
    with torch.no_grad():
        for number in range(2):
            of.model(**inputs_of(number))
        formula = of.model.proj_out((exit_of_front[1] + (end[0] - exit_of_front[0])).float())
    for hook in hooks:
        hook.remove()
    for found, expected in ((computed.output, exact[0]), (skipped.output, formula), (again.output, exact[2])):
        assert found.dtype == expected.dtype
        # Two ranks round to bfloat16 at other places than one.
        assert float((found - expected).abs().max()) <= 2e-2 * float(expected.abs().max())
        if ranks == 1:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((formula - exact[1]).abs().max()) > 2e-2 * float(exact[1].abs().max())


@pytest.mark.parametrize("start, end", [(0, 2), (2, 4), (1, 3)])
def test_an_autocast_region_that_ends_between_skipped_blocks_is_refused(start: int, end: int) -> None:
    of = of_model(Around(start, end))
    with pytest.raises(GraphError) as caught:
        cached(of)
    assert "an autocast region begins or ends between blocks that may be skipped together" in str(caught.value)
    assert "remedy: put the model's blocks under one autocast region, or leave out rdt" in str(caught.value)


# Attention that is no operator


class Flex(SelfAttention):
    """Attention whose bias, or whose mask, is a function of positions."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.bias = how, nn.Parameter(torch.ones(IMAGE, IMAGE))

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        q, k, v = (heads(to(x), 4) for to in (self.to_q, self.to_k, self.to_v))
        if self.how == "bias":
            attended = flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + self.bias[i, j])
        else:
            seen = x.mean(dim=-1) > -1
            mask = create_block_mask(lambda b, h, i, j: (i >= j) & seen[b, j], BATCH, None, IMAGE, IMAGE, device="cpu")
            attended = flex_attention(q, k, v, block_mask=mask)
        assert isinstance(attended, Tensor)
        return self.to_out(merge(attended))


@pytest.mark.slow
@pytest.mark.parametrize("how", quick(["bias", "mask"], "bias"))
def test_flex_attention(how: str) -> None:
    model = Denoiser(4)
    for block in model.blocks:
        block.attention = Flex(how)
    check_formula(model, 1)


# The passes


def test_marking_comes_before_the_cut_and_skipping_after_it() -> None:
    ranks = Ranks.simulated(batch=2, ulysses=2)
    names = [step.name for step in pipeline(ranks, cache=CacheOptions(rdt=1.0))]
    assert names == [
        *("normalise", "fuse_attention", "static_lengths", "mark_blocks"),
        *("compose_padding", "plan_layouts", "split_and_gather", "unified_attention", "lower"),
        *("drop_masked_keys", "choose_kernels", "first_block_cache", "schedule", "dispatch_on_subclasses"),
    ]
    assert count(cached(denoiser()).graphs[0])["cond"] == 1


class CutAtLength(Denoiser):
    """Of as many tokens as a mask shows."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, mask: Tensor) -> tuple[Tensor]:
        length = mask.sum().item()
        torch._check(length > 1)
        torch._check(length <= IMAGE)
        output: tuple[Tensor] = super().forward(hidden_states[:, :length], timestep)
        return output


def test_blocks_of_as_many_tokens_as_only_the_data_tells_are_refused() -> None:
    options = {"rdt": 0.1, "compiler": "eager"}
    model = torch.compile(randomise(CutAtLength()), backend="paracompile", fullgraph=True, options=options)
    with pytest.raises(BackendCompilerFailed) as error, torch.no_grad():
        model(**inputs_of(0, mask=torch.arange(IMAGE) < 20))
    message = str(error.value)
    assert "only the data tells its size" in message
    assert "leave out fullgraph=True" in message
    assert "blocks.0" in message


class Refilled(Denoiser):
    """Of all tokens: zeros take the place of those that a mask hides."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, mask: Tensor) -> tuple[Tensor]:
        length = mask.sum().item()
        torch._check(length > 1)
        torch._check(length <= IMAGE)
        x = F.pad(self.proj_in(hidden_states)[:, :length], (0, 0, 0, IMAGE - length))
        for block in self.blocks:
            x = block(x)
        return (self.proj_out(x) * timestep.reshape(-1, 1, 1),)


def test_what_a_pass_must_know_of_the_data_is_told() -> None:
    options = {"rdt": 0.1, "compiler": "eager"}
    model = torch.compile(randomise(Refilled()), backend="paracompile", fullgraph=True, options=options)
    with pytest.raises(BackendCompilerFailed) as error, torch.no_grad():
        model(**inputs_of(0, mask=torch.arange(IMAGE) < 20))
    assert isinstance(error.value.inner_exception, GraphError)
    assert "which only the data tells" in str(error.value)
    assert "leave out fullgraph=True" in str(error.value)


@pytest.mark.slow
def test_a_prompt_that_a_model_cuts_at_its_length_is_refused() -> None:
    """Which is read from its mask."""
    model, inputs = framepack(batch=1)
    compiled = torch.compile(model, backend="paracompile", fullgraph=True, options={"rdt": 0.1, "compiler": "eager"})
    with pytest.raises(BackendCompilerFailed) as error, torch.no_grad():
        compiled(**inputs)
    torch._dynamo.reset()
    message = str(error.value)
    assert "only the data tells its size" in message
    assert "leave out fullgraph=True" in message
    assert "transformer_blocks.0" in message
