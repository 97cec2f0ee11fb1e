"""Linear layers that quantise what they are given by one scale for all of it: the ranks agree on its range.

    before, on all tokens                    after, on rank r
    y = linear(x, quantised weight)          range = all_reduce(cat(max(x), -min(x)), "max")
                                             y = linear(cat(x, two rows of the range), quantised weight)[:-2]

torchao takes the scale (`PerTensor`) from the largest value of the tensor that `linear` gets. A rank has its own tokens
only, so it would take another scale than one process does, and make another picture. The two rows bring the range of
all tokens along, whatever torchao makes of it, and their results are dropped. Layers that get the same tensor, as those
of queries, keys and values, share one exchange.

A scale for each row (`PerRow`) is a matter of a token alone: no exchange, no rows, and a finer scale besides.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from paracompile.errors import GraphError
from paracompile.layout.sizes import sizes_of
from paracompile.passes.writer import GraphWriter, as_float
from paracompile.runtime.collectives import all_reduce
from paracompile.torch_private import is_traceable_wrapper_subclass

__all__ = ["SharedScales", "scales_all_at_once"]

aten = torch.ops.aten


def scales_all_at_once(weight: Any) -> bool:
    """Whether a weight's `linear` quantises what it is given by one scale that it takes from all of it."""
    granularity = getattr(getattr(weight, "act_quant_kwargs", None), "granularity", None)
    if granularity is None or not is_traceable_wrapper_subclass(weight):
        return False
    from torchao.quantization import PerTensor

    return isinstance(granularity, PerTensor) and getattr(weight, "act_quant_scale", None) is None


class SharedScales:
    """Writes such layers for one rank.

    attributes:
        exchanges: how many ranges are exchanged.
    """

    def __init__(self) -> None:
        self._longer: dict[fx.Node, fx.Node] = {}

    @property
    def exchanges(self) -> int:
        return len(self._longer)

    def linear(self, write: GraphWriter, node: fx.Node, args: tuple[Any, ...], group: str) -> fx.Node:
        """Writes `aten.linear.default(*args)`, whose first operand is this rank's part.

        args:
            node: the layer in the whole graph.
            group: that of the ranks that have the other parts.

        raises:
            GraphError: this rank has no part.
        """
        x, *rest = args
        *outer, width = sizes_of(x.meta["val"])
        if 0 in outer:
            raise GraphError(
                node,
                "it quantises its input by one scale for all tokens, and there are fewer of these than ranks",
                "quantise with a scale for each row (torchao's PerRow), or take fewer ranks",
            )
        if x not in self._longer:
            tokens = write(aten.reshape.default, x, [-1, width])
            self._longer[x] = write(aten.cat.default, [tokens, self._range(write, x, width, group)])
        made = write(aten.linear.default, self._longer[x], *rest)
        made = write(aten.slice.Tensor, made, 0, 0, prod(outer))
        written: fx.Node = write(aten.reshape.default, made, [*outer, sizes_of(made.meta["val"])[-1]])
        return written

    @staticmethod
    def _range(write: GraphWriter, x: fx.Node, width: int, group: str) -> fx.Node:
        """Two rows: the largest value of all ranks' parts, and the smallest."""
        ends = write(aten.stack.default, [write(aten.max.default, x), negated(write, write(aten.min.default, x))])
        of_all = all_reduce(write, as_float(write, ends), "max", group)
        largest, smallest = (write(aten.select.int, of_all, 0, place) for place in (0, 1))
        values = write(aten.stack.default, [largest, negated(write, smallest)])
        rows = write(aten.expand.default, write(aten.unsqueeze.default, values, 1), [2, width])
        written: fx.Node = write(aten._to_copy.default, rows, dtype=x.meta["val"].dtype)
        return written


def negated(write: GraphWriter, value: fx.Node) -> fx.Node:
    return write(aten.neg.default, value)
