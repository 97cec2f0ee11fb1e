"""Turns attention whose queries and keys are both tokens of many ranks into attention over the tokens of all of them.

    before                                                          after
    o = scaled_dot_product_attention(q, k, v, mask)                 o = unified_attention(q, k, v, mask)

On one process both are the same. What a rank computes and sends for it is written when the graph is lowered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from paracompile.errors import GraphError
from paracompile.passes.split_and_gather import neighbours_of
from paracompile.runtime.placement import UNIFIED_ATTENTION


def unified_attention(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Replaces every attention that exchanges tokens, in place; attention along its queries alone stays as it is.

    raises:
        GraphError: another operator whose rule (`register_rule`) exchanges.
    """
    for node in gm.graph.nodes:
        if any(factor.exchanges for factor in neighbours_of(node).values()):
            if node.target is not torch.ops.aten.scaled_dot_product_attention.default:
                remedy = "leave `exchanges` out of its rule: its operands are then gathered"
                raise GraphError(node, "its rule exchanges operands, which attention alone can", remedy)
            node.target = UNIFIED_ATTENTION
    gm.recompile()
    return gm
