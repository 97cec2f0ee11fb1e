"""Spells operators on tensor subclasses so that the subclass is asked.

    before                                               after
    aten.linear.default(x, quantised weight)             torch.nn.functional.linear(x, quantised weight)

A weight quantised by torchao answers `torch.nn.functional.linear`; the ATen operator would be decomposed first, into
operators that it does not know. From here on the graph is not all ATen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from paracompile.passes.first_block_cache import COND
from paracompile.torch_private import is_traceable_wrapper_subclass

__all__ = ["dispatch_on_subclasses"]


def dispatch_on_subclasses(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Respells `linear` on subclasses among the graph's inputs, in branches as well. In place."""
    inputs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)  # inputs of our own come last
    special = {node for node, value in inputs if is_traceable_wrapper_subclass(value)}
    _respell(gm, special)
    for conditional in gm.graph.find_nodes(op="call_function", target=COND):
        _, *branches, operands = conditional.args
        for name in branches:
            branch = gm.get_submodule(name.target)
            assert isinstance(branch, fx.GraphModule)
            inner = zip(operands, branch.graph.find_nodes(op="placeholder"), strict=True)
            _respell(branch, {node for operand, node in inner if operand in special})
    return gm


def _respell(gm: fx.GraphModule, special: set[fx.Node]) -> None:
    linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    asking = [node for node in linears if special & set(node.all_input_nodes)]
    for node in asking:
        node.target = torch.nn.functional.linear
    if asking:
        gm.recompile()
