"""Replaces masks that only hide keys by attention to the visible keys, without a mask.

    before                                               after
    m: b8[batch, 1, 1, keys]                             order, windows = visible_keys(m, [keys])   (once)
    o = attention(q, k, v, attn_mask=m)                  o = attention_to_visible(q, k, v, order, windows[0])

Only boolean masks that hide the same keys from all heads and all queries of a row (their shape says so) are replaced:
what such a mask hides takes no part at all. Masks that are computed alike (some models build theirs anew in each block)
are one mask. Runs after sharding, where masks lie in the order in which keys arrive; each step of a ring takes a part
of one.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeGuard, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

import paracompile.runtime.visible  # noqa: F401  (registers the operators)
from paracompile.layout.graph import is_tensor, named_arguments
from paracompile.layout.sizes import sizes_of
from paracompile.passes.found import Found
from paracompile.passes.writer import GraphWriter, in_type
from paracompile.torch_private import OpOverload, detect_fake_mode, schema_of

aten = torch.ops.aten
ours = torch.ops.paracompile

_TO_VISIBLE: dict[Any, tuple[Any, str, tuple[str, ...]]] = {
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
    part_of = _parts({node: first_alike[_mask(node)] for node in masked}, first_alike)
    visible: dict[_Part, tuple[fx.Node, fx.Node]] = {}
    for node in masked:
        arguments = named_arguments(node)
        replacement, _, others = _TO_VISIBLE[node.target]
        part = part_of[node]
        write = GraphWriter(fake_mode, gm.graph)
        write.origin = node
        if part not in visible:
            visible |= _visible(write, part.of, sorted({each for each in part_of.values() if each.of is part.of}))
        with gm.graph.inserting_before(node):
            # Autocast may have chosen the type in which it computes.
            dtype = _result(node).dtype
            operands = [in_type(write, arguments[name], dtype) for name in ("query", "key", "value")]
            attended = write(replacement, *operands, *visible[part], *(arguments[name] for name in others))
        node.replace_all_uses_with(attended)
        mask = _mask(node)
        gm.graph.erase_node(node)
        _erase_unused(mask)
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
    query, key, value = (sizes_of(arguments[name].meta["val"]) for name in ("query", "key", "value"))
    return bool(
        values.dtype is torch.bool
        and not free_unbacked_symbols(values)
        and len(query) == values.dim() == 4
        and values.shape[0] in (1, query[0])
        and tuple(values.shape[1:]) == (1, 1, key[2])  # not one column for all keys
        and query[0] == key[0] == value[0]
        and tuple(_result(node).shape) == (*query[:3], value[3])  # nothing else is broadcast
    )


def _mask(attention: fx.Node) -> fx.Node:
    return cast(fx.Node, named_arguments(attention)[_TO_VISIBLE[attention.target][1]])


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
        isinstance(target, OpOverload)
        and target.namespace == "aten"
        and not schema_of(target).is_mutable
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


class _Part(NamedTuple):
    """Some columns of a mask."""

    start: int
    stop: int
    of: fx.Node


def _parts(masks: Mapping[fx.Node, fx.Node], first_alike: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, _Part]:
    """What the mask of each attention is a part of, where such parts make up a whole, as those of a ring's steps do."""
    parts = {}
    for node, mask in masks.items():
        parts[node] = _Part(0, sizes_of(mask.meta["val"])[-1], mask)
        if mask.target is aten.slice.Tensor and mask.args[1] in (-1, 3) and len(mask.args) == 4:
            whole, _, start, stop = mask.args
            parts[node] = _Part(cast(int, start), cast(int, stop), first_alike[cast(fx.Node, whole)])
    for whole in {part.of for part in parts.values()}:
        edges = sorted({part[:2] for part in parts.values() if part.of is whole})
        length = sizes_of(whole.meta["val"])[-1]
        starts, stops = [0, *(stop for _, stop in edges)], [*(start for start, _ in edges), length]
        if starts != stops:
            own = {node: mask for node, mask in masks.items() if parts[node].of is whole}
            parts |= {node: _Part(0, sizes_of(mask.meta["val"])[-1], mask) for node, mask in own.items()}
    return parts


def _visible(write: GraphWriter, mask: fx.Node, parts: Sequence[_Part]) -> dict[_Part, tuple[fx.Node, fx.Node]]:
    """`visible_keys` of parts of a mask of shape (batch or 1, 1, 1, keys), written in order behind it."""
    shape = sizes_of(mask.meta["val"])
    inputs = write.graph.find_nodes(op="placeholder")
    with write.graph.inserting_after(inputs[-1] if mask in inputs else mask):
        last = write(aten.reshape.default, mask, [shape[0], shape[3]])

    def behind(target: Any, *arguments: Any) -> fx.Node:
        nonlocal last
        with write.graph.inserting_after(last):
            last = write(target, *arguments)
        return last

    look = behind(ours.visible_keys.default, last, [part.stop - part.start for part in parts])
    order, windows = (behind(operator.getitem, look, place) for place in (0, 1))
    return {
        part: (
            behind(aten.slice.Tensor, order, 1, part.start, part.stop) if len(parts) > 1 else order,
            behind(aten.select.int, windows, 0, number),
        )
        for number, part in enumerate(parts)
    }
