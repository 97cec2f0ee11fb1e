"""Taking a rank's tokens from a whole value, and putting whole values together again.

As in `collectives`, functions take `call(operator, *arguments)`, which runs the operator or writes it into a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from paracompile.layout.factors import Place, Shape
from paracompile.layout.plan import Sharding
from paracompile.layout.shares import Shares
from paracompile.runtime.collectives import Call, all_gather

aten = torch.ops.aten

_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
_CARRIED = {torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64} | _FLOATING
"""What both gloo and nccl gather."""


def own_tokens(call: Call, x: Any, shape: Shape, sharding: Sharding, rank: int) -> Any:
    """The part that `rank` holds of `x`, a whole value of `shape`: its piece of each segment, joined."""
    place = sharding.place
    if place.has_margins:
        start, stop = sharding.bounds(rank)
        return call(aten.slice.Tensor, x, place.dim, start, stop)
    pieces, start = [], 0
    opened = _open(call, x, shape, place, place.length)
    for length in sharding.segments:
        first, count = sharding.shares.window(length, rank)
        if count:
            pieces.append((start + first, start + first + count))
        start += length
    joined = _join(call, opened, pieces or [(0, 0)], place.dim + (place.outer > 1))
    return _close(call, joined, sharding.local_shape(shape, rank), place)


def all_tokens(call: Call, x: Any, shape: Shape, sharding: Sharding, rank: int, group: str) -> Any:
    """The whole value of `shape` from every rank's part; `x` is the part that `rank` holds.

    Parts that differ in length are padded to the longest for the journey, and the padding is dropped on arrival. Types
    that not every backend carries travel as bytes.
    """
    place, shares = sharding.place, sharding.shares
    ranks = shares.ranks
    if place.has_margins:  # position by position
        locals_ = [sharding.local_size(other) for other in range(ranks)]
        longest = max(locals_)
        pieces_of = [(other, 0, count) for other, count in enumerate(locals_)]
        place = Place(place.dim, place.size)
    else:
        locals_ = [sharding.local(other) for other in range(ranks)]
        longest = shares.most(sharding.segments)
        pieces_of = [
            (other, shares.local(sharding.segments[:number], other), shares.of(length)[other])
            for number, length in enumerate(sharding.segments)
            for other in range(ranks)
        ]
    dim = place.dim + (place.outer > 1)
    x = _open(call, x, sharding.local_shape(shape, rank), place, locals_[rank])
    if locals_[rank] != longest:
        filling = call(aten.new_zeros.default, x, _opened_shape(shape, place, longest - locals_[rank]))
        x = call(aten.cat.default, [x, filling], dim)
    x = call(aten.clone.default, x, memory_format=torch.contiguous_format)
    dtype = x.meta["val"].dtype if isinstance(x, fx.Node) else x.dtype
    if dtype not in _CARRIED:
        x = call(aten.view.dtype, x, torch.uint8)
    parts = all_gather(call, x, ranks, group)
    if dtype not in _CARRIED:
        parts = call(aten.view.dtype, parts, dtype)
    opened = _opened_shape(shape, place, longest)
    parts = call(aten.reshape.default, parts, [ranks, *opened])
    pieces = []
    for other, start, count in pieces_of:
        if count:
            part = call(aten.select.int, parts, 0, other)
            pieces.append(call(aten.slice.Tensor, part, dim, start, start + count))
    return _close(call, call(aten.cat.default, pieces, dim), shape, place)


def in_order_of_arrival(call: Call, x: Any, dim: int, segments: Sequence[int], shares: Shares) -> Any:
    """Reorders dimension `dim` of a whole value (a mask) as tokens arrive: by rank, and by segment within a rank."""
    if len(segments) == 1:
        return x  # the ranks' pieces of one segment arrive in its own order
    windows = []
    for rank in range(shares.ranks):
        start = 0
        for length in segments:
            first, count = shares.window(length, rank)
            if count:
                windows.append((start + first, start + first + count))
            start += length
    return _join(call, x, windows, dim)


def _join(call: Call, x: Any, windows: Sequence[tuple[int, int]], dim: int) -> Any:
    pieces = [call(aten.slice.Tensor, x, dim, start, stop) for start, stop in windows]
    return pieces[0] if len(pieces) == 1 else call(aten.cat.default, pieces, dim)


def _opened_shape(shape: Shape, place: Place, tokens: int) -> list[int]:
    """`shape` with the tokens in a dimension of their own."""
    around = [size for size in (place.outer,) if size > 1], [size for size in (place.inner,) if size > 1]
    return [*shape[: place.dim], *around[0], tokens, *around[1], *shape[place.dim + 1 :]]


def _open(call: Call, x: Any, shape: Shape, place: Place, tokens: int) -> Any:
    opened = _opened_shape(shape, place, tokens)
    return x if opened == list(shape) else call(aten.reshape.default, x, opened)


def _close(call: Call, x: Any, shape: Shape, place: Place) -> Any:
    return x if place.outer == place.inner == 1 else call(aten.reshape.default, x, list(shape))
