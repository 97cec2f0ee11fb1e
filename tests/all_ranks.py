"""The graphs of all ranks of a mesh that exists on paper only. What is the same on every rank is done once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import fx

from paracompile.mesh import Ranks
from paracompile.passes import Found, pipeline, run_passes


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
    names = [step.name for step in first]
    if "lower" not in names:
        graph = run_passes(gm, example_inputs, first, after=after)
        return OfRanks(graph, [graph], [found])
    start = names.index("lower")
    shared = run_passes(gm, example_inputs, first[:start], after=after)
    graphs, founds = [], []
    for rank in range(prod(mesh.values())):
        own = replace(found)
        passes = pipeline(Ranks.simulated(**mesh, rank=rank), found=own, **how)
        graph = shared
        for step in passes[start:]:  # their contracts are those of the whole list
            graph = step.run(graph, example_inputs)
        graph.graph.lint()
        graphs.append(graph)
        founds.append(own)
    return OfRanks(shared, graphs, founds)
