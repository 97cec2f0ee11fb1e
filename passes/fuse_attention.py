"""Makes one operator of attention that a model writes out, which is then cut, exchanged and computed as any other.

    before                                          after
    s = matmul(q, k.transpose(-1, -2)) / 8 + m      o = scaled_dot_product_attention(q, k, v, m, scale=1 / 8)
    o = matmul(softmax(s, -1), v)

So scores are not kept in memory either. Weights that someone else reads, too, stay as they are, as does what drops some
of them at random (`paracompile.patterns.written_out` says what is found).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from paracompile.passes.found import Found
from paracompile.passes.writer import GraphWriter
from paracompile.patterns.written_out import Term, WrittenOut, find_written_out

__all__ = ["fuse_attention"]

aten = torch.ops.aten


def fuse_attention(gm: fx.GraphModule, example_inputs: Sequence[Any], *, found: Found) -> fx.GraphModule:
    """Fuses every attention that is written out, in place; a graph without one is left as it is."""
    for attention in find_written_out(gm.graph):  # one at a time: a later one may read what an earlier one made
        node = attention.result.node
        write = GraphWriter(node.meta["val"].fake_mode, gm.graph)
        write.origin = node
        with gm.graph.inserting_before(node):
            node.replace_all_uses_with(_fused(write, attention))
        found.fused += 1
    if not found.fused:
        return gm
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    return gm


def _fused(write: GraphWriter, attention: WrittenOut) -> fx.Node:
    """Writes the attention, and gives its result as the last product did."""
    batch, queries, keys = attention.batch, attention.queries, attention.keys
    missing = max(0, 2 - len(batch))  # kernels want rows and heads
    operands = [
        _leading(write, _ordered(write, term, letters), missing)
        for term, letters in (
            (attention.query, batch + queries + attention.channels),
            (attention.key, batch + keys + attention.channels),
            (attention.value, batch + keys + attention.features),
        )
    ]
    mask = _mask(write, attention)
    if mask is not None:
        mask = _leading(write, mask, len(batch) + missing + 2 - mask.meta["val"].dim())
    attended = write(aten.scaled_dot_product_attention.default, *operands, mask, scale=attention.scale)
    for _ in range(missing):
        attended = write(aten.squeeze.dim, attended, 0)
    result = attention.result.letters
    return _ordered(write, Term(attended, batch + queries + attention.features), result)


def _ordered(write: GraphWriter, term: Term, letters: str) -> fx.Node:
    """The operand with its dimensions in another order."""
    if term.letters == letters:
        return term.node
    return write(aten.permute.default, term.node, [term.letters.index(letter) for letter in letters])


def _leading(write: GraphWriter, node: fx.Node, count: int) -> fx.Node:
    """With `count` dimensions of one in front."""
    for _ in range(count):
        node = write(aten.unsqueeze.default, node, 0)
    return node


def _mask(write: GraphWriter, attention: WrittenOut) -> fx.Node | None:
    """What attention takes as its mask: boolean (True: sees) where keys are only hidden, else what scores are added."""
    added: fx.Node | None = None
    for node in attention.added:
        added = node if added is None else write(aten.add.Tensor, added, node)
    if added is None and attention.filled and all(number == -math.inf for _, number, _ in attention.filled):
        return _all_of(write, [_sees(write, mask, inverted) for mask, _, inverted in attention.filled])
    for mask, number, inverted in attention.filled:
        sees = _sees(write, mask, inverted)
        if added is None:
            query = attention.query.node.meta["val"]
            added = write(aten.full.default, [], 0.0, dtype=query.dtype, device=query.device, pin_memory=False)
        added = write(aten.where.ScalarOther, sees, added, number)
    return added


def _sees(write: GraphWriter, mask: fx.Node, inverted: bool) -> fx.Node:
    return mask if inverted else write(aten.logical_not.default, mask)


def _all_of(write: GraphWriter, masks: Sequence[fx.Node]) -> fx.Node:
    whole = masks[0]
    for mask in masks[1:]:
        whole = write(aten.logical_and.default, whole, mask)
    return whole
