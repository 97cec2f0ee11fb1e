"""The order of a rank's nodes: exchanges start early and are awaited late, and nothing else changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lockstep import run_lockstep
from random_tensors import draw, randomise
from small_models import (
    IMAGE,
    WIDTH,
    Joint,
    Mesh,
    SelfAttention,
    Transformer,
    capture,
    close,
    image_tokens,
    mesh_name,
    mesh_sizes,
    text_tokens,
)
from torch import Tensor, fx, nn

from paracompile.cache_options import CacheOptions
from paracompile.mesh import Ranks
from paracompile.passes import pipeline, run_passes
from paracompile.passes.first_block_cache import COMPUTE, COND, REUSE
from paracompile.passes.schedule import schedule
from paracompile.patterns.exchanges import is_collective, is_wait

aten, c10d = torch.ops.aten, torch.ops._c10d_functional
ENTER, EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast

MESHES: list[Mesh] = [5, {"ring": 3}, {"ring": 2, "ulysses": 2}]  # 5 divides neither tokens nor heads


class Parallel(nn.Module):
    """Queries first, values last, as models write them; an MLP on the input that could run under the last exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = SelfAttention()
        self.mlp_in, self.mlp_out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x) + self.mlp_out(F.gelu(self.mlp_in(x)))


class UnderAutocast(nn.Module):
    """The attention in full precision, an independent MLP in a region of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = SelfAttention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(x)
        with torch.autocast("cpu", torch.bfloat16):
            other = self.mlp(x)
        return attended + other.float() + self.attention(other.float())


class WithMemory(nn.Module):
    """Attention that also writes to a buffer that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.last = Parallel(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = self.block(x)
        memory.mul_(2)
        return self.last(x) + memory


MODELS: dict[str, tuple[Callable[[], nn.Module], Sequence[Callable[[], Tensor]]]] = {
    "parallel": (Parallel, [lambda: image_tokens(WIDTH)]),
    "two blocks": (lambda: Transformer(2), [image_tokens]),
    "joint": (Joint, [lambda: image_tokens(WIDTH), text_tokens]),
    "autocast": (UnderAutocast, [lambda: image_tokens(WIDTH)]),
    "memory": (WithMemory, [lambda: image_tokens(WIDTH), lambda: draw(WIDTH, seed=9)]),
}
every_model = pytest.mark.parametrize("name", MODELS)
every_mesh = pytest.mark.parametrize("mesh", MESHES, ids=mesh_name)


@dataclass
class Graphs:
    """The graphs of all ranks before and after `schedule`, and the values they are called with."""

    before: list[fx.GraphModule] = field(default_factory=list)
    after: list[fx.GraphModule] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)


def graphs_of(name: str, mesh: Mesh) -> Graphs:
    return _graphs_of(name, tuple(mesh_sizes(mesh).items()))


@cache
def _graphs_of(name: str, mesh: tuple[tuple[str, int], ...]) -> Graphs:
    make, draws = MODELS[name]
    found, sizes = Graphs(), dict(mesh)

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for rank in range(prod(sizes.values())):
            passes = pipeline(Ranks.simulated(**sizes, rank=rank))
            stop = [step.name for step in passes].index("schedule")
            found.before.append(run_passes(gm, example_inputs, passes[:stop]))
            found.after.append(run_passes(gm, example_inputs, passes[: stop + 1]))

        def run(*args: Any) -> Any:
            found.inputs = [argument.clone() for argument in args]
            return gm.forward(*args)

        return run

    capture(randomise(make()), [make_input() for make_input in draws], backend)
    return found


LINEARS = ("to_q", "to_k", "to_v", "to_out", "mlp_in", "mlp_out")


def events(gm: fx.GraphModule) -> list[str]:
    """What takes time, in order: linears and exchanges by the weights that they come from, attentions, norms, gelu."""
    names: dict[fx.Node, str] = {}
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_function":
            event = _event(node, names)
            if event is not None:
                found.append(event)
    return found


def _event(node: fx.Node, names: dict[fx.Node, str]) -> str | None:
    sources = [names[source] for source in node.all_input_nodes if source in names]
    names[node] = sources[0] if sources else "x"
    if node.target is aten.linear.default:
        weight = node.args[1]
        assert isinstance(weight, fx.Node)
        names[node] = next(
            part for part in ("to_q", "to_k", "to_v", "to_out", "mlp_in", "mlp_out") if part in weight.name
        )
        return names[node]
    if node.target is aten.scaled_dot_product_attention.default or "attention_with_lse" in str(node.target):
        names[node] = "result"
        return "attention"
    if is_collective(node):
        return f"start {'gather' if 'all_gather' in str(node.target) else names[node]}"
    if is_wait(node):
        start = node.args[0]
        assert isinstance(start, fx.Node)
        return f"wait {'gather' if 'all_gather' in str(start.target) else names[node]}"
    if "norm" in str(node.target) or node.target is aten.gelu.default:
        return f"{'gelu' if 'gelu' in str(node.target) else 'norm'} {names[node]}"
    return None


def test_values_travel_first_and_the_mlp_runs_while_the_result_travels() -> None:
    graphs = graphs_of("parallel", 2)
    exchanges = [f"{what} {part}" for part in ("to_v", "to_k", "to_q") for what in ("start", "wait")]
    assert events(graphs.before[0]) == [
        *["to_q", "to_k", "to_v", "norm to_q", "norm to_k", *exchanges, "attention", "start result", "wait result"],
        *["to_out", "mlp_in", "gelu mlp_in", "mlp_out", "start gather", "wait gather"],
    ]
    assert events(graphs.after[0]) == [
        *["to_v", "start to_v"],
        *["to_k", "norm to_k", "start to_k"],
        *["to_q", "norm to_q", "start to_q"],
        *["wait to_v", "wait to_k", "wait to_q", "attention", "start result"],
        *["mlp_in", "gelu mlp_in", "mlp_out", "wait result", "to_out", "start gather", "wait gather"],
    ]


def test_in_a_ring_the_next_keys_travel_while_attention_runs_on_the_present_ones() -> None:
    graphs = graphs_of("parallel", {"ring": 3})
    for before, after in zip(graphs.before, graphs.after, strict=True):
        kinds = [kind.partition(" ")[0] for kind in events(before) if kind.startswith(("start", "wait", "attention"))]
        step = ["start", "wait", "attention"]
        assert kinds == [*step, *step, "attention", "start", "wait"]
        kinds = [kind.partition(" ")[0] for kind in events(after) if kind.startswith(("start", "wait", "attention"))]
        step = ["start", "attention", "wait"]
        assert kinds == [*step, *step, "attention", "start", "wait"]
        assert events(after).index("start to_k") < events(after).index("to_q")  # queries do not travel in a ring


@pytest.mark.sampled(1)
@pytest.mark.parametrize("mesh", MESHES[1:], ids=mesh_name)
def test_every_next_exchange_of_a_ring_is_around_a_step(mesh: Mesh) -> None:
    ring = mesh_sizes(mesh)["ring"]
    for gm in graphs_of("two blocks", mesh).after:
        order = {node: number for number, node in enumerate(gm.graph.nodes)}
        steps = [node for node in order if "attention_with_lse" in str(node.target)]
        assert len(steps) == 2 * ring
        starts = [node for node in order if is_collective(node) and node.args[-1] == "ring"]
        assert len(starts) == 2 * (ring - 1)
        for number, start in enumerate(starts):
            block, turn = divmod(number, ring - 1)
            (wait,) = start.users
            assert (
                order[start] < order[steps[block * ring + turn]] < order[wait] < order[steps[block * ring + turn + 1]]
            )


def ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        new = [source for source in waiting.pop().all_input_nodes if source not in found]
        found.update(new)
        waiting += new
    return found


def regions(gm: fx.GraphModule) -> list[list[fx.Node]]:
    """The calls between edges of autocast regions and writes."""
    found: list[list[fx.Node]] = [[]]
    for node in gm.graph.nodes:
        if node.op != "call_function":
            continue
        if node.target in (ENTER, EXIT, aten.copy_.default):
            found += [[node], []]
        else:
            found[-1].append(node)
    return found


@pytest.mark.sampled(2)
@every_mesh
@every_model
def test_only_what_a_start_needs_comes_between_it_and_the_one_before(name: str, mesh: Mesh) -> None:
    gm = graphs_of(name, mesh).after[0]
    for region in regions(gm):
        since: list[fx.Node] = []
        for node in region:
            since.append(node)
            if is_collective(node) or "attention_with_lse" in str(node.target):
                assert not set(since[:-1]) - ancestors(node)
                since = []


@pytest.mark.sampled(5)
@every_mesh
@every_model
def test_what_follows_a_wait_uses_it(name: str, mesh: Mesh) -> None:
    gm = graphs_of(name, mesh).after[0]
    for region in regions(gm):
        for node, following in pairwise(region):
            assert not is_wait(node) or is_wait(following) or node in following.all_input_nodes


@every_mesh
@every_model
def test_numbers_and_collectives_stay_as_they_were(name: str, mesh: Mesh) -> None:
    graphs, sizes = graphs_of(name, mesh), mesh_sizes(mesh)

    def run(ranks: list[fx.GraphModule]) -> Any:
        inputs = [[value.clone() for value in graphs.inputs] for _ in ranks]
        return run_lockstep(ranks, inputs, sizes), inputs

    close(run(graphs.after), run(graphs.before), 0.0)
    sequences = [
        [(node.target, node.args[-1]) for node in gm.graph.nodes if is_collective(node)]
        for gm in [*graphs.before, *graphs.after]
    ]
    assert all(sequence == sequences[0] for sequence in sequences)
    for before, after in zip(graphs.before, graphs.after, strict=True):
        assert sorted(map(str, before.graph.nodes)) == sorted(map(str, after.graph.nodes))


@pytest.mark.slow
@every_model
def test_a_second_run_changes_nothing(name: str) -> None:
    (gm, *_) = graphs_of(name, {"ring": 2, "ulysses": 2}).after
    order = list(gm.graph.nodes)
    assert schedule(gm, []) is gm
    assert list(gm.graph.nodes) == order


@pytest.mark.parametrize("name", ["autocast", "memory"])
def test_no_node_leaves_its_region(name: str) -> None:
    graphs = graphs_of(name, 2)
    before, after = (
        [{node.name for node in region} for region in regions(gm)] for gm in (graphs.before[0], graphs.after[0])
    )
    assert len(before) == {"autocast": 5, "memory": 3}[name]
    assert before == after


# With a first block cache


def test_the_branches_of_a_conditional_are_ordered_too() -> None:
    """Exchanges of skipped blocks start early and are awaited late, and all of that before anything is stored."""
    found: list[str] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        passes = pipeline(Ranks.simulated(ulysses=2), cache=CacheOptions(rdt=1.0))
        stop = [step.name for step in passes].index("schedule")
        local = run_passes(gm, example_inputs, passes[:stop])
        assert exchanges(getattr(local, REUSE)) == ""
        found.append(exchanges(getattr(local, COMPUTE)))
        found.append(exchanges(getattr(schedule(local, example_inputs), COMPUTE)))
        return gm.forward

    capture(randomise(Transformer(2)), [image_tokens()], backend)
    assert found == ["s w s w s w s w copy copy", "s s s w w w s w copy copy"]


def exchanges(gm: fx.GraphModule) -> str:
    """Starts, waits and writes, in order."""
    kinds = ("s" if is_collective(node) else "w" if is_wait(node) else "" for node in gm.graph.nodes)
    writes = ("copy" if node.target is aten.copy_.default else "" for node in gm.graph.nodes)
    return " ".join(filter(None, map("".join, zip(kinds, writes, strict=True))))


# On graphs written by hand

Fence = Callable[[fx.Graph, fx.Node], Any]


def no_fence(graph: fx.Graph, state: fx.Node) -> None:
    pass


def a_write(graph: fx.Graph, state: fx.Node) -> None:
    graph.call_function(aten.copy_.default, (state, graph.call_function(aten.sin.default, (state,))))


def an_in_place_operator(graph: fx.Graph, state: fx.Node) -> None:
    graph.call_function(aten.add_.Tensor, (state, 1))


def an_autocast_region(graph: fx.Graph, state: fx.Node) -> None:
    entered = graph.call_function(ENTER, ("cpu", torch.bfloat16, True, None))
    graph.call_function(aten.cos.default, (state,))
    graph.call_function(EXIT, (entered,))


def a_conditional(graph: fx.Graph, state: fx.Node) -> None:
    """Its branches may write to what they are given, so nothing may pass it."""
    branches = (graph.get_attr("reuse"), graph.get_attr("compute"))
    graph.call_function(COND, (graph.call_function(aten.any.default, (state,)), *branches, (state,)))


def written_by_hand(fence: Fence) -> fx.GraphModule:
    """An exchange and a number of its own on each side of a fence."""
    graph = fx.Graph()
    x, state = graph.placeholder("x"), graph.placeholder("state")

    def exchanged(value: fx.Node) -> fx.Node:
        start = graph.call_function(c10d.all_to_all_single.default, (value, [1, 1], [1, 1], "ulysses"))
        return graph.call_function(c10d.wait_tensor.default, (start,))

    results = [exchanged(x), graph.call_function(aten.neg.default, (x,))]
    fence(graph, state)
    results += [exchanged(graph.call_function(aten.exp.default, (state,))), graph.call_function(aten.abs.default, (x,))]
    graph.output(tuple(results))
    root = nn.Module()
    root.reuse, root.compute = nn.Identity(), nn.Identity()
    return fx.GraphModule(root, graph)


@pytest.mark.parametrize(
    "fence, expected",
    [
        (no_fence, "start exp start neg abs wait wait"),
        (a_write, "start neg sin wait | exp start abs wait"),
        (an_in_place_operator, "start neg wait | exp start abs wait"),
        (an_autocast_region, "start neg wait | cos | exp start abs wait"),
        (a_conditional, "start neg any wait | exp start abs wait"),
    ],
)
def test_a_fence_is_not_crossed(fence: Fence, expected: str) -> None:
    short = {"all_to_all_single": "start", "wait_tensor": "wait", "copy_": "|", "add_": "|"}
    short |= {"_enter_autocast": "|", "_exit_autocast": "|", "cond": "|"}
    gm = schedule(written_by_hand(fence), [])
    names = [
        node.target.overloadpacket.__name__ if hasattr(node.target, "overloadpacket") else node.target.__name__
        for node in gm.graph.nodes
        if node.op == "call_function"
    ]
    assert " ".join(short.get(name, name) for name in names) == expected


def test_a_graph_without_collectives_keeps_its_order() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    chain = [graph.call_function(op, (x,)) for op in (aten.sin.default, aten.cos.default, aten.neg.default)]
    graph.output(tuple(chain))
    gm = fx.GraphModule(nn.Module(), graph)
    order = list(graph.nodes)
    assert list(schedule(gm, []).graph.nodes) == order


def test_constants_come_first() -> None:
    """They are read where they are used, so it does not matter where they are named."""
    graph, module = fx.Graph(), nn.Module()
    module.register_buffer("table", draw(IMAGE))
    x = graph.placeholder("x")
    y = graph.call_function(aten.neg.default, (x,))
    table = graph.get_attr("table")
    graph.output((graph.call_function(aten.add.Tensor, (y, table)),))
    assert [node.op for node in schedule(fx.GraphModule(module, graph), []).graph.nodes] == [
        *["placeholder", "get_attr", "call_function", "call_function", "output"]
    ]
