"""Writes numbers that may change from call to call as tensors (), which cost no further compile.

    before (Dynamo's graph)                  after
    item = scale.item()
    sub = 1 - item                           sub = 1 - scale              a float64, an int64 for an int
    y = x * sub                              y = x * sub
    full = torch.full([2, 3], item)          full = torch.full([2, 3], 0.0).fill_(scale)

A tensor () counts in a product as a number does, unless the other operand is a tensor () as well or holds integers:
what such an operation makes is cast to what Dynamo says. To all passes behind, to the compiler and to what sends inputs
to other ranks it is a tensor like others.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from paracompile.passes.evaluation import evaluating
from paracompile.patterns.numbers import FILLED, IN_PLACE, MADE, OF_NUMBERS, Numbers
from paracompile.torch_private import FakeTensor, LazyGraphModule

__all__ = ["write_numbers"]


def write_numbers(gm: fx.GraphModule, numbers: Numbers) -> fx.GraphModule:
    """A copy of Dynamo's graph with tensors in the place of the numbers that are kept.

    Unlike Dynamo's own it refers to no real tensor: torch could not move a quantised weight until Python collects the
    copy.
    """
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    modes = (value.fake_mode for value in values if isinstance(value, FakeTensor))  # the inputs have another
    with evaluating(next(modes)) if numbers.kept else nullcontext():
        graph = _Writer(numbers.kept).written(gm.graph)
    for node in graph.find_nodes(op="placeholder"):
        node.meta.pop("grapharg", None)
    return LazyGraphModule(gm, graph)


class _Writer:
    def __init__(self, kept: frozenset[fx.Node]) -> None:
        self.kept = kept
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}

    def written(self, graph: fx.Graph) -> fx.Graph:
        for node in graph.nodes:
            if node in self.kept:
                self.copies[node] = self._number(node)
            elif self.kept.intersection(node.all_input_nodes):
                self.copies[node] = self._of_tensors(node)
            else:
                self.copies[node] = self.graph.node_copy(node, self.copies.__getitem__)
        return self.graph

    def _number(self, node: fx.Node) -> fx.Node:
        is_float = isinstance(node.meta["example_value"], torch.SymFloat)
        if node.op == "placeholder":
            made = self.graph.node_copy(node)
        elif node.op == "call_method":  # `item`
            return self.copies[node.all_input_nodes[0]]
        else:
            given = [self._operand(argument, is_float) for argument in node.args]
            made = self.graph.call_function(OF_NUMBERS[node.target], tuple(given))
            made.meta = dict(node.meta)
        made.meta["example_value"] = torch.zeros((), dtype=torch.float64 if is_float else torch.int64)
        return made

    def _operand(self, argument: Any, is_float: bool) -> Any:
        """An operand of what makes a number: Python's quotient of two ints has all digits, a tensor's has seven."""
        if not isinstance(argument, fx.Node):
            return argument
        copy = self.copies[argument]
        if argument not in self.kept or not is_float or copy.meta["example_value"].dtype == torch.float64:
            return copy
        return self._cast(copy, torch.float64)

    def _of_tensors(self, node: fx.Node) -> fx.Node:
        """What makes a tensor of numbers, or of tensors and numbers, or writes them to one."""
        expected = node.meta.get("example_value")
        if node.target in MADE:
            assert isinstance(expected, torch.Tensor)
            how: dict[str, Any] = {"dtype": expected.dtype, "device": expected.device, "copy": True}
            made = self.graph.call_method("to", (self.copies[node.all_input_nodes[0]],), how)
            made.meta = dict(node.meta)
            return made
        if node.target in FILLED:
            return self._filled(node, FILLED[node.target])
        made = self.graph.node_copy(node, self.copies.__getitem__)
        if node.target in IN_PLACE:
            return made
        assert isinstance(expected, torch.Tensor)
        found = self._value(made)
        if found.dtype == expected.dtype:
            return made
        made.meta["example_value"] = found
        cast = self._cast(made, expected.dtype)
        cast.meta = dict(node.meta)
        return cast

    def _filled(self, node: fx.Node, place: int) -> fx.Node:
        number = self.copies[node.args[place]]  # type: ignore[index]
        nothing = 0.0 if number.meta["example_value"].is_floating_point() else 0
        made = self.graph.node_copy(node, self.copies.__getitem__)
        made.update_arg(place, nothing)
        filled = self.graph.call_method("fill_", (made, number))
        filled.meta = dict(node.meta)
        return filled

    def _cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        cast = self.graph.call_method("to", (node, dtype))
        cast.meta = {**node.meta, "example_value": node.meta["example_value"].to(dtype)}
        return cast

    def _value(self, node: fx.Node) -> torch.Tensor:
        """What a node makes of the example values of its operands."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["example_value"])
        if node.op == "call_method":
            made = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            made = node.target(*args, **kwargs)  # type: ignore[operator]
        assert isinstance(made, torch.Tensor)
        return made
