"""Writes ATen nodes into a graph, each with the fake tensor that says what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.fx.node import map_aggregate

from paracompile.layout.sizes import sizes_in, symbols_in
from paracompile.passes.evaluation import evaluating
from paracompile.patterns.regions import look_of
from paracompile.torch_private import FakeTensorMode, set_source, source_of, tree_leaves

__all__ = ["PROVENANCE", "GraphWriter", "as_float", "in_type"]

PROVENANCE = ("stack_trace", "nn_module_stack", "source_fn_stack", "cache_part")
"""What a node that is written in another's place takes over of its `meta`."""


class GraphWriter:
    """Appends nodes to `graph`, evaluated on fake tensors as they are written.

    attributes:
        graph: what is written.
        origin: the node of the captured graph that is being rewritten: new nodes say that they come from there.
    """

    def __init__(self, fake_mode: FakeTensorMode, graph: fx.Graph | None = None) -> None:
        """Writes into `graph` at its insertion point; into a new graph if there is none."""
        self.graph = fx.Graph() if graph is None else graph
        self.origin: fx.Node | None = None
        self._fake_mode = fake_mode
        self._known: dict[str, Any] = {}

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Appends `target(*args, **kwargs)`; nodes among the arguments stand for their values."""
        args, kwargs = sizes_in((args, kwargs))
        node = self.graph.call_function(target, args, kwargs)
        node.meta["val"] = self._evaluate(target, *fx.map_arg((args, kwargs), lambda argument: argument.meta["val"]))
        self._mark(node)
        return node

    def _evaluate(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What `target` makes of fake tensors; of equal blocks it is computed once.

        A size that only the data tells is a new symbol each time.
        """
        autocast = [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
        key = repr((str(target), autocast, map_aggregate((args, kwargs), _look)))
        if key in self._known:
            return self._known[key]
        with evaluating(self._fake_mode):
            made = target(*symbols_in(args), **symbols_in(kwargs))
        if all(isinstance(value, torch.Tensor) and not free_unbacked_symbols(value) for value in tree_leaves(made)):
            self._known[key] = made
        return made

    def copy(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> fx.Node:
        """Appends a node as it stands in another graph, with other arguments of the same shapes."""
        copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
        copied.meta = dict(node.meta)
        if node.op == "placeholder":
            set_source(copied, source_of(node))
        return copied

    def _mark(self, node: fx.Node) -> None:
        if self.origin is not None:
            node.meta.update({key: self.origin.meta[key] for key in PROVENANCE if key in self.origin.meta})


def _look(argument: Any) -> Any:
    return look_of(argument) if isinstance(argument, torch.Tensor) else argument


def as_float(write: GraphWriter, value: fx.Node, device: torch.device | None = None) -> fx.Node:
    """The value in float32, on another device if one is given; the host does not wait for the copy."""
    copy, made = torch.ops.aten._to_copy.default, value.meta["val"]
    if device is not None and device != made.device:
        return write(copy, value, dtype=torch.float32, device=device, non_blocking=True)
    return in_type(write, value, torch.float32)


def in_type(write: GraphWriter, value: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The value in this type."""
    return value if value.meta["val"].dtype is dtype else write(torch.ops.aten._to_copy.default, value, dtype=dtype)
