"""Runs a graph of regions: one after the other, and of a conditional the one branch that the host reads.

Values lie in numbered slots. Each is let go before the region that reads it last is called, and a region is given its
arguments in a list that it empties, so that memory is free as early as in one piece.

Regions may be CUDA graphs. What they return lies where the next call of the model writes, and some of it is read later:
the record of the cache, and what a second pass (guidance) is combined with. It is copied then.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

__all__ = ["Boxed", "Program"]

Boxed = Callable[[list[Any]], Sequence[Any]]
"""What calls a region: takes its arguments in a list, which it empties."""

_COND = torch.ops.higher_order.cond


@dataclass(frozen=True)
class _Call:
    """One call.

    attributes:
        run: what is called.
        given: the slots of its arguments.
        gone: those of them that nobody reads later.
        made: by result, its slot; None where nobody reads it.
    """

    run: Boxed
    given: tuple[int, ...]
    gone: tuple[int, ...]
    made: tuple[int | None, ...]


class Program:
    """The calls of one graph, as `cut_into_regions` leaves it."""

    def __init__(
        self, gm: fx.GraphModule, compiled: Mapping[fx.GraphModule, Boxed], *, cuda_graphs: bool = False
    ) -> None:
        """
        args:
            compiled: what calls each region.
            cuda_graphs: whether regions may be CUDA graphs.
        """
        self._copies = cuda_graphs
        self._constants: list[Any] = []
        self._slots: dict[fx.Node, int] = {}
        self._calls: list[_Call] = []
        self._last = {source: node for node in gm.graph.nodes for source in node.all_input_nodes}
        for node in gm.graph.find_nodes(op="placeholder"):
            self._slots[node] = len(self._slots)
        for node in gm.graph.find_nodes(op="get_attr"):
            constant = getattr(gm, node.target)
            if isinstance(constant, torch.Tensor):
                self._constants.append(constant)
                self._slots[node] = len(self._slots)
        for node in gm.graph.nodes:
            if node.op == "call_module":
                self._add(node, compiled[_region(gm, node.target)], node.args)
            elif node.target is _COND:
                hit, *branches, operands = node.args
                reuse, compute = (Program(_region(gm, branch.target), compiled) for branch in branches)
                self._add(node, _one_of(reuse, compute), (hit, *operands))
        (output,) = gm.graph.find_nodes(op="output")
        self._outputs = [
            (self._slots[value], None) if isinstance(value, fx.Node) else (None, value) for value in output.args[0]
        ]

    def _add(self, node: fx.Node, run: Boxed, arguments: Sequence[fx.Node]) -> None:
        given = tuple(self._slots[source] for source in arguments)
        gone = tuple(self._slots[source] for source in set(arguments) if self._last[source] is node)
        made: list[int | None] = [None] * len(node.meta["val"])
        for user in node.users:
            assert user.target is operator.getitem
            index = user.args[1]
            assert isinstance(index, int)
            self._slots[user] = made[index] = len(self._slots)
        self._calls.append(_Call(run, given, gone, tuple(made)))

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        outputs = self.run(list(args))
        if self._copies:
            return tuple(output.clone() if isinstance(output, torch.Tensor) else output for output in outputs)
        return outputs

    def run(self, arguments: list[Any]) -> tuple[Any, ...]:
        """The graph's outputs; empties the list of its arguments."""
        slots = [*arguments, *self._constants, *[None] * (len(self._slots) - len(arguments) - len(self._constants))]
        arguments.clear()
        for call in self._calls:
            given = [slots[place] for place in call.given]
            for place in call.gone:
                slots[place] = None
            _keep(slots, call.made, call.run(given))
        return tuple(number if place is None else slots[place] for place, number in self._outputs)


def _keep(slots: list[Any], places: Sequence[int | None], results: Sequence[Any]) -> None:
    """Puts results into slots; a function of its own, so that no variable holds on to the last of them."""
    for place, result in zip(places, results, strict=True):
        if place is not None:
            slots[place] = result


def _region(gm: fx.GraphModule, name: Any) -> fx.GraphModule:
    region = gm.get_submodule(name)
    assert isinstance(region, fx.GraphModule)
    return region


def _one_of(reuse: Program, compute: Program) -> Boxed:
    def run(arguments: list[Any]) -> Sequence[Any]:
        hit, *operands = arguments
        arguments.clear()
        return (reuse if hit.item() else compute).run(operands)  # the one place where the host waits for the device

    return run
