"""Unified attention: Ulysses over one axis around a ring over the other, around a local kernel.

After Fang & Zhao, USP (2024). The sequence is cut over ring x ulysses ranks, ring outermost. Within a ulysses group
tokens are exchanged for heads; then the members of a ring hold the same heads of different tokens, and keys and values
travel around it.

Tokens lie in the order in which they arrive, by rank and by segment within a rank: nothing is put back in order, as
attention does not care; what does care, a mask, is arranged to that order, once for all attentions that share it.

Apart, v's and k's exchanges run under what still computes k and q. Where an exchange is mostly its start there is
little to hide, and the three go as one, head by head.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

import paracompile.runtime.kernels  # noqa: F401  (registers attention_with_lse)
from paracompile.errors import GraphError
from paracompile.layout.plan import Sharding
from paracompile.layout.shares import Shares
from paracompile.layout.sizes import hint, sizes_of
from paracompile.mesh import Ranks
from paracompile.passes.tokens import in_order_of_arrival
from paracompile.passes.writer import GraphWriter
from paracompile.patterns.exchanges import link_of
from paracompile.runtime.eight_bits import SCALE, packed, unpacked
from paracompile.runtime.ring import Ring, ring_attention
from paracompile.runtime.ulysses import Exchange, heads_to_tokens, tokens_to_heads

aten = torch.ops.aten

Received = tuple[fx.Node, fx.Node, fx.Node]
"""Query, key and value of some heads and more tokens."""


@dataclass(frozen=True)
class AttentionOnTokens:
    """An attention whose tokens the ranks exchange, as one rank sees it.

    attributes:
        origin: the node that errors name.
        query, key, value: this rank's tokens, (*batch, heads, tokens, head size).
        mask: of all queries and all keys, broadcast to (*batch, heads, queries, keys); None without one.
        is_causal, scale, enable_gqa: as `scaled_dot_product_attention` takes them.
        queries, keys: how the queries, and keys and values, are cut.
    """

    origin: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    queries: Sharding
    keys: Sharding

    @property
    def heads(self) -> int:
        """Of the queries."""
        return _heads(self.query)

    @property
    def key_heads(self) -> int:
        return _heads(self.key)


class UnifiedAttention:
    """Writes the attentions of one graph.

    attributes:
        ranks: the ranks.
        together: whether queries, keys and values may go in one exchange.
        eight_bits: the type in which operands and results travel; None: as they are.
        put_together: how many attentions have them in one.
    """

    def __init__(self, ranks: Ranks, *, together: bool, eight_bits: torch.dtype | None) -> None:
        self.ranks, self.together, self.eight_bits = ranks, together, eight_bits
        self.put_together = 0
        self.masks: dict[tuple[object, ...], fx.Node] = {}

    def __call__(self, write: GraphWriter, attention: AttentionOnTokens) -> fx.Node:
        """Writes `attention` and returns its result, cut as the queries are."""
        _check(attention)
        query = attention.query
        key, value = (self._heads_alike(write, attention, part) for part in (attention.key, attention.value))
        if self._go_together(attention, (query, key, value)):
            received = self._all_to_heads(write, attention, (query, key, value))
        else:
            # v first: its exchange runs while k and q are still being normalised and rotated.
            value = self._to_heads(write, attention, value, attention.keys)
            key = self._to_heads(write, attention, key, attention.keys)
            received = (self._to_heads(write, attention, query, attention.queries), key, value)
        mask = self._mask(write, attention)
        if self.ranks.ring.size == 1:
            result = self._local(write, attention, received, mask)
        else:
            result = self._ring(write, attention, received, mask)
        exchange = self._exchange(attention, attention.heads, attention.queries)
        return self._exchanged(write, heads_to_tokens, result, exchange)

    def _to_heads(self, write: GraphWriter, attention: AttentionOnTokens, node: fx.Node, sharding: Sharding) -> fx.Node:
        return self._exchanged(write, tokens_to_heads, node, self._exchange(attention, _heads(node), sharding))

    def _exchanged(self, write: GraphWriter, way: Callable[..., fx.Node], node: fx.Node, exchange: Exchange) -> fx.Node:
        """What an exchange makes of a node, in as few bits as were asked for."""
        value = node.meta["val"]
        if self.eight_bits is None or exchange.ranks == 1:
            return way(write, node, value.shape, exchange)
        carried = packed(write, node, self.eight_bits, value.device)
        arrived = way(write, carried, sizes_of(carried.meta["val"]), exchange)
        back: fx.Node = unpacked(write, arrived, value.shape[-1], self.eight_bits, value.dtype, value.device)
        return back

    def _go_together(self, attention: AttentionOnTokens, parts: Received) -> bool:
        """Whether the three may go as one, which means as much on each rank, and whether that is cheaper."""
        values = [part.meta["val"] for part in parts]
        (alike, *others) = [(value.dtype, sizes_of(value)[:-3], sizes_of(value)[-1]) for value in values]
        if self.ranks.ulysses.size == 1 or not self.together or any(other != alike for other in others):
            return False
        queries, keys = attention.queries, attention.keys
        if any(queries.local(rank) != keys.local(rank) for rank in range(self.ranks.sequence_size)):
            return False
        tokens = max(hint(queries.local(rank)) for rank in range(self.ranks.sequence_size))
        a_token = max(prod(map(hint, sizes_of(value)[:-2])) * self._bytes_of_a_head(value) for value in values)
        return link_of(values[0].device).is_mostly_start(a_token * tokens)

    def _bytes_of_a_head(self, value: torch.Tensor) -> int:
        size = value.shape[-1]
        return size + SCALE if self.eight_bits is not None else size * value.element_size()

    def _all_to_heads(self, write: GraphWriter, attention: AttentionOnTokens, parts: Received) -> Received:
        """Each rank's heads of all three side by side, sent as heads of one tensor, and taken apart again."""
        heads = [self._shares(attention, _heads(part)) for part in parts]
        own = [of_part[self.ranks.ulysses.rank] for of_part in heads]
        *batch, _, tokens, size = sizes_of(parts[0].meta["val"])
        if all(len(set(of_part)) == 1 for of_part in heads):
            ranks = self.ranks.ulysses.size
            split = [
                write(aten.reshape.default, part, [*batch, ranks, count, tokens, size])
                for part, count in zip(parts, own, strict=True)
            ]
            side_by_side = write(aten.cat.default, split, -3)
            side_by_side = write(aten.reshape.default, side_by_side, [*batch, ranks * sum(own), tokens, size])
        else:
            of_ranks = [
                _part(write, part, len(batch), of_part, rank)
                for rank in range(self.ranks.ulysses.size)
                for part, of_part in zip(parts, heads, strict=True)
            ]
            side_by_side = write(aten.cat.default, of_ranks, -3)
        exchange = self._exchange(attention, attention.heads, attention.queries)
        together = replace(exchange, heads=tuple(map(sum, zip(*heads, strict=True))))
        received = self._exchanged(write, tokens_to_heads, side_by_side, together)
        self.put_together += 1
        starts = [sum(own[:number]) for number in range(3)]
        query, key, value = (
            write(aten.slice.Tensor, received, len(batch), start, start + count)
            for start, count in zip(starts, own, strict=True)
        )
        return query, key, value

    def _local(
        self, write: GraphWriter, attention: AttentionOnTokens, received: Received, mask: fx.Node | None
    ) -> fx.Node:
        query, key, _ = (sizes_of(operand.meta["val"]) for operand in received)
        if 0 in query:  # a rank without heads or tokens: PyTorch's kernels need not bear that (2.11's for the CPU dies)
            empty = write(torch.ops.paracompile.attention_with_lse.default, *received, mask, None, attention.scale)
            return write(operator.getitem, empty, 0)
        return write(
            aten.scaled_dot_product_attention.default,
            *received,
            mask,
            0.0,
            False,
            scale=attention.scale,
            enable_gqa=query[-3] != key[-3],
        )

    def _ring(
        self, write: GraphWriter, attention: AttentionOnTokens, received: Received, mask: fx.Node | None
    ) -> fx.Node:
        query, key, value = received
        ring = Ring(self.ranks.ring.group, self.ranks.ring.rank, self._tokens_of_rings(attention.keys))
        if mask is not None and sizes_of(mask.meta["val"])[-1] == 1:  # one column for all keys: a ring takes it apart
            mask = write(aten.expand.default, mask, [*sizes_of(mask.meta["val"])[:-1], sum(ring.tokens)])
        offset = None
        if mask is not None and mask.meta["val"].dtype is not torch.bool:
            largest = write(aten.amax.default, mask, [-1], True)
            offset = write(aten.clamp.default, largest, torch.finfo(mask.meta["val"].dtype).min)
        result: fx.Node = ring_attention(
            write,
            query,
            key,
            value,
            mask,
            offset,
            key_shape=sizes_of(key.meta["val"]),
            value_shape=sizes_of(value.meta["val"]),
            dtype=query.meta["val"].dtype,
            device=query.meta["val"].device,
            scale=attention.scale,
            ring=ring,
            eight_bits=self.eight_bits,
        )
        return result

    def _tokens_of_rings(self, sharding: Sharding) -> tuple[int, ...]:
        """Tokens of each member of a ring: those of its whole ulysses group."""
        local = [sharding.local(rank) for rank in range(self.ranks.sequence_size)]
        size = self.ranks.ulysses.size
        return tuple(sum(local[start : start + size]) for start in range(0, len(local), size))

    def _exchange(self, attention: AttentionOnTokens, heads: int, sharding: Sharding) -> Exchange:
        axis, first = self.ranks.ulysses, self.ranks.ring.rank * self.ranks.ulysses.size
        return Exchange(
            group=axis.group,
            rank=axis.rank,
            heads=self._shares(attention, heads),
            tokens=tuple(sharding.local(first + rank) for rank in range(axis.size)),
        )

    def _heads_alike(self, write: GraphWriter, attention: AttentionOnTokens, node: fx.Node) -> fx.Node:
        """Keys or values with fewer heads than there are ranks to share them, repeated to the queries' heads."""
        heads, key_heads = attention.heads, attention.key_heads
        if heads == key_heads or key_heads >= self.ranks.ulysses.size:
            return node
        return write(aten.repeat_interleave.self_int, node, heads // key_heads, -3)

    def _shares(self, attention: AttentionOnTokens, heads: int) -> tuple[int, ...]:
        """Heads of each rank; grouped queries are shared out with the key head that they attend with."""
        keys = attention.key_heads
        size = self.ranks.ulysses.size
        groups = keys if size <= keys <= heads else heads
        return tuple(count * (heads // groups) for count in Shares(size, groups).of(groups))

    # Masks

    def _mask(self, write: GraphWriter, attention: AttentionOnTokens) -> fx.Node | None:
        """The mask for this rank's heads and queries and all keys, in the order of arrival."""
        if attention.mask is None and not attention.is_causal:
            return None
        queries, keys, heads = attention.queries, attention.keys, self._shares(attention, attention.heads)
        key = (attention.mask, queries.segments, keys.segments, heads)
        if key not in self.masks:
            whole = attention.mask if attention.mask is not None else _causal(write, attention)
            self.masks[key] = self._arranged(write, whole, queries, keys, heads)
        return self.masks[key]

    def _arranged(
        self, write: GraphWriter, mask: fx.Node, queries: Sharding, keys: Sharding, heads: tuple[int, ...]
    ) -> fx.Node:
        shape = sizes_of(mask.meta["val"])
        for dim, sharding in ((len(shape) - 2, queries), (len(shape) - 1, keys)):
            if shape[dim] > 1:
                mask = in_order_of_arrival(write, mask, dim, sharding.segments, sharding.shares)
        if shape[-2] > 1:
            tokens = self._tokens_of_rings(queries)
            mask = _part(write, mask, len(shape) - 2, tokens, self.ranks.ring.rank)
        if len(shape) > 2 and shape[-3] > 1:
            mask = _part(write, mask, len(shape) - 3, heads, self.ranks.ulysses.rank)
        return mask


def _heads(node: fx.Node) -> int:
    heads: int = sizes_of(node.meta["val"])[-3]
    return heads


def _check(attention: AttentionOnTokens) -> None:
    query, key, value = map(_heads, (attention.query, attention.key, attention.value))
    grouped = attention.enable_gqa and query % key == 0
    if key != value or (query != key and not grouped):
        raise GraphError(
            attention.origin,
            f"its numbers of heads (query {query}, key {key}, value {value}) cannot be shared by ranks",
            "give keys and values the same number of heads, one that divides the queries' (with enable_gqa)",
        )


def _part(write: GraphWriter, node: fx.Node, dim: int, shares: tuple[int, ...], rank: int) -> fx.Node:
    if len(shares) == 1:
        return node
    start = sum(shares[:rank])
    return write(aten.slice.Tensor, node, dim, start, start + shares[rank])


def _causal(write: GraphWriter, attention: AttentionOnTokens) -> fx.Node:
    """Query i sees keys 0..i, as a mask of shape (query tokens, key tokens)."""
    device = attention.query.meta["val"].device
    rows, columns = (
        write(aten.arange.default, sum(sharding.segments), dtype=torch.int64, device=device, pin_memory=False)
        for sharding in (attention.queries, attention.keys)
    )
    return write(aten.ge.Tensor, write(aten.unsqueeze.default, rows, 1), columns)
