"""Writes the calculation of open sizes into a graph: nodes that follow from the graph's symbols."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import sympy
from torch import fx
from torch.fx.node import map_aggregate
from torch.fx.proxy import GraphAppendingTracer

from paracompile.layout.sizes import Size, evaluate, formula_of, is_symbol, numbers_in

__all__ = ["Formulas", "fix_sizes", "symbols_of"]


class Formulas:
    """The sizes of one graph, each written once, where it is needed first."""

    def __init__(self, graph: fx.Graph, symbols: Mapping[sympy.Symbol, fx.Node]) -> None:
        """
        args:
            symbols: by symbol, the node in the graph that gives its value.
        """
        tracer = GraphAppendingTracer(graph)
        self._symbols = {symbol: fx.Proxy(node, tracer) for symbol, node in symbols.items()}
        self._written: dict[Any, Any] = {}

    def written(self, arguments: Any) -> Any:
        """The arguments of a node, with other nodes in the place of sizes."""
        return map_aggregate(arguments, self._size)

    def _size(self, argument: Any) -> Any:
        if not isinstance(argument, Size):
            return argument
        key = formula_of(argument)
        if key not in self._written:
            made = evaluate(argument, self._symbols)
            if isinstance(made, fx.Proxy):
                made.node.meta["val"] = argument.formula
            self._written[key] = made.node if isinstance(made, fx.Proxy) else made
        return self._written[key]


def symbols_of(inputs: Iterable[fx.Node], key: str) -> dict[sympy.Symbol, fx.Node]:
    """The inputs that give symbols their values; what stands for an input has this key in its `meta`."""
    return {value.node.expr: node for node in inputs if is_symbol(value := node.meta.get(key))}


def fix_sizes(gm: fx.GraphModule) -> bool:
    """Fixes all open sizes of a graph by guards, in place: it serves one set of sizes. Whether any was open."""
    symbols = symbols_of(gm.graph.find_nodes(op="placeholder"), "val")
    for node in symbols.values():
        int(node.meta["val"])
    for node in gm.graph.nodes if symbols else ():
        node.args, node.kwargs = numbers_in((node.args, node.kwargs))
    return bool(symbols)
