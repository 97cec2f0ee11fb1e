"""Regions along blocks: where graphs are cut, which are equal, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
import logging
import operator
import re
import sys
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from all_ranks import of_all_ranks
from cached import ALWAYS, cached, step
from capture import Captured, capture, captured
from families import ALL_FAMILIES, Inputs
from lockstep import run_lockstep
from quick import quick
from random_tensors import draw, randomise
from small_models import BATCH, IMAGE, WIDTH, Block, Denoiser, Transformer, image_tokens
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.utils import fresh_cache

from paracompile import backend
from paracompile.cache_options import CacheOptions
from paracompile.compiler import _boxed, compile_whole
from paracompile.options import Options
from paracompile.passes.first_block_cache import COND
from paracompile.passes.regions import cut_into_regions, examples_of, regions_of
from paracompile.patterns.exchanges import is_collective, is_wait
from paracompile.patterns.regions import Body, look_of
from paracompile.runtime.program import Program

aten = torch.ops.aten


def graphs(of: Captured, mesh: dict[str, int], *, cut: bool | None, cache: bool = False) -> list[fx.GraphModule]:
    """The graph of each rank, cut along blocks (True), at conditionals (False), or not (None)."""
    cache_passes = CacheOptions(rdt=1.0) if cache else None
    return of_all_ranks(of.gm, of.example_inputs, mesh, cache=cache_passes, regions=cut).graphs


def flat(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes that compute, in the order in which they run; of conditionals the computing branch."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            yield from flat(gm.get_submodule(node.target))
        elif node.target is COND:
            yield from flat(gm.get_submodule(node.args[2].target))
        elif node.op == "call_function" and node.target is not operator.getitem:
            yield node


def calls(gm: fx.GraphModule) -> list[str]:
    """The regions that a graph calls, in order; of a conditional both branches in brackets."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module":
            found.append(node.target)
        elif node.target is COND:
            branches = [" ".join(calls(gm.get_submodule(branch.target))) for branch in node.args[1:3]]
            found.append("[{} | {}]".format(*branches))
    return found


def as_eager(gm: fx.GraphModule) -> Program:
    """What runs the regions, each of them interpreted."""
    return Program(gm, {region: _boxed(region.forward) for region in regions_of(gm)})


# Nothing changes


@pytest.mark.parametrize(
    "family, mesh",
    quick(
        [
            *((family, {"ulysses": ranks}) for family in ALL_FAMILIES for ranks in (1, 2)),
            *(
                (family, mesh)
                for family in ("flux", "hunyuan_video")
                for mesh in ({"ring": 2}, {"ring": 2, "ulysses": 2})
            ),
        ],
        ("wan", {"ulysses": 1}),
        ("mochi", {"ulysses": 2}),
    ),
    ids=str,
)
def test_the_same_work_in_regions(family: str, mesh: dict[str, int]) -> None:
    """Bit for bit the graph that was not cut, the same exchanges in the same order, and no wait comes earlier."""
    of = captured(family)
    whole, cut = graphs(of, mesh, cut=None), graphs(of, mesh, cut=True)
    with torch.no_grad():
        expected, found = (run_lockstep(each, [of.arguments] * len(each), mesh) for each in (whole, cut))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours[0], theirs[0])
    for ours, theirs in zip(cut, whole, strict=True):
        assert exchanges(flat(ours)) == exchanges(flat(theirs))
        # Once a step what is embedded comes before the first block, though it could run under its last exchange.
        assert hidden(flat(ours))[4:] == hidden(flat(theirs))[4:]
        for region in regions_of(ours):
            nodes = list(region.graph.nodes)
            for node in filter(is_collective, nodes):
                assert all(is_wait(user) for user in node.users), "an exchange is awaited in another region"
    (first, *_) = cut
    added = Counter(str(node.target) for node in flat(first))
    added.subtract(str(node.target) for node in flat(whole[0]))
    # What joins one part only is written as the copy that it is, and what leaves a region is in the layout of an edge.
    assert added.pop("aten._to_copy.default", 0) == -added.pop("aten.cat.default", 0)
    assert {target for target, count in added.items() if count} <= {"aten.clone.default"}


def exchanges(nodes: Iterator[fx.Node]) -> list[tuple[str, Any]]:
    return [(str(node.target), tuple(node.meta["val"].shape)) for node in nodes if is_collective(node)]


def hidden(nodes: Iterator[fx.Node]) -> list[int]:
    """For each wait, how many products run since its exchange was started: what it is hidden under."""
    heavy = {aten.linear.default, aten.scaled_dot_product_attention.default}
    products = 0
    started: dict[fx.Node, int] = {}
    under = []
    for node in nodes:
        products += node.target in heavy
        if is_collective(node):
            started[node] = products
        elif is_wait(node):
            under.append(products - started[node.all_input_nodes[0]])
    return under


@pytest.mark.parametrize("family, ranks", quick(product(ALL_FAMILIES, (1, 2)), ("wan", 1), ("flux", 2)))
def test_steps_with_a_cache_in_regions(family: str, ranks: int) -> None:
    """Computed and skipped steps, bit for bit."""
    of, mesh = captured(family), {"ulysses": ranks}
    steps = [step(of, number) for number in range(3)]
    whole = cached(of, mesh)
    cut = cached(of, mesh)
    for gm in cut.graphs:
        cut_into_regions(gm, of.example_inputs)
    for ours, theirs in zip(cut.run(steps, ALWAYS), whole.run(steps, ALWAYS), strict=True):
        assert ours.hit == theirs.hit
        assert torch.equal(ours.output, theirs.output)
        assert all(map(torch.equal, ours.state[0], theirs.state[0]))
    for gm in cut.graphs:  # what a GPU runs as one graph of its own must not wait for the host
        assert not any(node.target is COND for region in regions_of(gm) for node in region.graph.nodes)


# Where it is cut, and what is equal


def deep(family: str, **blocks: int) -> Captured:
    """A family's model with so many blocks in each list, at batch 1."""
    model, inputs = ALL_FAMILIES[family].build(batch=1)
    for name, count in blocks.items():
        blocks_of = getattr(model, name)
        for number in range(count - len(blocks_of)):
            blocks_of.insert(1, randomise(copy.deepcopy(blocks_of[0]), seed=number))
    return capture(model, inputs)


@pytest.mark.slow
def test_equal_blocks_of_flux_are_one_region() -> None:
    of = deep("flux", transformer_blocks=4, single_transformer_blocks=5)
    (gm,) = graphs(of, {"ulysses": 1}, cut=True)
    assert calls(gm) == [
        "region",
        *["transformer_blocks_0"] * 4,
        *["single_transformer_blocks_0"] * 4,
        "single_transformer_blocks_4",  # its text is read by nobody; what follows it is with it
    ]
    (armed,) = graphs(of, {"ulysses": 1}, cut=True, cache=True)
    middle = ["transformer_blocks_1"] * 3 + ["single_transformer_blocks_0"] * 4 + ["single_transformer_blocks_4"]
    front, first, conditional, end = calls(armed)
    assert (front, first, end) == ("region", "transformer_blocks_0", "region_3")
    assert conditional == f"[region_2 | transformer_blocks_0_2 {' '.join(middle)}]"


@pytest.mark.slow
def test_on_two_ranks_work_under_an_exchange_stays_there() -> None:
    """The next block's modulation runs under a block's last exchange, so it belongs to that block's region."""
    of = deep("flux", transformer_blocks=4, single_transformer_blocks=5)
    for gm in graphs(of, {"ulysses": 2}, cut=True):
        before, *doubles = calls(gm)[:5]
        assert doubles[:3] == [doubles[0]] * 3
        assert doubles[3] != doubles[0]  # the next is of another kind
        assert before not in doubles
        assert len(regions_of(gm)) == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, lists",
    quick([("wan", {"blocks": 5}), ("hunyuan_video", {"transformer_blocks": 5})], ("wan", {"blocks": 5})),
)
def test_equal_blocks_of_other_families(family: str, lists: dict[str, int]) -> None:
    of = deep(family, **lists)
    (count,) = lists.values()
    for mesh in ({"ulysses": 1}, {"ulysses": 2}):
        gm = graphs(of, mesh, cut=True)[0]
        assert max(regions_of(gm).values()) >= count - 2, calls(gm)  # the first and the last may differ


@pytest.mark.slow
def test_a_stream_is_contiguous_at_the_edges_whatever_it_was_patched_from() -> None:
    """HunyuanVideo's patches come out of a convolution with the channels first; eager blocks would keep that layout."""
    of = deep("hunyuan_video", transformer_blocks=4)
    (gm,) = graphs(of, {"ulysses": 1}, cut=True)
    first, later = (
        [value for value in examples_of(gm.get_submodule(name)) if value.dim() == 3 and value.shape[1] == 72]
        for name in ("transformer_blocks_0", "transformer_blocks_1")
    )
    assert [value.is_contiguous() for value in first] == [False]  # a view of what was convolved: nothing is copied
    assert [value.is_contiguous() for value in later] == [True]


@pytest.mark.full
def test_what_all_blocks_read_comes_before_the_first() -> None:
    """Which keys a mask hides is found once, where the first block asks for it."""
    for ranks in (1, 2):
        gm = graphs(deep("qwen_image", transformer_blocks=4), {"ulysses": ranks}, cut=True)[0]
        (finder,) = [region for region in regions_of(gm) if "visible_keys" in str(region.graph)]
        assert not any("attention_to_visible" in str(node.target) for node in flat(finder))


def test_no_cut_but_at_conditionals() -> None:
    of = captured("flux")
    (whole,) = graphs(of, {"ulysses": 1}, cut=False)
    assert len(calls(whole)) == 1
    (armed,) = graphs(of, {"ulysses": 1}, cut=False, cache=True)
    assert [call.count(" ") for call in calls(armed)] == [0, 2, 0]  # before, one in each branch, after


def test_a_graph_without_blocks_is_one_region() -> None:
    of = capture(randomise(nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6))), {"input": draw(1, 2, 6)})
    (gm,) = graphs(of, {"ulysses": 1}, cut=True)
    assert len(calls(gm)) == 1


def body(*calls: tuple[Any, ...], x: Tensor | None = None, keep: int = 1, **how: Any) -> Body:
    """A region that applies operators to its input, one after the other; its last `keep` results are read outside."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = x if x is not None else draw(3, 4)
    nodes = []
    for target, *args in calls:
        node = graph.call_function(target, (node, *args), how)
        nodes.append(node)
    graph.output(tuple(nodes[-keep:]))
    return Body(tuple(nodes), None)


def signature(body: Body) -> object:
    return body.signature(lambda node: look_of(node.meta["val"]))


ADD = (aten.add.Tensor, 1)
PLAIN = body(ADD)


@pytest.mark.parametrize(
    "other",
    [
        body((aten.add.Tensor, 1.0)),
        body((aten.add.Tensor, True)),
        body((aten.add.Tensor, 2)),
        body((aten.sub.Tensor, 1)),
        body(ADD, alpha=2),
        body(ADD, x=draw(4, 3).t()),
        body(ADD, x=draw(3, 4).double()),
        body(ADD, x=draw(3, 5)),
        body(ADD, x=draw(13)[1:].reshape(3, 4)),
        body((aten.add_.Tensor, 1)),
    ],
)
def test_regions_that_differ(other: Body) -> None:
    assert signature(other) != signature(PLAIN)


def test_regions_that_are_equal() -> None:
    assert signature(body(ADD)) == signature(PLAIN)
    assert signature(body(ADD, ADD, keep=1)) != signature(body(ADD, ADD, keep=2))
    sizes = (1, 3, 4)
    loose, tight = draw(2, 3, 4)[:1], torch.empty_strided(sizes, (99, 4, 1))
    assert signature(body(ADD, x=loose)) == signature(body(ADD, x=tight))  # no code reads the stride of a length of 1


def test_a_region_that_writes_equals_no_other() -> None:
    """What it writes to may share its memory with what it reads in one place and not in another."""
    assert signature(body((aten.add_.Tensor, 1))) != signature(body((aten.add_.Tensor, 1)))


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = self.blocks[0](x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for block in self.blocks[1:3]:
                x = block(x)
        return (self.blocks[3](x.float()),)


class Written(nn.Module):
    """A buffer is read as a view in the first block and written to after the last."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.register_buffer("seen", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        seen = self.seen.reshape(1, WIDTH)
        for block in self.blocks:
            x = block(x)
        self.seen.add_(x.detach().mean((0, 1)))
        return (x + seen,)


def test_no_cut_inside_an_autocast_region() -> None:
    of = capture(randomise(Autocast()), {"x": image_tokens(WIDTH)})
    (gm,) = graphs(of, {"ulysses": 1}, cut=True)
    with torch.no_grad():
        assert torch.equal(as_eager(gm)(*of.arguments)[0], of.expected)
    assert len(calls(gm)) < 5


def test_a_view_of_what_is_written_to_stays_with_the_writing() -> None:
    model = randomise(Written())
    of = capture(model, {"x": image_tokens(WIDTH)})
    (gm,) = graphs(of, {"ulysses": 1}, cut=True)
    (last,) = [
        region for region in regions_of(gm) if any(str(node.target) == "aten.copy_.default" for node in flat(region))
    ]
    assert any("reshape" in str(node.target) for node in flat(last))


@pytest.mark.slow
def test_a_written_buffer_under_inductor() -> None:
    plain = randomise(Written())
    ours = copy.deepcopy(plain)
    compiled = torch.compile(ours, backend="paracompile")
    with torch.no_grad():
        for number in range(3):
            x = image_tokens(WIDTH, seed=number)
            torch.testing.assert_close(compiled(x)[0], plain(x)[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.seen, plain.seen, rtol=1e-4, atol=1e-5)


# Running them


def test_a_value_is_gone_before_the_region_that_reads_it_last_returns() -> None:
    of = captured("flux")
    (gm,) = graphs(of, {"ulysses": 1}, cut=True)
    alive: list[weakref.ref[Tensor]] = []

    def run_of(region: fx.GraphModule) -> Any:
        def run(arguments: list[Any]) -> Sequence[Tensor]:
            given = list(arguments)
            arguments.clear()
            made = region(*given)
            del given
            left = [tuple(value.shape) for each in alive if (value := each()) is not None]
            assert not {(3, 48, 64), (3, 12, 64)} & set(left), "a stream outlives the block that reads it"
            alive.extend(map(weakref.ref, made))
            return made

        return run

    program = Program(gm, {region: run_of(region) for region in regions_of(gm)})
    with torch.no_grad():
        assert torch.equal(program(*of.arguments)[0], of.expected)
    del program
    gc.collect()
    assert len(alive) > 8
    assert sum(each() is not None for each in alive) == 0


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["inductor", "aot_eager"])
def test_a_compiled_region_lets_its_arguments_go(compiler: str) -> None:
    """That AOTAutograd's function is reached, which takes a list and empties it."""
    of = captured("flux", batch=1)
    gm = graphs(of, {"ulysses": 1}, cut=True)[0]
    region = next(region for region, count in regions_of(gm).items() if count == 1)
    with fresh_cache():
        runs = [_boxed(compile_whole(region, examples_of(region), Options(compiler=compiler), {})) for _ in range(2)]
    inputs = [of.arguments[place] for place in places(gm, region)]
    with torch.no_grad():
        for run in runs:  # the second comes from Inductor's cache on disk
            found = run(given := list(inputs))
            assert given == []
            torch.testing.assert_close(tuple(found), region(*inputs), rtol=1e-4, atol=1e-4)


def places(gm: fx.GraphModule, region: fx.GraphModule) -> list[int]:
    """Which of the graph's inputs the region is given that is called first."""
    inputs = gm.graph.find_nodes(op="placeholder")
    call = next(node for node in gm.graph.nodes if node.op == "call_module")
    assert gm.get_submodule(call.target) is region
    return [inputs.index(argument) for argument in call.args]


@pytest.mark.slow
def test_a_graph_that_the_passes_cannot_take_is_compiled_as_it_is_and_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: Any, **how: Any) -> Any:
        raise ValueError("no passes here")

    monkeypatch.setattr(backend, "run_passes", fail)
    model = randomise(Denoiser(4))
    compiled, compilations = one_rank(model)
    with torch.no_grad():
        with pytest.warns(UserWarning, match="compiled in one piece, for no passes here"):
            found = compiled(**steps_of(1)[0])[0]
        torch.testing.assert_close(found, model(**steps_of(1)[0])[0], rtol=1e-4, atol=1e-5)
    assert compilations == [None]
    armed = torch.compile(model, backend="paracompile", options={"rdt": 0.1, "compiler": "eager"})
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="no passes here"):
        armed(**steps_of(1)[0])


class Scaled(Denoiser):
    """A number of the caller's is no size."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, scale: int = 1) -> tuple[Tensor]:
        return (super().forward(hidden_states, timestep)[0] * scale,)


def one_rank(model: nn.Module, **how: Any) -> tuple[Any, list[Any]]:
    """The model compiled, and what is reported of each graph; None where it went to Inductor in one piece."""
    reports: list[Any] = []
    torch._dynamo.reset()
    options = {"report": lambda report: reports.append(report.compilation)}
    return torch.compile(model, backend="paracompile", options=options, **how), reports


@pytest.mark.slow
def test_a_graph_whose_gradients_are_wanted_is_compiled_as_it_is() -> None:
    model = randomise(Transformer(4)).requires_grad_()
    compiled, compilations = one_rank(model)
    compiled(image_tokens()).sum().backward()
    assert compilations == [None]
    assert model.proj_in.weight.grad is not None


@pytest.mark.slow
@pytest.mark.full
def test_sizes_on_one_rank() -> None:
    """Two compiles serve all sizes, one where open ones were asked for; all are in regions."""
    model = randomise(Denoiser(4))
    for dynamic, compiles in ((None, 2), (True, 1)):
        compiled, compilations = one_rank(model, dynamic=dynamic)
        for tokens in (24, 36, 48):
            given = {"hidden_states": draw(BATCH, tokens, 10), "timestep": torch.ones(BATCH)}
            with torch.no_grad():
                torch.testing.assert_close(compiled(**given)[0], model(**given)[0], rtol=1e-4, atol=1e-5)
        assert [compilation is not None for compilation in compilations] == [True] * compiles


def test_a_number_among_the_results_of_a_piece() -> None:
    """Dynamo makes a symbol of it as soon as a second one is met, and the passes a number again."""

    def lengthened(x: Tensor, extra: int) -> tuple[Tensor, int]:
        length = x.shape[1] + extra
        x = torch.cat([x, x.new_zeros(BATCH, length, x.shape[2])], 1)
        torch._dynamo.graph_break()
        return x.sum(1), length

    torch._dynamo.reset()
    compiled = torch.compile(lengthened, backend="paracompile", options={"compiler": "eager", "rdt": 0.1})
    with pytest.warns(UserWarning, match="only a piece"), torch.no_grad():
        lengths = [compiled(image_tokens(), extra)[1] for extra in (3, 5, 7)]
    assert lengths == [IMAGE + 3, IMAGE + 5, IMAGE + 7]


@pytest.mark.slow
def test_a_number_that_changes_at_each_step_is_compiled_twice_and_in_regions() -> None:
    """As a constant, and, when it is seen to change, as what may change."""
    model = randomise(Scaled(4))
    compiled, compilations = one_rank(model)
    for scale in (1, 2, 3, 4):
        with torch.no_grad():
            expected = model(**steps_of(1)[0], scale=scale)[0]
            torch.testing.assert_close(compiled(**steps_of(1)[0], scale=scale)[0], expected, rtol=1e-4, atol=1e-5)
    assert [compilation is not None for compilation in compilations] == [True, True]


def test_what_is_told_of_a_compile(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line in the log; a bar only where somebody looks at it."""
    told = r"compiled 9 regions, 6 different, 0 of these from the cache on disk, \d+\.\d s"
    for terminal in (False, True):
        monkeypatch.setattr(sys.stderr, "isatty", lambda shown=terminal: shown, raising=False)
        torch._dynamo.reset()
        compiled = torch.compile(
            randomise(Denoiser(4)), backend="paracompile", options={"compiler": "eager", "rdt": 0.1}
        )
        with torch.no_grad(), caplog.at_level(logging.INFO, "paracompile"):
            compiled(**steps_of(1)[0])
        assert ("compiling regions" in capsys.readouterr().err) == terminal
        assert re.fullmatch(told, caplog.messages[-1]), caplog.messages


def steps_of(count: int) -> list[Inputs]:
    return [
        {"hidden_states": image_tokens(seed=number), "timestep": torch.full((BATCH,), 1 - number / 10)}
        for number in range(count)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    quick([{}, {"regions": False}, {"rdt": 1e9}, {"rdt": 1e9, "regions": False}], {"rdt": 1e9}),
    ids=str,
)
def test_under_inductor(options: dict[str, Any]) -> None:
    """The same numbers in regions and in one piece."""
    model = randomise(Denoiser(4))
    reports: list[Any] = []
    ours = torch.compile(model, backend="paracompile", options={**options, "report": reports.append})
    eager = torch.compile(model, backend="paracompile", options={**options, "compiler": "eager"})
    for given in steps_of(3):
        with torch.no_grad():
            torch.testing.assert_close(ours(**given)[0], eager(**given)[0], rtol=1e-4, atol=1e-5)
    compilation = reports[0].compilation
    if options.get("regions", True):
        assert compilation.regions > compilation.different >= 3
    elif options:
        assert compilation is None or compilation.regions == (4 if "rdt" in options else 1)


JOINED: dict[str, Any] = {
    "stacked alone": lambda x: torch.stack([x[0]]).expand(BATCH, -1, -1).clone(),
    "nothing beside it": lambda x: torch.cat([x, x.new_zeros(BATCH, 0, WIDTH)], 1),
    "alone": lambda x: torch.cat([x], 1),
    "alone, of another type": lambda x: torch.cat([x.half(), x.new_zeros(BATCH, 0, WIDTH)], 1),
    "two": lambda x: torch.cat([x[:, :3], x[:, 3:]], 1),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", JOINED)
def test_what_is_joined_of_one_part_is_contiguous_at_the_edge(name: str) -> None:
    """As the next region is compiled for; Inductor keeps the part's own layout (channels first, here) if it may."""

    class Patched(Denoiser):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:  # type: ignore[override]
            x = self.proj_in(hidden_states) * (1 + timestep.reshape(-1, 1, 1))
            x = JOINED[name](x.transpose(1, 2).contiguous().transpose(1, 2))
            for block in self.blocks:
                x = block(x)
            return (self.proj_out(x),)

    model = randomise(Patched(4))
    compiled, _ = one_rank(model)
    (given,) = steps_of(1)
    with torch.no_grad():
        # 16 bits, which Inductor rounds to where it must only
        torch.testing.assert_close(compiled(**given), model(**given), rtol=1e-2, atol=1e-2)


def test_attention_is_called_with_its_own_layout() -> None:
    """The strides at the edges are those that the graph states, whatever the kernels prefer."""
    q = draw(1, 5, 2, 8).transpose(1, 2)
    assert look_of(F.scaled_dot_product_attention(q, q, q)) != look_of(q.contiguous())
