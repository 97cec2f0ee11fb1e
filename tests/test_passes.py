"""The list of passes: its order, its contracts, and what runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from random_tensors import randomise
from small_models import WIDTH, Mesh, SelfAttention, capture, image_tokens, mesh_name, mesh_sizes
from torch import fx

from paracompile.cache_options import CacheOptions
from paracompile.errors import GraphError, ParacompileError
from paracompile.layout.factors import Factor, whole
from paracompile.mesh import Ranks
from paracompile.passes import Found, Pass, check_contracts, pipeline, run_passes
from paracompile.passes.unified_attention import unified_attention


def first(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    return gm


def second(gm: fx.GraphModule, example_inputs: Sequence[Any], *, ranks: int = 1) -> fx.GraphModule:
    return gm


SPELLED = Pass(first, provides="spelled")
CUT = Pass(
    partial(second, ranks=2), requires=frozenset({"spelled"}), provides="cut", conflicts=frozenset({"cut", "cached"})
)
CACHED = Pass(first, requires=frozenset({"spelled", "cut"}), provides="cached")


@pytest.mark.parametrize("passes", [[], [SPELLED], [SPELLED, SPELLED], [SPELLED, CUT], [SPELLED, CUT, CACHED, CACHED]])
def test_a_list_that_keeps_its_contracts(passes: list[Pass]) -> None:
    check_contracts(passes)


@pytest.mark.parametrize(
    "passes, message",
    [
        ([CUT], "pass 'second' needs ['spelled']; before it there is: nothing"),
        ([CUT, SPELLED], "pass 'second' needs ['spelled']; before it there is: nothing"),
        ([CACHED], "pass 'first' needs ['cut', 'spelled']; before it there is: nothing"),
        ([SPELLED, CACHED], "pass 'first' needs ['cut']; before it there is: ['spelled']"),
        ([SPELLED, CUT, CUT], "pass 'second' cannot follow ['cut']; before it there is: ['spelled', 'cut']"),
        (
            [SPELLED, CUT, CACHED, SPELLED, CUT],
            "pass 'second' cannot follow ['cached', 'cut']; before it there is: "
            "['spelled', 'cut', 'cached', 'spelled']",
        ),
    ],
)
def test_a_broken_contract_names_the_pass_what_it_misses_and_what_ran(passes: list[Pass], message: str) -> None:
    with pytest.raises(ParacompileError) as caught:
        check_contracts(passes)
    assert str(caught.value) == message


# The list

AROUND = (
    ["normalise", "fuse_attention", "static_lengths"],
    ["drop_masked_keys", "choose_kernels", "schedule", "dispatch_on_subclasses"],
)
SHARDING = ["compose_padding", "plan_layouts", "split_and_gather", "unified_attention", "lower"]
MESHES: list[tuple[Mesh, list[str]]] = [
    (1, []),
    (2, SHARDING),
    ({"ring": 3}, SHARDING),
    ({"ring": 2, "ulysses": 2}, SHARDING),
    ({"batch": 2}, SHARDING),
    ({"batch": 2, "ring": 2, "ulysses": 2}, SHARDING),
]


def names(passes: Sequence[Pass]) -> list[str]:
    return [step.name for step in passes]


@pytest.mark.parametrize("mesh, cuts", MESHES, ids=[mesh_name(mesh) for mesh, _ in MESHES])
def test_the_order_for_each_kind_of_mesh(mesh: Mesh, cuts: list[str]) -> None:
    ranks = Ranks.simulated(**mesh_sizes(mesh))
    before, after = AROUND
    check_contracts(pipeline(ranks))
    assert names(pipeline(ranks)) == [*before, *cuts, *after]
    assert names(pipeline(ranks, drop_keys=False)) == [*before, *cuts, *after[1:]]


@pytest.mark.parametrize("mesh, cuts", MESHES, ids=[mesh_name(mesh) for mesh, _ in MESHES])
def test_the_order_with_a_first_block_cache(mesh: Mesh, cuts: list[str]) -> None:
    """Blocks are marked in the graph of the whole model, and skipped in that of the rank, before it is scheduled."""
    passes = pipeline(Ranks.simulated(**mesh_sizes(mesh)), cache=CacheOptions(rdt=1.0))
    before, after = AROUND
    check_contracts(passes)
    assert names(passes) == [*before, "mark_blocks", *cuts, *after[:2], "first_block_cache", *after[2:]]


@pytest.mark.parametrize(
    "order, words",
    [
        ((0, 1, 2, 4, 5, 6, 7, 8, 3, 9, 10, 11, 12), ["'mark_blocks' cannot follow ['a rank', 'shards']"]),
        ((0, 1, 2, 4, 5, 6, 3, 7, 8, 9, 10, 11, 12), ["'mark_blocks' cannot follow ['shards']"]),
        ((0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12), ["'first_block_cache' needs ['marked blocks']"]),
        ((0, 1, 3, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12), ["'mark_blocks' needs ['static lengths']"]),
    ],
)
def test_the_passes_of_the_cache_in_any_other_order_are_refused(order: Sequence[int], words: list[str]) -> None:
    passes = pipeline(Ranks.simulated(batch=2, ulysses=2), cache=CacheOptions(rdt=1.0))
    with pytest.raises(ParacompileError) as caught:
        check_contracts([passes[place] for place in order])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda passes: passes[1:], ["'fuse_attention'", "['functional ATen']", "nothing"]),
        (lambda passes: passes[:2] + passes[3:], ["'compose_padding'", "['static lengths']", "'functional ATen'"]),
        (lambda passes: passes[:4] + passes[5:], ["'split_and_gather' needs ['plans']"]),
        (lambda passes: passes[:6] + passes[5:], ["'split_and_gather' cannot follow ['shards']"]),
        (lambda passes: passes[:6] + passes[7:], ["'lower' needs ['unified attention']"]),
        (lambda passes: passes[:8] + passes[7:], ["'lower' cannot follow ['a rank']"]),
        (lambda passes: passes[-1:], ["'dispatch_on_subclasses' needs"]),
        (lambda passes: passes[-2:], ["'schedule' needs"]),
    ],
)
def test_the_list_in_any_other_form_is_refused(change: Callable[[list[Pass]], list[Pass]], words: list[str]) -> None:
    passes = pipeline(Ranks.simulated(batch=2, ulysses=2))
    with pytest.raises(ParacompileError) as caught:
        check_contracts(change(passes))
    for word in words:
        assert word in str(caught.value)


# Running it


def a_graph() -> fx.GraphModule:
    graph = fx.Graph()
    graph.output((graph.call_function(torch.neg, (graph.placeholder("x"),)),))
    return fx.GraphModule(torch.nn.Module(), graph)


def test_each_pass_gets_what_the_one_before_made_and_after_is_told() -> None:
    start, example_inputs = a_graph(), [torch.ones(2)]
    made: list[fx.GraphModule] = []
    given: list[Any] = []
    told: list[Any] = []

    def step(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        given.append((gm, inputs))
        made.append(a_graph())
        return made[-1]

    passes = [Pass(step, provides="one"), Pass(first, provides="two"), Pass(partial(step), provides="three")]
    result = run_passes(start, example_inputs, passes, after=lambda name, gm: told.append((name, gm)))
    assert given == [(start, example_inputs), (made[0], example_inputs)]
    assert told == [("step", made[0]), ("first", made[0]), ("step", made[1])]
    assert result is made[1]


def test_nothing_runs_where_the_list_cannot_work() -> None:
    def never(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        raise AssertionError

    with pytest.raises(ParacompileError, match="'second' needs"):
        run_passes(a_graph(), [], [Pass(never, provides="something"), CUT])


def test_a_pass_that_breaks_the_graph_is_found_at_once() -> None:
    told: list[str] = []

    def breaks(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
        (x,) = gm.graph.find_nodes(op="placeholder")
        (negative,) = gm.graph.find_nodes(op="call_function", target=torch.neg)
        negative.append(x)
        return gm

    with pytest.raises(RuntimeError, match="used before it has been defined"):
        run_passes(a_graph(), [], [Pass(breaks, provides="")], after=lambda name, gm: told.append(name))
    assert told == []


@pytest.mark.parametrize("mesh, cuts", MESHES, ids=[mesh_name(mesh) for mesh, _ in MESHES])
def test_a_real_graph_goes_through_the_list(mesh: Mesh, cuts: list[str]) -> None:
    """Dynamo's own graph is not touched; there is a plan for each axis, the batch's before the tokens'."""
    told: list[str] = []
    found = Found()
    ranks = Ranks.simulated(**mesh_sizes(mesh))

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before = gm.print_readable(print_output=False)
        passes = pipeline(ranks, found=found)
        local = run_passes(gm, example_inputs, passes, after=lambda name, graph: told.append(name))
        assert local is not gm
        assert gm.print_readable(print_output=False) == before
        return gm.forward

    capture(randomise(SelfAttention()), [image_tokens(WIDTH)], backend)
    assert told == [*AROUND[0], *cuts, *AROUND[1]]
    axes = {axis.name: axis.size for axis in (ranks.batch, ranks.sequence) if axis.size > 1}
    assert {name: plan.shares.ranks for name, plan in found.plans.items()} == axes


@pytest.mark.slow
def test_the_example_that_dumps_the_passes(tmp_path: Path) -> None:
    """`docs/how_it_works.md` is made from it."""
    script = Path(__file__).parents[1] / "examples" / "dump_passes.py"
    subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
    files = sorted((tmp_path / "graph_0_0" / "rank_0").iterdir())
    passes = pipeline(Ranks.simulated(ulysses=2), cache=CacheOptions(rdt=1.0), regions=True)
    assert [file.stem[3:] for file in files] == ["captured", *names(passes)]
    text = {file.stem[3:]: file.read_text() for file in files}
    assert text["unified_attention"].count("paracompile.unified_attention.default(") == 3
    assert "paracompile." not in text["lower"]
    assert "all_to_all_single" in text["lower"]


def test_no_other_operator_is_taken_for_attention() -> None:
    """Whatever its rule says: exchanging operands is lowered for attention alone."""
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.relu.default, (graph.placeholder("x"),))
    graph.output(node)
    span = whole((2, 8, 4), 1)
    node.meta["neighbours"] = {"sequence": Factor(8, (span,), (span,), exchanges=(span,))}
    with pytest.raises(GraphError, match="its rule exchanges operands, which attention alone can"):
        unified_attention(fx.GraphModule({}, graph), ())
