"""Ulysses: all-to-all between tokens and heads, spelled so that it can be run or written into a graph.

A rank that holds some tokens of every head gets every token of some heads, runs ordinary attention on them, and gives
the result back (Jacobs et al., DeepSpeed Ulysses, 2023). Tokens arrive ordered by rank: attention does not care about
the order of its keys, and the way back undoes it for the queries. Neither lengths nor heads need to divide: splits are
as uneven as they are, and nothing is padded.

Each function takes `call(operator, *arguments)`, which runs the operator or writes it into a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from paracompile.runtime.collectives import Call, all_to_all

aten = torch.ops.aten


@dataclass(frozen=True)
class Exchange:
    """Who holds what in one exchange between tokens and heads.

    attributes:
        group: name of the process group.
        rank: this rank's number in it.
        heads: heads of each rank, after the exchange.
        tokens: tokens of each rank, before the exchange.
    """

    group: str
    rank: int
    heads: tuple[int, ...]
    tokens: tuple[int, ...]

    @property
    def ranks(self) -> int:
        return len(self.tokens)

    @property
    def is_even(self) -> bool:
        return len(set(self.heads)) == 1 and len(set(self.tokens)) == 1


def tokens_to_heads(call: Call, x: Any, shape: Sequence[int], exchange: Exchange) -> Any:
    """From (*batch, all heads, own tokens, size), which is `shape`, to (*batch, own heads, all tokens, size)."""
    if exchange.ranks == 1:
        return x
    *batch, heads, tokens, size = shape
    rows, ranks, own = prod(batch), exchange.ranks, exchange.heads[exchange.rank]
    target = [*batch, own, sum(exchange.tokens), size]
    if exchange.is_even:
        parts = call(aten.reshape.default, x, [rows, ranks, own, tokens, size])
        received = _all_to_all(
            call, call(aten.permute.default, parts, [1, 0, 2, 3, 4]), [1] * ranks, [1] * ranks, exchange
        )
        return call(aten.reshape.default, call(aten.permute.default, received, [1, 2, 0, 3, 4]), target)
    x = call(aten.reshape.default, x, [rows, heads, tokens, size])
    parts = _split(call, x, exchange.heads, 1)
    sent = [rows * count * tokens * size for count in exchange.heads]
    arriving = [rows * own * count * size for count in exchange.tokens]
    received = _all_to_all(call, _flat(call, parts), arriving, sent, exchange)
    pieces = [
        call(aten.reshape.default, piece, [rows, own, count, size])
        for piece, count in zip(_split(call, received, arriving, 0), exchange.tokens, strict=True)
    ]
    return call(aten.reshape.default, call(aten.cat.default, pieces, 2), target)


def heads_to_tokens(call: Call, x: Any, shape: Sequence[int], exchange: Exchange) -> Any:
    """From (*batch, own heads, all tokens, size), which is `shape`, to (*batch, all heads, own tokens, size)."""
    if exchange.ranks == 1:
        return x
    *batch, own, tokens, size = shape
    rows, ranks, mine = prod(batch), exchange.ranks, exchange.tokens[exchange.rank]
    target = [*batch, sum(exchange.heads), mine, size]
    if exchange.is_even:
        parts = call(aten.reshape.default, x, [rows, own, ranks, mine, size])
        received = _all_to_all(
            call, call(aten.permute.default, parts, [2, 0, 1, 3, 4]), [1] * ranks, [1] * ranks, exchange
        )
        return call(aten.reshape.default, call(aten.permute.default, received, [1, 0, 2, 3, 4]), target)
    x = call(aten.reshape.default, x, [rows, own, tokens, size])
    parts = _split(call, x, exchange.tokens, 2)
    sent = [rows * own * count * size for count in exchange.tokens]
    arriving = [rows * count * mine * size for count in exchange.heads]
    received = _all_to_all(call, _flat(call, parts), arriving, sent, exchange)
    pieces = [
        call(aten.reshape.default, piece, [rows, count, mine, size])
        for piece, count in zip(_split(call, received, arriving, 0), exchange.heads, strict=True)
    ]
    return call(aten.reshape.default, call(aten.cat.default, pieces, 1), target)


def _all_to_all(call: Call, x: Any, arriving: list[int], sent: list[int], exchange: Exchange) -> Any:
    """Sends slices of dimension 0; `arriving` and `sent` are their lengths by rank."""
    x = call(aten.clone.default, x, memory_format=torch.contiguous_format)
    return all_to_all(call, x, arriving, sent, exchange.group)


def _flat(call: Call, parts: Sequence[Any]) -> Any:
    return call(aten.cat.default, [call(aten.reshape.default, part, [-1]) for part in parts])


def _split(call: Call, x: Any, sizes: Sequence[int], dim: int) -> list[Any]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [call(aten.slice.Tensor, x, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]
