"""Finds attention: nodes of `scaled_dot_product_attention` and what each of their operands is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paracompile.layout.factors import Operand
from paracompile.layout.graph import Operation
from paracompile.layout.places import Attention
from paracompile.patterns.flops import flops

aten = torch.ops.aten


def find_attentions(operations: Sequence[Operation]) -> list[Attention]:
    """Every attention in the graph, in order."""
    return [
        attention
        for operation in operations
        if operation.node.target is aten.scaled_dot_product_attention.default
        and (attention := _attention(operation)) is not None
    ]


def _attention(operation: Operation) -> Attention | None:
    if operation.op is None:
        return None
    arguments = operation.op.arguments
    query, key, value, mask = (_index(arguments[name]) for name in ("query", "key", "value", "attn_mask"))
    if query is None or key is None or value is None:
        return None
    return Attention(operation, query, key, value, mask, bool(arguments["is_causal"]), flops(operation.op))


def _index(argument: object) -> int | None:
    return argument.index if isinstance(argument, Operand) else None
