"""Turns attention on a selection of tokens, whose length only the data tells, into masked attention of a static length.

    before, for each row of a batch                      after, for the whole batch
    valid = nonzero(mask[b])                             [length n, unknown until it runs]
    q = cat([image_q[b:b+1], text_q[b:b+1, :, valid]])   q = cat([image_q, text_q])        (k and v alike)
    o = attention(q, k, v)                               o = attention(q, k, v, mask=[image: True, text: mask])
    pad(o, total - len(q))                               text rows of o: selected ones first, then zeros
    cat(rows)

Hidden keys weigh nothing, and what hidden queries would see is dropped, so the result is the same; and every length is
a number again, which sharding needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from paracompile.layout.graph import is_tensor, named_arguments
from paracompile.passes.writer import GraphWriter
from paracompile.torch_private import detect_fake_mode

aten = torch.ops.aten


@dataclass(frozen=True)
class Joined:
    """A sequence of all tokens of one value, then a selection of another's: `cat([always, part[:, :, valid]], 2)`."""

    always: fx.Node
    part: fx.Node
    mask: fx.Node

    def whole(self, number: int, count: int) -> tuple[fx.Node, fx.Node] | None:
        """What `always` and `part` are row `number` of, in a batch of `count`; None if they are no such rows."""
        always, part = (_whole(node, number, count) for node in (self.always, self.part))
        return None if always is None or part is None else (always, part)


@dataclass(frozen=True)
class Row:
    """One padded attention on joined selections."""

    attention: fx.Node
    query: Joined
    key: Joined
    value: Joined

    def settings(self) -> tuple[Any, Any]:
        arguments = named_arguments(self.attention)
        return arguments["scale"], arguments["enable_gqa"]

    def whole(self, number: int, count: int) -> list[tuple[fx.Node, fx.Node] | None]:
        """Of query, key and value, what this is row `number` of."""
        return [joined.whole(number, count) for joined in (self.query, self.key, self.value)]


def static_lengths(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Rewrites every such attention in `gm`, in place; a graph without one is left as it is."""
    joins = [(node, rows) for node in gm.graph.nodes if (rows := find_rows(node)) is not None]
    if not joins:
        return gm
    fake_mode = detect_fake_mode([node.meta["val"] for node in gm.graph.nodes if is_tensor(node)])
    assert fake_mode is not None
    for node, rows in joins:
        with gm.graph.inserting_before(node):
            write = GraphWriter(fake_mode, gm.graph)
            write.origin = rows[0].attention
            node.replace_all_uses_with(_attend(write, rows))
    for node in reversed(gm.graph.nodes):
        if node.target is aten._assert_scalar.default:
            gm.graph.erase_node(node)  # bounds of lengths that are gone
    # Attention counts as random, for its dropout, and so would not be dropped.
    gm.graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure(impure_random=False))
    gm.graph.lint()
    gm.recompile()
    return gm


def find_rows(node: fx.Node) -> list[Row] | None:
    """The rows that `node` joins into a batch, if it is such a node."""
    if node.target is not aten.cat.default or named_arguments(node)["dim"] != 0:
        return None
    rows = [_row(part) for part in node.args[0]]  # type: ignore[union-attr]
    found = [row for row in rows if row is not None]
    if not found or len(found) != len(rows):
        return None
    sources = [row.whole(number, len(rows)) for number, row in enumerate(found)]
    of_one_batch = None not in sources[0] and all(other == sources[0] for other in sources)
    return found if of_one_batch and len({row.settings() for row in found}) == 1 else None


def _row(node: Any) -> Row | None:
    """`pad(attention(q, k, v), [0, 0, 0, total - length])`."""
    if not isinstance(node, fx.Node) or node.target is not aten.pad.default:
        return None
    padded = named_arguments(node)
    attention, padding = padded["self"], padded["pad"]
    if padded["mode"] != "constant" or padded["value"]:
        return None
    if not isinstance(attention, fx.Node) or attention.target is not aten.scaled_dot_product_attention.default:
        return None
    arguments = named_arguments(attention)
    joined = [_joined(arguments[name]) for name in ("query", "key", "value")]
    query, key, value = joined
    if query is None or key is None or value is None or len({part.mask for part in (query, key, value)}) > 1:
        return None
    if arguments["attn_mask"] is not None or arguments["is_causal"] or arguments["dropout_p"]:
        return None
    if len(attention.users) > 1:
        return None
    total = query.always.meta["val"].shape[2] + query.part.meta["val"].shape[2]
    fills_up = isinstance(padding, (list, tuple)) and list(padding[:3]) == [0, 0, 0] and len(padding) == 4
    if not fills_up or not statically_known_true(node.meta["val"].shape[2] == total):
        return None
    return Row(attention, query, key, value)


def _joined(node: Any) -> Joined | None:
    if not isinstance(node, fx.Node) or node.target is not aten.cat.default:
        return None
    parts, dim = node.args[0], named_arguments(node)["dim"]
    if not isinstance(parts, (list, tuple)) or len(parts) != 2 or dim not in (2, -2):
        return None
    always, selected = parts
    if not isinstance(always, fx.Node) or not isinstance(selected, fx.Node):
        return None
    if selected.target is not aten.index.Tensor or len(always.meta["val"].shape) != 4:
        return None
    part, indices = selected.args
    if not isinstance(part, fx.Node) or not isinstance(indices, (list, tuple)):
        return None
    if len(indices) != 3 or indices[0] is not None or indices[1] is not None:
        return None
    mask = _selected_by(indices[2])
    if mask is None or not statically_known_true(mask.meta["val"].shape[0] == part.meta["val"].shape[2]):
        return None
    return Joined(always, part, mask)


def _selected_by(node: Any) -> fx.Node | None:
    """The boolean vector whose true positions `node` lists, in order."""
    while isinstance(node, fx.Node) and node.target in (aten.reshape.default, aten.flatten.using_ints):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not aten.nonzero.default:
        return None
    mask = node.args[0]
    vector = isinstance(mask, fx.Node) and mask.meta["val"].dim() == 1
    return mask if vector else None  # type: ignore[return-value]


def _whole(node: fx.Node, number: int, count: int) -> fx.Node | None:
    """What `node` is row `number` of, in a batch of `count`."""
    if count == 1:
        return node if node.meta["val"].shape[0] == 1 else None
    if node.target is not aten.slice.Tensor:
        return None
    arguments = named_arguments(node)
    source: fx.Node = arguments["self"]
    window = (arguments["dim"], arguments["start"] or 0, arguments["end"], arguments["step"])
    is_row = source.meta["val"].shape[0] == count and window == (0, number, number + 1, 1)
    return source if is_row else None


def _attend(write: GraphWriter, rows: Sequence[Row]) -> fx.Node:
    first, count = rows[0], len(rows)
    wholes = [joined for joined in first.whole(0, count) if joined is not None]
    (always, part), (keys, _), _ = ([node.meta["val"].shape[2] for node in whole] for whole in wholes)
    masks = [row.query.mask for row in rows]
    mask = write(aten.ne.Scalar, write(aten.stack.default, masks), 0)
    everywhere = write(
        aten.ones.default, [count, keys], dtype=torch.bool, device=mask.meta["val"].device, pin_memory=False
    )
    seen = write(aten.cat.default, [everywhere, mask], 1)
    seen = write(aten.unsqueeze.default, write(aten.unsqueeze.default, seen, 1), 1)
    joined = [write(aten.cat.default, list(whole), 2) for whole in wholes]
    scale, enable_gqa = first.settings()
    attended = write(
        aten.scaled_dot_product_attention.default,
        *joined,
        seen,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    head = write(aten.slice.Tensor, attended, 2, 0, always)
    tail = write(aten.slice.Tensor, attended, 2, always, always + part)
    return write(aten.cat.default, [head, _selected_first(write, tail, mask)], 2)


def _selected_first(write: GraphWriter, tail: fx.Node, mask: fx.Node) -> fx.Node:
    """Each row's selected tokens of `tail` (batch, heads, tokens, size) in order, then zeros."""
    count, part = mask.meta["val"].shape
    hidden = write(aten.logical_not.default, mask)
    order = write(aten.argsort.stable, hidden, stable=True, dim=1)
    order = write(aten.reshape.default, order, [count, 1, part, 1])
    order = write(aten.expand.default, order, list(tail.meta["val"].shape))
    moved = write(aten.gather.default, tail, 2, order)
    selected = write(aten.sum.dim_IntList, mask, [1], True)
    position = write(aten.arange.default, part, device=mask.meta["val"].device, pin_memory=False)
    empty = write(aten.ge.Tensor, position, selected)
    empty = write(aten.reshape.default, empty, [count, 1, part, 1])
    return write(aten.masked_fill.Scalar, moved, empty, 0.0)
