"""Windows of a value that is cut: what a rank holds of it, and its neighbours' edges, in one exchange.

Every rank knows which positions each rank holds and which it needs. So the exchange is one all-to-all in which most
ranks send each other nothing: edges go to neighbours, or, where parts are smaller than a halo, to those further away.

As in `collectives`, functions take `call(operator, *arguments)`, which runs the operator or writes it into a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from paracompile.runtime.collectives import Call, all_to_all

__all__ = ["NO_FILL", "Fill", "Rows", "window_of"]

aten = torch.ops.aten

Rows = tuple[int, int]
"""Positions `[start, stop)` along the dimension that is cut."""


@dataclass(frozen=True)
class Fill:
    """How many positions are put before and after a window, and what they hold."""

    before: int = 0
    after: int = 0
    value: float = 0.0


NO_FILL = Fill()


def window_of(
    call: Call,
    x: Any,
    shape: Sequence[int],
    dim: int,
    held: Sequence[Rows],
    wanted: Sequence[Rows],
    rank: int,
    group: str,
    fill: Fill,
) -> Any:
    """The positions `wanted[rank]` along `dim`, of which rank r holds `held[r]`.

    args:
        x: what this rank holds, of `shape`.
        held, wanted: by rank; together the ranks hold everything, each position once and in the ranks' order.
        fill: what is put around the window.
    """
    (first, stop), (start, end) = held[rank], wanted[rank]
    pieces = [_filled(call, x, shape, dim, fill.before, fill.value)] if fill.before else []
    arriving = [_both(held[other], wanted[rank]) if other != rank else 0 for other in range(len(held))]
    own = max(first, start), min(stop, end)
    kept = []
    if own[0] < own[1]:
        kept = [x if own == (first, stop) else _slice(call, x, dim, own[0] - first, own[1] - first)]
    if any(_both(held[one], wanted[other]) for one in range(len(held)) for other in range(len(held)) if one != other):
        sent = [_both(held[rank], wanted[other]) if other != rank else 0 for other in range(len(held))]
        edges = [
            _slice(call, x, dim, a - first, a - first + count)
            for other, count in enumerate(sent)
            if count
            for a in [max(first, wanted[other][0])]
        ] or [_slice(call, x, dim, 0, 0)]
        edges = [call(aten.reshape.default, edge, [-1]) for edge in edges]
        buffer = edges[0] if len(edges) == 1 else call(aten.cat.default, edges)
        buffer = call(aten.clone.default, buffer, memory_format=torch.contiguous_format)
        row = prod(shape[:dim]) * prod(shape[dim + 1 :])
        sizes = [row * count for count in arriving]
        received = all_to_all(call, buffer, sizes, [row * count for count in sent], group)
        for other, size in enumerate(sizes):
            if other == rank:
                pieces += kept
            if size:
                part = call(aten.slice.Tensor, received, 0, sum(sizes[:other]), sum(sizes[: other + 1]))
                pieces.append(call(aten.reshape.default, part, [*shape[:dim], arriving[other], *shape[dim + 1 :]]))
    else:
        pieces += kept
    if fill.after:
        pieces.append(_filled(call, x, shape, dim, fill.after, fill.value))
    if not pieces:
        return _slice(call, x, dim, 0, 0)
    return pieces[0] if len(pieces) == 1 else call(aten.cat.default, pieces, dim)


def _both(one: Rows, other: Rows) -> int:
    """How many positions lie in both."""
    return max(0, min(one[1], other[1]) - max(one[0], other[0]))


def _slice(call: Call, x: Any, dim: int, start: int, stop: int) -> Any:
    return call(aten.slice.Tensor, x, dim, start, stop)


def _filled(call: Call, x: Any, shape: Sequence[int], dim: int, count: int, value: float) -> Any:
    return call(aten.new_full.default, x, [*shape[:dim], count, *shape[dim + 1 :]], value, pin_memory=False)
