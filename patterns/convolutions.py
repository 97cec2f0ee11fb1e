"""Finds convolutions that mix neighbours, and whether they are what a graph mostly does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paracompile.layout.graph import Operation, Value, shape_of
from paracompile.layout.places import Spatial
from paracompile.patterns.flops import CONVOLUTIONS, flops_of

__all__ = ["DIMENSIONS", "mixes_neighbours", "overlaps", "spatial_seeds", "works_on_images"]

DIMENSIONS = {-1: "width", -2: "height", -3: "frames"}
"""What a spatial dimension, counted from the last, is called."""

_MOSTLY = 0.5
"""The share of a graph's products in convolutions from which on it works on images, not on tokens."""


def overlaps(kernel: Sequence[int], stride: Any) -> bool:
    """Whether a convolution's windows overlap: along some dimension its kernel is longer than its step.

    args:
        stride: one number, or one for each dimension.
    """
    steps = list(stride) if isinstance(stride, (list, tuple)) else [stride]
    return any(size > step for size, step in zip(kernel, steps * len(kernel), strict=False))


def mixes_neighbours(operation: Operation) -> bool:
    """Whether an operation is a convolution with overlapping windows; those that embed patches have none."""
    op = operation.op
    return op is not None and op.target in CONVOLUTIONS and overlaps(op.operands[1][2:], op.arguments["stride"])


def works_on_images(operations: Sequence[Operation]) -> bool:
    """Whether most of the products are convolutions' of this kind, as in a decoder of images or video."""
    mixing = sum(flops_of(operation) for operation in operations if mixes_neighbours(operation))
    return mixing > _MOSTLY * sum(map(flops_of, operations))


def spatial_seeds(operations: Sequence[Operation], ranks: int) -> list[Spatial]:
    """For each spatial dimension the convolutions' results, the coarsest first; of equal ones, the most work first.

    The coarsest have the largest pixels, and finer ones are cut where these are. Fewer positions than ranks are not
    shared.
    """
    convolutions = [operation for operation in operations if mixes_neighbours(operation)]
    seeds = []
    for dim in sorted(DIMENSIONS):
        found: dict[Value, tuple[int, int]] = {}
        for operation in convolutions:
            assert operation.op is not None
            (result,) = operation.results
            if len(operation.op.operands[1]) - 2 >= -dim and shape_of(result)[dim] >= ranks:
                found[result] = (shape_of(result)[dim], -flops_of(operation))
        if found:
            seeds.append(Spatial(dim, tuple(sorted(found, key=found.__getitem__))))
    return seeds
