"""Orders nodes so that every collective starts as early and is awaited as late as the data allows.

    before                                   after
    q, k, v = linear(x) ...                  v = linear(x);      v* = all_to_all(v)
    q, k = rope(norm(q)), rope(norm(k))      k = rope(norm(linear(x))); k* = all_to_all(k)     } under v*
    v* = all_to_all(v); wait(v*)             q = rope(norm(linear(x))); q* = all_to_all(q)     } under k*
    ...                                      wait(v*); wait(k*); wait(q*)
    o = attention(...)                       o = attention(...); o* = all_to_all(o)
    o* = all_to_all(o); wait(o*)             m = mlp(x)                                        } under o*
    m = mlp(x)                               wait(o*)

In a ring the attention on the present keys is an anchor as well, so that it runs before the wait for the next ones.

Starts keep their order, which is the order in which they were written (v, k, q): every rank runs the same collectives
in the same order. Before each start comes what it needs and has not been computed, first what depends on no pending
wait. Inductor keeps this order, and its own reordering passes move what they can besides.

Nothing moves across the edges of an autocast region, a conditional, or a node that writes to its operand. The branches
of a conditional are ordered likewise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

import paracompile.runtime.visible  # noqa: F401  (registers the operators of a ring's step)
from paracompile.layout.graph import writes
from paracompile.patterns.autocast import AUTOCAST_EDGES
from paracompile.patterns.exchanges import is_collective, is_wait

_RING_STEPS = {
    torch.ops.paracompile.attention_with_lse.default,
    torch.ops.paracompile.attention_with_lse_to_visible.default,
}
_EDGES = AUTOCAST_EDGES | {torch.ops.higher_order.cond}


def schedule(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Reorders the nodes of `gm` and of its branches in place; what they compute stays the same."""
    for branch in gm.children():
        if isinstance(branch, fx.GraphModule):
            schedule(branch, ())
    region: list[fx.Node] = []
    order: list[fx.Node] = [node for node in gm.graph.nodes if node.op in ("placeholder", "get_attr")]
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        if node.op == "output" or node.target in _EDGES or writes(node):
            order += _scheduled(region)
            region = []
            order.append(node)
        else:
            region.append(node)
    _rearrange(gm.graph, order)
    gm.graph.lint()
    gm.recompile()
    return gm


def _scheduled(region: Sequence[fx.Node]) -> list[fx.Node]:
    position = {node: index for index, node in enumerate(region)}
    done: set[fx.Node] = set()
    order: list[fx.Node] = []

    def emit(nodes: Iterable[fx.Node]) -> None:
        """Emits what is not yet done: first what no pending wait holds up, then wait by wait."""
        pending = sorted((node for node in nodes if node not in done), key=position.__getitem__)
        while pending:
            held: set[fx.Node] = set()
            first_wait = next((node for node in pending if is_wait(node)), None)
            rest = []
            for node in pending:
                if is_wait(node) or any(source in held for source in node.all_input_nodes):
                    held.add(node)
                    rest.append(node)
                else:
                    order.append(node)
                    done.add(node)
            if first_wait is not None:
                order.append(first_wait)
                done.add(first_wait)
                rest.remove(first_wait)
            pending = rest

    for anchor in (node for node in region if is_collective(node) or node.target in _RING_STEPS):
        emit(_needed(anchor, position.keys(), done))
    emit(region)
    return order


def _needed(node: fx.Node, region: Iterable[fx.Node], done: set[fx.Node]) -> list[fx.Node]:
    """The node and everything in the region that it depends on and that is not done."""
    found, waiting = {node}, [node]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source in region and source not in done and source not in found:
                found.add(source)
                waiting.append(source)
    return list(found)


def _rearrange(graph: fx.Graph, order: Sequence[fx.Node]) -> None:
    anchor = next(iter(graph.nodes)).prev  # the root, behind which the first node stands
    for node in order:
        if anchor.next is not node:
            anchor.append(node)
        anchor = node
