"""Replaces masks that only hide keys by attention to the visible keys, without a mask.

    before                                               after
    m: b8[batch, 1, 1, keys]                             order, windows = visible_keys(m)        (once)
    o = attention(q, k, v, attn_mask=m)                  o = attention_to_visible(q, k, v, order, windows)

Only boolean masks that hide the same keys from all heads and all queries of a row (their shape says so) are replaced:
what such a mask hides takes no part at all. Masks that are computed alike (some models build theirs anew in each block)
are one mask. Runs after sharding, where masks lie in the order in which keys arrive, and each step of a ring has one
for its keys.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import fx
from torch._guards import detect_fake_mode

import paracompile.runtime.visible  # noqa: F401  (registers the operators)
from paracompile.layout.graph import is_tensor, named_arguments
from paracompile.passes.found import Found
from paracompile.passes.writer import GraphWriter

aten = torch.ops.aten
ours = torch.ops.paracompile

_TO_VISIBLE = {
    # attention: what takes its place, the name of its mask, its other arguments
    aten.scaled_dot_product_attention.default: (
        ours.attention_to_visible.default,
        "attn_mask",
        ("scale", "enable_gqa"),
    ),
    ours.attention_with_lse.default: (ours.attention_with_lse_to_visible.default, "mask", ("scale",)),
}


def drop_masked_keys(gm: fx.GraphModule, example_inputs: Sequence[Any], *, found: Found) -> fx.GraphModule:
    """Rewrites every attention with such a mask, in place; a graph without one is left as it is."""
    masked = [node for node in gm.graph.nodes if hides_keys_only(node)]
    found.masks_dropped = len(masked)
    if not masked:
        return gm
    fake_mode = detect_fake_mode([node.meta["val"] for node in gm.graph.nodes if is_tensor(node)])
    assert fake_mode is not None
    first_alike = _first_alike(gm.graph)
    visible: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in masked:
        arguments = named_arguments(node)
        replacement, its_mask, others = _TO_VISIBLE[node.target]
        mask = first_alike[arguments[its_mask]]
        write = GraphWriter(fake_mode, gm.graph)
        write.origin = node
        if mask not in visible:
            visible[mask] = _visible(write, mask)
        with gm.graph.inserting_before(node):
            operands = [_as_computed(write, arguments[name], node) for name in ("query", "key", "value")]
            attended = write(replacement, *operands, *visible[mask], *(arguments[name] for name in others))
        node.replace_all_uses_with(attended)
        gm.graph.erase_node(node)
        _erase_unused(arguments[its_mask])
    gm.graph.lint()
    gm.recompile()
    return gm


def hides_keys_only(node: fx.Node) -> bool:
    """Whether `node` is an attention whose mask hides the same keys from all heads and queries of a row."""
    if node.target not in _TO_VISIBLE:
        return False
    arguments = named_arguments(node)
    mask = arguments[_TO_VISIBLE[node.target][1]]
    if not _is_node(mask) or any(arguments.get(name) for name in ("is_causal", "dropout_p", "offset")):
        return False
    values = mask.meta["val"]
    query, key, value = (arguments[name].meta["val"].shape for name in ("query", "key", "value"))
    return bool(
        values.dtype is torch.bool
        and len(query) == values.dim() == 4
        and values.shape[0] in (1, query[0])
        and tuple(values.shape[1:]) == (1, 1, key[2])  # not one column for all keys
        and query[0] == key[0] == value[0]
        and tuple(_result(node).shape) == (*query[:3], value[3])  # nothing else is broadcast
    )


def _result(attention: fx.Node) -> torch.Tensor:
    """What an attention gives, without the LSE."""
    made = attention.meta["val"]
    return cast(torch.Tensor, made[0] if isinstance(made, tuple | list) else made)


def _is_node(argument: Any) -> TypeGuard[fx.Node]:
    return isinstance(argument, fx.Node)


def _first_alike(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """For each node the first one of the graph that computes the same: the same ATen operator of the same arguments."""
    first: dict[fx.Node, fx.Node] = {}
    known: dict[tuple[object, ...], fx.Node] = {}
    for node in graph.nodes:
        first[node] = node
        if _is_pure(node):
            args, kwargs = fx.map_arg((node.args, node.kwargs), first.__getitem__)
            made = node.meta.get("val")
            dtype = made.dtype if isinstance(made, torch.Tensor) else None  # autocast makes it differ
            first[node] = known.setdefault((node.target, repr(args), repr(kwargs), dtype), node)
    return first


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    return (
        isinstance(target, torch._ops.OpOverload)
        and target.namespace == "aten"
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
    )


def _erase_unused(node: fx.Node) -> None:
    """Erases a node that nobody uses any more, and what only it used."""
    if node.users or not _is_pure(node):
        return
    used = node.all_input_nodes
    node.graph.erase_node(node)
    for other in used:
        _erase_unused(other)


def _as_computed(write: GraphWriter, operand: fx.Node, attention: fx.Node) -> fx.Node:
    """`operand` in the type in which `attention` computes, which autocast may have chosen."""
    dtype = _result(attention).dtype
    if operand.meta["val"].dtype is dtype:
        return operand
    return write(aten._to_copy.default, operand, dtype=dtype)


def _visible(write: GraphWriter, mask: fx.Node) -> tuple[fx.Node, fx.Node]:
    """`visible_keys` of a mask of shape (batch or 1, 1, 1, keys), written in order behind it."""
    shape = mask.meta["val"].shape
    inputs = write.graph.find_nodes(op="placeholder")
    with write.graph.inserting_after(inputs[-1] if mask in inputs else mask):
        flat = write(aten.reshape.default, mask, [shape[0], shape[3]])
    with write.graph.inserting_after(flat):
        found = write(torch.ops.paracompile.visible_keys.default, flat)
    with write.graph.inserting_after(found):
        order = write(operator.getitem, found, 0)
    with write.graph.inserting_after(order):
        windows = write(operator.getitem, found, 1)
    return order, windows
