"""Graphs with a first block cache for ranks that exist on paper only, called step by step.

    graphs = cached(captured("flux"), {"ulysses": 2}, taylor_order=1)
    first, second = graphs.run([step(graphs.of, 0), step(graphs.of, 1)], rdt=0.5)
    second.hit, second.output, second.outputs[1], second.records[0], second.state[0]

Between steps each rank keeps its own record and state, as `CachedCall` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from all_ranks import of_all_ranks
from capture import Captured, Sharded, captured, shard
from families import Inputs
from lockstep import run_lockstep
from random_tensors import draw
from torch import Tensor, fx

from paracompile.cache_options import CacheOptions
from paracompile.passes import CacheLayout
from paracompile.passes.cache_decision import Control, Record

ALWAYS, NEVER = 1e9, 0.0
"""Thresholds: skip whenever a step may be skipped; compute always."""


Chosen = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Step:
    """What one call gave, by rank.

    attributes:
        outputs: the model's first output.
        records: the new records.
        state: copies of the stored values after the call, the previous residual first.
    """

    outputs: Sequence[Tensor]
    records: Sequence[Tensor]
    state: Sequence[Sequence[Tensor]]

    @property
    def output(self) -> Tensor:
        return self.outputs[0]

    @property
    def hit(self) -> bool:
        """Whether blocks were skipped; all ranks must say the same."""
        (hit,) = {bool(record[Record.HIT]) for record in self.records}
        return hit

    @property
    def ratio(self) -> float:
        """The relative difference of the first block's residual that the first rank recorded; nan for none."""
        return float(self.records[0][Record.RATIO])


@dataclass(frozen=True)
class CachedGraphs:
    """The graphs of all ranks, by rank, with what each takes and gives besides."""

    of: Captured
    graphs: Sequence[fx.GraphModule]
    layouts: Sequence[CacheLayout]
    mesh: dict[str, int]
    plan: tuple[float, ...]

    def begin(self) -> Generation:
        """A generation of which nothing is stored yet."""
        return Generation(
            self,
            [zeros_like(layout.record) for layout in self.layouts],
            [[zeros_like(value) for value in layout.state] for layout in self.layouts],
        )

    def run(self, steps: Sequence[Inputs], rdt: float) -> list[Step]:
        """Calls a new generation with the keyword inputs of each step."""
        generation = self.begin()
        return [generation.step(inputs, rdt) for inputs in steps]


@dataclass
class Generation:
    """The records and the state that the ranks carry from step to step."""

    graphs: CachedGraphs
    records: list[Tensor]
    state: list[list[Tensor]]
    steps: list[Step] = field(default_factory=list)

    def step(self, inputs: Inputs, rdt: float | Sequence[float], *, unnamed: bool = False, known: bool = False) -> Step:
        """One call of all ranks; `rdt` may be given by rank. `unnamed`: nobody named the slot; `known`: the host knows
        that a step was made since its last call."""
        arguments = arguments_of(self.graphs.of, inputs)
        thresholds = [rdt] * len(self.records) if isinstance(rdt, (int, float)) else rdt
        given = [
            [*arguments, torch.tensor([threshold, float(unnamed), float(known), *self.graphs.plan]), record, *state]
            for threshold, record, state in zip(thresholds, self.records, self.state, strict=True)
        ]
        with torch.no_grad():
            found = run_lockstep(self.graphs.graphs, given, self.graphs.mesh)
        self.records = [outputs[-1] for outputs in found]
        state = [[value.clone() for value in of_rank] for of_rank in self.state]
        self.steps.append(Step([outputs[0] for outputs in found], self.records, state))
        return self.steps[-1]


def cached(of: Captured, mesh: dict[str, int] | None = None, **options: Any) -> CachedGraphs:
    """The graphs of the ranks of a mesh, given as sizes by axis (one rank if left out), with these `CacheOptions`."""
    mesh = mesh or {"ulysses": 1}
    chosen = CacheOptions(rdt=1.0, **options)
    made = of_all_ranks(of.gm, of.example_inputs, mesh, cache=chosen)
    layouts = [found.cache for found in made.found if found.cache is not None]
    return CachedGraphs(of, made.graphs, layouts, mesh, Control.plan(chosen))


def cached_family(
    family: str, mesh: dict[str, int] | None = None, sizes: dict[str, Any] | None = None, **rules: Any
) -> CachedGraphs:
    """The graphs of a family's small model; shared by all tests that ask for the same."""
    return _cached_family(family, *(tuple(sorted(chosen.items())) for chosen in (mesh or {}, sizes or {}, rules)))


@cache
def _cached_family(family: str, mesh: Chosen, sizes: Chosen, rules: Chosen) -> CachedGraphs:
    return cached(captured(family, **dict(sizes)), dict(mesh), **dict(rules))


def not_cached(of: Captured, mesh: dict[str, int] | None = None) -> Sharded:
    """The graphs of the same ranks without a cache."""
    if mesh:
        return shard(of, mesh)
    made = of_all_ranks(of.gm, of.example_inputs, {"ulysses": 1})
    return Sharded(made.shared, made.graphs, [], [], {"ulysses": 1})


def step(of: Captured, number: int, *, change: float = 0.01) -> Inputs:
    """Keyword inputs of the step of this number: the sample changed by so much of noise, times going down.

    Times are small, because a sine of a large number in float32 is far from the one in float64.
    """
    inputs = dict(of.inputs)
    sample = inputs["hidden_states"]
    inputs["hidden_states"] = sample + number * change * draw(*sample.shape, seed=100 + number)
    inputs["timestep"] = inputs["timestep"] * (0.01 - 0.0001 * number)
    if inputs.get("guidance") is not None:
        inputs["guidance"] = inputs["guidance"] * 0.001
    return inputs


def arguments_of(of: Captured, inputs: Inputs) -> list[Any]:
    """The arguments of the captured graph for other keyword inputs (of the same shapes)."""
    place = {id(argument): number for number, argument in enumerate(of.arguments)}
    arguments = list(of.arguments)
    for name, value in inputs.items():
        if value is not of.inputs[name]:
            arguments[place[id(of.inputs[name])]] = value
    return arguments


def zeros_like(fake: Tensor) -> Tensor:
    return torch.zeros(fake.shape, dtype=fake.dtype, device=fake.device)
