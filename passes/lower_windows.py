"""Operations of which a position reads its neighbours, along a dimension that is cut: each rank works on a window.

    before                                        after, on rank r
    y = conv2d(x, w, b, padding=[1, 1])           edges = all_to_all(x's first row up, its last row down)
                                                  y = conv2d(cat([edge above, x, edge below]), w, b, padding=[0, 1])

At the outer edges of the image there are the operator's own zeros (or mirrored rows, ...) instead of an edge row.

Where an operation only copies what it reads (padding, upsampling) and a single window is all that reads it, it is made
to that window's measure, so that its operand's edges are exchanged and joined, and not those of the larger copy:

    p = pad(x, [1, 1, 1, 1, 2, 0])                edges = all_to_all(...)
    y = conv3d(p, w, b)                           p = pad(cat([edge above, x, edge below]), [1, 1, 0, 0, 2, 0])
                                                  y = conv3d(p, w, b)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import fx

from paracompile.layout.graph import Operation, spelled
from paracompile.layout.halos import Halo
from paracompile.layout.sizes import sizes_of
from paracompile.mesh import Axis
from paracompile.passes.writer import GraphWriter
from paracompile.runtime.halos import NO_FILL, Fill, Rows, window_of

__all__ = ["Held", "Source", "Windowed"]

aten = torch.ops.aten


class Source(Protocol):
    """What windows along `dim` are taken of."""

    def rows(self, write: GraphWriter, dim: int, wanted: Sequence[Rows], fill: Fill = NO_FILL) -> fx.Node:
        """Writes the positions `wanted[rank]`, with `fill` around them; all ranks say what they want."""


@dataclass(frozen=True)
class Held:
    """A value of which rank r holds the positions `by_rank[r]`; None where each holds all of it."""

    node: fx.Node
    by_rank: Sequence[Rows] | None
    axis: Axis

    def rows(self, write: GraphWriter, dim: int, wanted: Sequence[Rows], fill: Fill = NO_FILL) -> fx.Node:
        shape, rank, by_rank = sizes_of(self.node.meta["val"]), self.axis.rank, self.by_rank
        if by_rank is None:  # nothing is sent
            by_rank = [(0, shape[dim]) if other == rank else (0, 0) for other in range(self.axis.size)]
            wanted = [rows if other == rank else (0, 0) for other, rows in enumerate(wanted)]
        made: fx.Node = window_of(write, self.node, shape, dim, by_rank, wanted, rank, self.axis.group, fill)
        return made


@dataclass(frozen=True)
class Windowed:
    """An operation that is called on a window of its first operand.

    attributes:
        operation: of whole sizes along the axis, and already of this rank's along all others.
        halo: what of the first operand a position is made of.
        source: the first operand.
        others: the other ones.
    """

    operation: Operation
    halo: Halo
    source: Source
    others: Sequence[fx.Node]
    axis: Axis

    def rows(self, write: GraphWriter, dim: int, wanted: Sequence[Rows], fill: Fill = NO_FILL) -> fx.Node:
        op, rule, halo = self.operation.op, self.operation.rule, self.halo
        assert op is not None
        assert rule is not None
        assert rule.on_window is not None
        windows = [halo.window(*rows) for rows in wanted]
        window = windows[self.axis.rank]
        around = Fill(window.before, window.after, halo.value) if halo.edge == "filled" else NO_FILL
        if halo.edge == "padded" and fill.value == halo.value and window.count:  # it pads as well with what goes around
            window = replace(window, before=window.before + fill.before, after=window.after + fill.after)
            window = replace(window, count=window.count + fill.before + fill.after)
            fill = NO_FILL
        x = self.source.rows(write, dim, [(other.start, other.stop) for other in windows], around)
        if not window.count:
            shape, like = op.results[0], self.operation.node.meta["val"]
            shape = (*shape[:dim], 0, *shape[dim + 1 :])
            made = write(aten.new_empty.default, x, list(shape), dtype=like.dtype, device=like.device, pin_memory=False)
        else:
            target = rule.window_target or op.target
            there = replace(op, target=target, arguments={**op.arguments, **rule.on_window(op, halo, window)})
            args, kwargs = spelled(replace(self.operation, op=there), [x, *self.others])
            made = write(target, *args, **kwargs)
            if window.skip or sizes_of(made.meta["val"])[dim] != window.count:
                made = write(aten.slice.Tensor, made, dim, window.skip, window.skip + window.count)
        if fill == NO_FILL:
            return made
        return Held(made, None, self.axis).rows(write, dim, [(0, window.count)] * self.axis.size, fill)
