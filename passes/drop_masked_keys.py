"""Replaces masks that only hide keys by attention to the visible keys, without a mask.

    before                                               after
    m: b8[batch, 1, 1, keys]                             order, windows = visible_keys(m)        (once)
    o = attention(q, k, v, attn_mask=m)                  o = attention_to_visible(q, k, v, order, windows)

Only boolean masks that hide the same keys from all heads and all queries of a row (their shape says so) are replaced:
what such a mask hides takes no part at all. Runs after sharding, where masks lie in the order in which keys arrive; a
ring's steps keep their masks.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
from torch import fx
from torch._guards import detect_fake_mode

import paracompile.runtime.visible  # noqa: F401  (registers the operators)
from paracompile.layout.graph import is_tensor, named_arguments
from paracompile.passes.writer import GraphWriter

aten = torch.ops.aten


def drop_masked_keys(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Rewrites every attention with such a mask, in place; a graph without one is left as it is."""
    found = [node for node in gm.graph.nodes if hides_keys_only(node)]
    if not found:
        return gm
    fake_mode = detect_fake_mode([node.meta["val"] for node in gm.graph.nodes if is_tensor(node)])
    assert fake_mode is not None
    visible: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in found:
        arguments = named_arguments(node)
        mask = arguments["attn_mask"]
        write = GraphWriter(fake_mode, gm.graph)
        write.origin = node
        if mask not in visible:
            visible[mask] = _visible(write, mask)
        with gm.graph.inserting_before(node):
            attended = write(
                torch.ops.paracompile.attention_to_visible.default,
                *(arguments[name] for name in ("query", "key", "value")),
                *visible[mask],
                arguments["scale"],
                arguments["enable_gqa"],
            )
        node.replace_all_uses_with(attended)
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return gm


def hides_keys_only(node: fx.Node) -> bool:
    """Whether `node` is an attention whose mask hides the same keys from all heads and queries of a row."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    arguments = named_arguments(node)
    query, mask = arguments["query"], arguments["attn_mask"]
    if not _is_node(query) or not _is_node(mask) or arguments["is_causal"] or arguments["dropout_p"]:
        return False
    values, rows = mask.meta["val"], query.meta["val"].shape
    return bool(
        values.dtype is torch.bool
        and len(rows) == values.dim() == 4
        and values.shape[1] == values.shape[2] == 1
        and values.shape[0] in (1, rows[0])
        and arguments["key"].meta["val"].shape[0] == rows[0]
    )


def attends_to_visible(gm: fx.GraphModule) -> bool:
    """Whether the graph has an attention that was replaced."""
    return any(node.target is torch.ops.paracompile.attention_to_visible.default for node in gm.graph.nodes)


def _is_node(argument: Any) -> TypeGuard[fx.Node]:
    return isinstance(argument, fx.Node)


def _visible(write: GraphWriter, mask: fx.Node) -> tuple[fx.Node, fx.Node]:
    """`visible_keys` of a mask of shape (batch or 1, 1, 1, keys), written in order behind it."""
    shape = mask.meta["val"].shape
    with write.graph.inserting_after(mask):
        flat = write(aten.reshape.default, mask, [shape[0], shape[3]])
    with write.graph.inserting_after(flat):
        found = write(torch.ops.paracompile.visible_keys.default, flat)
    with write.graph.inserting_after(found):
        order = write(operator.getitem, found, 0)
    with write.graph.inserting_after(order):
        windows = write(operator.getitem, found, 1)
    return order, windows
