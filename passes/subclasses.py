"""Spells operators on tensor subclasses so that the subclass is asked.

    before                                               after
    aten.linear.default(x, quantised weight)             torch.nn.functional.linear(x, quantised weight)

A weight quantised by torchao answers `torch.nn.functional.linear`; the ATen operator would be decomposed first, into
operators that it does not know. Comes last: from here on the graph is no longer all ATen.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def dispatch_on_subclasses(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Respells `linear` on subclasses among the graph's inputs, in place."""
    inputs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)
    special = {node for node, value in inputs if is_traceable_wrapper_subclass(value)}
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        if special & set(node.all_input_nodes):
            node.target = torch.nn.functional.linear
    gm.recompile()
    return gm
