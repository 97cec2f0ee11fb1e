"""Unified attention: Ulysses over one axis around a ring over the other, around a local kernel.

After Fang & Zhao, USP (2024). The sequence is cut over ring x ulysses ranks, ring outermost. Within a ulysses group
tokens are exchanged for heads; then the members of a ring hold the same heads of different tokens, and keys and values
travel around it.

Tokens lie in the order in which they arrive, by rank and by segment within a rank: nothing is put back in order, as
attention does not care; what does care, a mask, is arranged to that order, once for all attentions that share it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import fx

import paracompile.runtime.kernels  # noqa: F401  (registers attention_with_lse)
from paracompile.errors import GraphError
from paracompile.layout.graph import Operation, Value, shape_of
from paracompile.layout.places import Attention
from paracompile.layout.plan import Sharding, Shares
from paracompile.mesh import Ranks
from paracompile.passes.tokens import in_order_of_arrival
from paracompile.passes.writer import GraphWriter
from paracompile.runtime.ring import Ring, ring_attention
from paracompile.runtime.ulysses import Exchange, heads_to_tokens, tokens_to_heads

aten = torch.ops.aten


class Graph(Protocol):
    """The graph that is being written, as attention sees it (the `Sharder`, or a graph whose inputs are shards)."""

    write: GraphWriter

    def operand(self, operation: Operation, slot: int) -> fx.Node:
        """This rank's part of a query, key or value."""

    def whole_form(self, value: Value) -> fx.Node:
        """All of a mask."""


class UnifiedAttention:
    """Writes the attentions of one graph.

    attributes:
        ranks: the ranks.
        shares: how segments are shared out over them.
        sharding: how a query or key (an operation's slot) is cut.
    """

    def __init__(self, ranks: Ranks, shares: Shares, sharding: Callable[[Operation, int], Sharding | None]) -> None:
        self.ranks = ranks
        self.shares = shares
        self.sharding = sharding
        self.masks: dict[tuple[object, ...], fx.Node] = {}

    def __call__(self, graph: Graph, attention: Attention) -> fx.Node:
        """Writes `attention` on this rank's tokens and returns its result, cut as the queries are."""
        operation = attention.operation
        self._check(attention)
        queries, keys = self._sharding(operation, attention.query), self._sharding(operation, attention.key)
        received: dict[int, fx.Node] = {}
        # v first: its exchange runs while k and q are still being normalised and rotated.
        for slot, sharding in ((attention.value, keys), (attention.key, keys), (attention.query, queries)):
            node = self._heads_alike(graph, attention, slot, graph.operand(operation, slot))
            exchange = self._exchange(attention, node.meta["val"].shape[-3], sharding)
            received[slot] = tokens_to_heads(graph.write, node, node.meta["val"].shape, exchange)
        mask = self._mask(graph, attention, queries, keys)
        if self.ranks.ring.size == 1:
            result = self._local(graph, attention, received, mask)
        else:
            result = self._ring(graph, attention, received, mask, keys)
        exchange = self._exchange(attention, shape_of(operation.operands[attention.query])[-3], queries)
        back: fx.Node = heads_to_tokens(graph.write, result, result.meta["val"].shape, exchange)
        return back

    def _local(self, graph: Graph, attention: Attention, received: dict[int, fx.Node], mask: fx.Node | None) -> fx.Node:
        scale = _arguments(attention)["scale"]
        operands = [received[slot] for slot in (attention.query, attention.key, attention.value)]
        query, key, _ = (operand.meta["val"].shape for operand in operands)
        if 0 in query:  # a rank without heads or tokens: PyTorch's kernels need not bear that (2.11's for the CPU dies)
            empty = graph.write(torch.ops.paracompile.attention_with_lse.default, *operands, mask, None, scale)
            return graph.write(operator.getitem, empty, 0)
        return graph.write(
            aten.scaled_dot_product_attention.default,
            *operands,
            mask,
            0.0,
            False,
            scale=scale,
            enable_gqa=query[-3] != key[-3],
        )

    def _ring(
        self,
        graph: Graph,
        attention: Attention,
        received: dict[int, fx.Node],
        mask: fx.Node | None,
        keys: Sharding,
    ) -> fx.Node:
        arguments = _arguments(attention)
        query, key, value = (received[slot] for slot in (attention.query, attention.key, attention.value))
        ring = Ring(self.ranks.ring.group, self.ranks.ring.rank, self._tokens_of_rings(keys))
        if mask is not None and mask.meta["val"].shape[-1] == 1:  # one column for all keys: a ring takes it apart
            mask = graph.write(aten.expand.default, mask, [*mask.meta["val"].shape[:-1], sum(ring.tokens)])
        offset = None
        if mask is not None and mask.meta["val"].dtype is not torch.bool:
            largest = graph.write(aten.amax.default, mask, [-1], True)
            offset = graph.write(aten.clamp.default, largest, torch.finfo(mask.meta["val"].dtype).min)
        result: fx.Node = ring_attention(
            graph.write,
            query,
            key,
            value,
            mask,
            offset,
            key_shape=key.meta["val"].shape,
            value_shape=value.meta["val"].shape,
            dtype=query.meta["val"].dtype,
            scale=arguments["scale"],
            ring=ring,
        )
        return result

    def _tokens_of_rings(self, sharding: Sharding) -> tuple[int, ...]:
        """Tokens of each member of a ring: those of its whole ulysses group."""
        local = [self.shares.local(sharding.segments, rank) for rank in range(self.ranks.sequence_size)]
        size = self.ranks.ulysses.size
        return tuple(sum(local[start : start + size]) for start in range(0, len(local), size))

    def _exchange(self, attention: Attention, heads: int, sharding: Sharding) -> Exchange:
        axis, first = self.ranks.ulysses, self.ranks.ring.rank * self.ranks.ulysses.size
        return Exchange(
            group=axis.group,
            rank=axis.rank,
            heads=self._shares(attention, heads),
            tokens=tuple(self.shares.local(sharding.segments, first + rank) for rank in range(axis.size)),
        )

    def _sharding(self, operation: Operation, slot: int) -> Sharding:
        sharding = self.sharding(operation, slot)
        assert sharding is not None
        return sharding

    def _heads_alike(self, graph: Graph, attention: Attention, slot: int, node: fx.Node) -> fx.Node:
        """Keys and values with fewer heads than there are ranks to share them, repeated to the queries' heads."""
        query, key = (shape_of(attention.operation.operands[other])[-3] for other in (attention.query, attention.key))
        if slot == attention.query or query == key or key >= self.ranks.ulysses.size:
            return node
        repeated: fx.Node = graph.write(aten.repeat_interleave.self_int, node, query // key, -3)
        return repeated

    def _shares(self, attention: Attention, heads: int) -> tuple[int, ...]:
        """Heads of each rank; grouped queries are shared out with the key head that they attend with."""
        keys = shape_of(attention.operation.operands[attention.key])[-3]
        size = self.ranks.ulysses.size
        groups = keys if size <= keys <= heads else heads
        return tuple(count * (heads // groups) for count in Shares(size, groups).of(groups))

    def _check(self, attention: Attention) -> None:
        operands = attention.operation.operands
        query, key, value = (shape_of(operands[slot])[-3] for slot in (attention.query, attention.key, attention.value))
        grouped = bool(_arguments(attention)["enable_gqa"]) and query % key == 0
        if key != value or (query != key and not grouped):
            raise GraphError(
                attention.operation.node,
                f"its numbers of heads (query {query}, key {key}, value {value}) cannot be shared by ranks",
                "give keys and values the same number of heads, one that divides the queries' (with enable_gqa)",
            )

    # Masks

    def _mask(self, graph: Graph, attention: Attention, queries: Sharding, keys: Sharding) -> fx.Node | None:
        """The mask for this rank's heads and queries and all keys, in the order of arrival."""
        if attention.mask is None and not attention.is_causal:
            return None
        value = attention.operation.operands[attention.mask] if attention.mask is not None else None
        lengths = (sum(queries.segments), sum(keys.segments))
        heads = shape_of(attention.operation.operands[attention.query])[-3]
        key = (value, queries.segments, keys.segments, self._shares(attention, heads), lengths)
        if key not in self.masks:
            whole = graph.whole_form(value) if value is not None else _causal(graph, attention, lengths)
            self.masks[key] = self._arranged(graph, whole, queries, keys, self._shares(attention, heads))
        return self.masks[key]

    def _arranged(
        self, graph: Graph, mask: fx.Node, queries: Sharding, keys: Sharding, heads: tuple[int, ...]
    ) -> fx.Node:
        shape = mask.meta["val"].shape
        for dim, sharding in ((len(shape) - 2, queries), (len(shape) - 1, keys)):
            if shape[dim] > 1:
                mask = in_order_of_arrival(graph.write, mask, dim, sharding.segments, self.shares)
        if shape[-2] > 1:
            tokens = self._tokens_of_rings(queries)
            mask = _part(graph, mask, len(shape) - 2, tokens, self.ranks.ring.rank)
        if len(shape) > 2 and shape[-3] > 1:
            mask = _part(graph, mask, len(shape) - 3, heads, self.ranks.ulysses.rank)
        return mask


def _arguments(attention: Attention) -> dict[str, Any]:
    assert attention.operation.op is not None
    return attention.operation.op.arguments


def _part(graph: Graph, node: fx.Node, dim: int, shares: tuple[int, ...], rank: int) -> fx.Node:
    if len(shares) == 1:
        return node
    start = sum(shares[:rank])
    return graph.write(aten.slice.Tensor, node, dim, start, start + shares[rank])


def _causal(graph: Graph, attention: Attention, lengths: tuple[int, int]) -> fx.Node:
    """Query i sees keys 0..i, as a mask of shape (query tokens, key tokens)."""
    device = attention.operation.operands[attention.query].node.meta["val"].device
    rows, columns = (
        graph.write(aten.arange.default, length, dtype=torch.int64, device=device, pin_memory=False)
        for length in lengths
    )
    return graph.write(aten.ge.Tensor, graph.write(aten.unsqueeze.default, rows, 1), columns)
