"""Captures a family's model once, and shards its graph for ranks that exist on paper only.

Capturing takes seconds, so both are cached: a test asks for `captured("flux", batch=1)` or `sharded("flux", 2)` and
shares them with every other test that asks for the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from all_ranks import of_all_ranks
from families import ALL_FAMILIES, Inputs
from lockstep import run_lockstep
from torch import fx, nn

from paracompile.errors import module_path
from paracompile.layout.graph import Operation
from paracompile.layout.plan import Plan
from paracompile.mesh import Ranks
from paracompile.report.report import Report, report_of

RTOL, ATOL = 1e-4, 1e-5  # of a value; of the largest value


@dataclass(frozen=True)
class Captured:
    """What Dynamo made of one call of a model.

    attributes:
        model, inputs: the model and the keyword inputs it was called with.
        graphs: how many graphs Dynamo made; the rest is of the first.
        gm, example_inputs: what a backend is given.
        arguments: the real values of the graph's inputs.
        expected: the eager model's output.
    """

    model: nn.Module
    inputs: Inputs
    graphs: int
    gm: fx.GraphModule
    example_inputs: Sequence[Any]
    arguments: Sequence[Any]
    expected: torch.Tensor

    def block_lists(self) -> tuple[str, ...]:
        """The names of the model's lists of blocks."""
        return tuple(name for name, child in self.model.named_children() if isinstance(child, nn.ModuleList))


@dataclass(frozen=True)
class Sharded:
    """The last graph that all ranks share, the graph and the report of each by rank, and the plan of each axis."""

    shared: fx.GraphModule
    graphs: Sequence[fx.GraphModule]
    plans: Sequence[Plan]
    reports: Sequence[Report]
    mesh: dict[str, int]

    def run(self, arguments: Sequence[Any]) -> list[torch.Tensor]:
        """The first output of every rank."""
        with torch.no_grad():
            return [outputs[0] for outputs in run_lockstep(self.graphs, [arguments] * len(self.graphs), self.mesh)]


def captured(family: str, **sizes: Any) -> Captured:
    """Dynamo's graph of a family's small model; `sizes` go to the family's builder."""
    return _captured(family, tuple(sorted(sizes.items())))


def sharded(family: str, ranks: int, **sizes: Any) -> Sharded:
    """The graphs that `ranks` ranks run for a family's small model."""
    return _sharded(family, ranks, tuple(sorted(sizes.items())))


def sharded_on(mesh: dict[str, int], family: str, **sizes: Any) -> Sharded:
    """The graphs of the ranks of a mesh, given as sizes by axis; not cached."""
    return shard(captured(family, **sizes), mesh)


@cache
def _captured(family: str, sizes: tuple[tuple[str, Any], ...]) -> Captured:
    return capture(*ALL_FAMILIES[family].build(**dict(sizes)))


@cache
def _sharded(family: str, ranks: int, sizes: tuple[tuple[str, Any], ...]) -> Sharded:
    return shard(_captured(family, sizes), {"ulysses": ranks})


def capture(model: Callable[..., Any], inputs: Inputs) -> Captured:
    """Runs a model eagerly and through Dynamo."""
    graphs: list[tuple[fx.GraphModule, Sequence[Any]]] = []
    arguments: list[Sequence[Any]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append((gm, example_inputs))

        def run(*args: Any) -> Any:
            arguments.append(args)
            return gm(*args)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        (expected,) = model(**inputs)
        torch.compile(model, backend=backend, fullgraph=True)(**inputs)
    assert isinstance(model, nn.Module)
    return Captured(model, inputs, len(graphs), *graphs[0], arguments[0], expected)


def shard(of: Captured, mesh: dict[str, int], **how: Any) -> Sharded:
    """Runs the passes for every rank of a mesh, given as sizes by axis; `how` goes to `pipeline`."""
    made = of_all_ranks(of.gm, of.example_inputs, mesh, **how)
    plans = list(made.found[0].plans.values())
    reports = [
        report_of(found, Ranks.simulated(**mesh, rank=rank), gm)
        for rank, (found, gm) in enumerate(zip(made.found, made.graphs, strict=True))
    ]
    return Sharded(made.shared, made.graphs, plans, reports, mesh)


def deviation(found: torch.Tensor, expected: torch.Tensor, rtol: float = RTOL, atol: float = ATOL) -> float:
    """The largest difference in units of the tolerance: at most 1 is equal."""
    found, expected = found.double(), expected.double()
    tolerance = atol * expected.abs().max() + rtol * expected.abs()
    return float(((found - expected).abs() / tolerance).max())


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the unsharded result, up to rounding in float32."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert deviation(found, expected) <= 1


def inside(operation: Operation, lists: Sequence[str]) -> bool:
    """Whether an operation belongs to one of the blocks in the named lists."""
    path = module_path(operation.node)
    return path is not None and path.partition(".")[0] in lists
