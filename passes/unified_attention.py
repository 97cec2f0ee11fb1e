"""Unified attention: Ulysses over one axis around a ring over the other, around a local kernel.

After Fang & Zhao, USP (2024). The sequence is cut over ring x ulysses ranks, ring outermost. Within a ulysses group
tokens are exchanged for heads; then the members of a ring hold the same heads of different tokens, and keys and values
travel around it.

Tokens lie in the order in which they arrive, by rank and by segment within a rank: nothing is put back in order, as
attention does not care; what does care, a mask, is arranged to that order, once for all attentions that share it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from paracompile.errors import GraphError
from paracompile.layout.graph import Operation, shape_of
from paracompile.layout.places import Attention
from paracompile.layout.plan import Plan, Sharding, Shares
from paracompile.mesh import Ranks
from paracompile.passes.sharder import Sharder
from paracompile.passes.tokens import in_order_of_arrival
from paracompile.runtime.ring import Ring, ring_attention
from paracompile.runtime.ulysses import Exchange, heads_to_tokens, tokens_to_heads

aten = torch.ops.aten


class UnifiedAttention:
    """Writes the attentions of one plan; called by the `Sharder`."""

    def __init__(self, plan: Plan, ranks: Ranks) -> None:
        self.plan = plan
        self.ranks = ranks
        self.masks: dict[tuple[object, ...], fx.Node] = {}

    def __call__(self, sharder: Sharder, attention: Attention) -> fx.Node:
        """Writes `attention` on this rank's tokens and returns its result, cut as the queries are."""
        operation = attention.operation
        self._check(attention)
        queries, keys = self._sharding(operation, attention.query), self._sharding(operation, attention.key)
        received: dict[int, fx.Node] = {}
        # v first: its exchange runs while k and q are still being normalised and rotated.
        for slot, sharding in ((attention.value, keys), (attention.key, keys), (attention.query, queries)):
            node = self._heads_alike(sharder, attention, slot, sharder.operand(operation, slot))
            exchange = self._exchange(attention, node.meta["val"].shape[-3], sharding)
            received[slot] = tokens_to_heads(sharder.write, node, node.meta["val"].shape, exchange)
        mask = self._mask(sharder, attention, queries, keys)
        if self.ranks.ring.size == 1:
            result = self._local(sharder, attention, received, mask)
        else:
            result = self._ring(sharder, attention, received, mask, keys)
        exchange = self._exchange(attention, shape_of(operation.operands[attention.query])[-3], queries)
        back: fx.Node = heads_to_tokens(sharder.write, result, result.meta["val"].shape, exchange)
        return back

    def _local(
        self, sharder: Sharder, attention: Attention, received: dict[int, fx.Node], mask: fx.Node | None
    ) -> fx.Node:
        arguments = _arguments(attention)
        query, key = (received[slot].meta["val"].shape[-3] for slot in (attention.query, attention.key))
        return sharder.write(
            aten.scaled_dot_product_attention.default,
            *(received[slot] for slot in (attention.query, attention.key, attention.value)),
            mask,
            0.0,
            False,
            scale=arguments["scale"],
            enable_gqa=query != key,
        )

    def _ring(
        self,
        sharder: Sharder,
        attention: Attention,
        received: dict[int, fx.Node],
        mask: fx.Node | None,
        keys: Sharding,
    ) -> fx.Node:
        arguments = _arguments(attention)
        query, key, value = (received[slot] for slot in (attention.query, attention.key, attention.value))
        ring = Ring(self.ranks.ring.group, self.ranks.ring.rank, self._tokens_of_rings(keys))
        if mask is not None and mask.meta["val"].shape[-1] == 1:  # one column for all keys: a ring takes it apart
            mask = sharder.write(aten.expand.default, mask, [*mask.meta["val"].shape[:-1], sum(ring.tokens)])
        offset = None
        if mask is not None and mask.meta["val"].dtype is not torch.bool:
            largest = sharder.write(aten.amax.default, mask, [-1], True)
            offset = sharder.write(aten.clamp.default, largest, torch.finfo(mask.meta["val"].dtype).min)
        result: fx.Node = ring_attention(
            sharder.write,
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
        local = [self.plan.shares.local(sharding.segments, rank) for rank in range(self.ranks.sequence_size)]
        size = self.ranks.ulysses.size
        return tuple(sum(local[start : start + size]) for start in range(0, len(local), size))

    def _exchange(self, attention: Attention, heads: int, sharding: Sharding) -> Exchange:
        axis, first = self.ranks.ulysses, self.ranks.ring.rank * self.ranks.ulysses.size
        return Exchange(
            group=axis.group,
            rank=axis.rank,
            heads=self._shares(attention, heads),
            tokens=tuple(self.plan.shares.local(sharding.segments, first + rank) for rank in range(axis.size)),
        )

    def _sharding(self, operation: Operation, slot: int) -> Sharding:
        sharding = self.plan.operand(operation, slot)
        assert sharding is not None
        return sharding

    def _heads_alike(self, sharder: Sharder, attention: Attention, slot: int, node: fx.Node) -> fx.Node:
        """Keys and values with fewer heads than there are ranks to share them, repeated to the queries' heads."""
        query, key = (shape_of(attention.operation.operands[other])[-3] for other in (attention.query, attention.key))
        if slot == attention.query or query == key or key >= self.ranks.ulysses.size:
            return node
        repeated: fx.Node = sharder.write(aten.repeat_interleave.self_int, node, query // key, -3)
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

    def _mask(self, sharder: Sharder, attention: Attention, queries: Sharding, keys: Sharding) -> fx.Node | None:
        """The mask for this rank's heads and queries and all keys, in the order of arrival."""
        if attention.mask is None and not attention.is_causal:
            return None
        value = attention.operation.operands[attention.mask] if attention.mask is not None else None
        lengths = tuple(shape_of(attention.operation.operands[slot])[-2] for slot in (attention.query, attention.key))
        heads = shape_of(attention.operation.operands[attention.query])[-3]
        key = (value, queries.segments, keys.segments, self._shares(attention, heads), lengths)
        if key not in self.masks:
            whole = sharder.whole_form(value) if value is not None else _causal(sharder, attention, lengths)
            self.masks[key] = self._arranged(sharder, whole, queries, keys, self._shares(attention, heads))
        return self.masks[key]

    def _arranged(
        self, sharder: Sharder, mask: fx.Node, queries: Sharding, keys: Sharding, heads: tuple[int, ...]
    ) -> fx.Node:
        shape = mask.meta["val"].shape
        for dim, sharding in ((len(shape) - 2, queries), (len(shape) - 1, keys)):
            if shape[dim] > 1:
                mask = in_order_of_arrival(sharder.write, mask, dim, sharding.segments, self.plan.shares)
        if shape[-2] > 1:
            tokens = self._tokens_of_rings(queries)
            mask = _part(sharder, mask, len(shape) - 2, tokens, self.ranks.ring.rank)
        if len(shape) > 2 and shape[-3] > 1:
            mask = _part(sharder, mask, len(shape) - 3, heads, self.ranks.ulysses.rank)
        return mask


def _arguments(attention: Attention) -> dict[str, Any]:
    assert attention.operation.op is not None
    return attention.operation.op.arguments


def _part(sharder: Sharder, node: fx.Node, dim: int, shares: tuple[int, ...], rank: int) -> fx.Node:
    if len(shares) == 1:
        return node
    start = sum(shares[:rank])
    return sharder.write(aten.slice.Tensor, node, dim, start, start + shares[rank])


def _causal(sharder: Sharder, attention: Attention, lengths: tuple[int, ...]) -> fx.Node:
    """Query i sees keys 0..i, as a mask of shape (query tokens, key tokens)."""
    device = attention.operation.operands[attention.query].node.meta["val"].device
    rows, columns = (
        sharder.write(aten.arange.default, length, dtype=torch.int64, device=device, pin_memory=False)
        for length in lengths
    )
    return sharder.write(aten.ge.Tensor, sharder.write(aten.unsqueeze.default, rows, 1), columns)
