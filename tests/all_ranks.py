"""The graphs of all ranks of a mesh that exists on paper only. What is the same on every rank is done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any
from unittest import mock
from weakref import WeakKeyDictionary

import torch
from torch import fx

from paracompile import passes as source
from paracompile.mesh import Ranks
from paracompile.passes import Found, pipeline, run_passes
from paracompile.passes.writer import GraphWriter
from paracompile.torch_private import (
    FakeTensorMode,
    LazyGraphModule,
    parameter_sources,
    set_parameter_sources,
    set_source,
    source_of,
)

_normalised: WeakKeyDictionary[fx.GraphModule, fx.GraphModule] = WeakKeyDictionary()


def normalise(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """The pass of this name, once for all meshes and settings, which it knows nothing of: it is half of the work."""
    if gm not in _normalised:
        _normalised[gm] = source.normalise(gm, example_inputs)
    made = _normalised[gm]
    graph = fx.Graph()  # a copy: the passes behind it write to what they are given
    copies: dict[fx.Node, fx.Node] = {}
    for node in made.graph.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        if node.op == "placeholder":
            set_source(copies[node], source_of(node))
    copy = LazyGraphModule(made, graph, made.__class__.__name__)
    copy.meta.update(made.meta)
    sources = parameter_sources(made)
    if sources is not None:
        set_parameter_sources(copy, sources)
    return copy


@dataclass(frozen=True)
class OfRanks:
    """What the passes made of one graph.

    attributes:
        shared: the last graph that is the same on every rank; the only one on a single rank.
        graphs, found: by rank, its graph and what was found in it.
    """

    shared: fx.GraphModule
    graphs: list[fx.GraphModule]
    found: list[Found]


def of_all_ranks(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    mesh: dict[str, int],
    *,
    after: Callable[[str, fx.GraphModule], object] = lambda name, gm: None,
    **how: Any,
) -> OfRanks:
    """Runs the passes for every rank of a mesh, given as sizes by axis; `how` goes to `pipeline`."""
    found = Found()
    first = pipeline(Ranks.simulated(**mesh), found=found, **how)
    first[0] = replace(first[0], run=normalise)
    names = [step.name for step in first]
    if "lower" not in names:
        graph = run_passes(gm, example_inputs, first, after=after)
        return OfRanks(graph, [graph], [found])
    start = names.index("lower")
    shared = run_passes(gm, example_inputs, first[:start], after=after)
    graphs, founds = [], []
    are_open = any(isinstance(value, torch.SymInt) for value in example_inputs)  # then evaluating guards sizes, too
    writer = GraphWriter if are_open else _sharing_what_is_known()
    for rank in range(prod(mesh.values())):
        own = replace(found)
        passes = pipeline(Ranks.simulated(**mesh, rank=rank), found=own, **how)
        graph = shared
        with mock.patch.dict(source.lower.__globals__, GraphWriter=writer):
            for step in passes[start:]:  # their contracts are those of the whole list
                graph = step.run(graph, example_inputs)
        graph.graph.lint()
        graphs.append(graph)
        founds.append(own)
    return OfRanks(shared, graphs, founds)


def _sharing_what_is_known() -> type[GraphWriter]:
    """Writers that share what they computed: of equal parts of several ranks it is the same."""
    known: dict[str, Any] = {}

    class Writer(GraphWriter):
        def __init__(self, fake_mode: FakeTensorMode, graph: fx.Graph | None = None) -> None:
            super().__init__(fake_mode, graph)
            self._known = known

    return Writer
