"""Ulysses: all-to-all between tokens and heads, spelled so that it can be run or written into a graph.

A rank that holds some tokens of every head gets every token of some heads, runs ordinary attention on them, and gives
the result back (Jacobs et al., DeepSpeed Ulysses, 2023). Tokens arrive ordered by rank: attention does not care about
the order of its keys, and the way back undoes it for the queries. Neither lengths nor heads need to divide: splits are
as uneven as they are, and nothing is padded.

What is sent lies in memory as (tokens, rows, heads, size), tokens outermost. So the tokens of all ranks arrive one
behind the other, and the kernel takes them as they lie; what it returns, in the same layout, is sent as it lies.

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
    def heads_are_even(self) -> bool:
        return len(set(self.heads)) == 1


def tokens_to_heads(call: Call, x: Any, shape: Sequence[int], exchange: Exchange) -> Any:
    """From (*batch, all heads, own tokens, size), which is `shape`, to (*batch, own heads, all tokens, size)."""
    if exchange.ranks == 1:
        return x
    *batch, heads, tokens, size = shape
    rows, ranks, own = prod(batch), exchange.ranks, exchange.heads[exchange.rank]
    if exchange.heads_are_even:
        x = call(aten.reshape.default, x, [rows, ranks, own, tokens, size])
        x = call(aten.permute.default, x, [1, 3, 0, 2, 4])
        x = call(aten.clone.default, x, memory_format=torch.contiguous_format)
        x = call(aten.reshape.default, x, [ranks * tokens, rows, own, size])
        x = all_to_all(call, x, exchange.tokens, [tokens] * ranks, exchange.group)
    else:
        x = call(aten.permute.default, call(aten.reshape.default, x, [rows, heads, tokens, size]), [2, 0, 1, 3])
        arriving = [rows * own * count * size for count in exchange.tokens]
        sent = [rows * count * tokens * size for count in exchange.heads]
        x = all_to_all(call, _flat(call, _split(call, x, exchange.heads, 2)), arriving, sent, exchange.group)
        x = call(aten.reshape.default, x, [sum(exchange.tokens), rows, own, size])
    x = call(aten.permute.default, x, [1, 2, 0, 3])
    return call(aten.reshape.default, x, [*batch, own, sum(exchange.tokens), size])


def heads_to_tokens(call: Call, x: Any, shape: Sequence[int], exchange: Exchange) -> Any:
    """From (*batch, own heads, all tokens, size), which is `shape`, to (*batch, all heads, own tokens, size)."""
    if exchange.ranks == 1:
        return x
    *batch, own, tokens, size = shape
    rows, ranks, mine = prod(batch), exchange.ranks, exchange.tokens[exchange.rank]
    x = call(aten.permute.default, call(aten.reshape.default, x, [rows, own, tokens, size]), [2, 0, 1, 3])
    x = call(aten.contiguous.default, x)  # as it lies, where the kernel kept the layout of its queries
    if exchange.heads_are_even:
        x = all_to_all(call, x, [mine] * ranks, exchange.tokens, exchange.group)
        x = call(aten.reshape.default, x, [ranks, mine, rows, own, size])
        x = call(aten.permute.default, x, [2, 1, 0, 3, 4])
    else:
        arriving = [rows * count * mine * size for count in exchange.heads]
        sent = [rows * own * count * size for count in exchange.tokens]
        x = all_to_all(call, call(aten.reshape.default, x, [-1]), arriving, sent, exchange.group)
        pieces = [
            call(aten.reshape.default, piece, [mine, rows, count, size])
            for piece, count in zip(_split(call, x, arriving, 0), exchange.heads, strict=True)
        ]
        x = call(aten.permute.default, call(aten.cat.default, pieces, 2), [1, 0, 2, 3])
    x = call(aten.reshape.default, x, [*batch, mine, sum(exchange.heads), size])
    return call(aten.transpose.int, x, -3, -2)


def _flat(call: Call, parts: Sequence[Any]) -> Any:
    return call(aten.cat.default, [call(aten.reshape.default, part, [-1]) for part in parts])


def _split(call: Call, x: Any, sizes: Sequence[int], dim: int) -> list[Any]:
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [call(aten.slice.Tensor, x, dim, start, start + size) for start, size in zip(starts, sizes, strict=True)]
