"""Norms over positions that are cut: the ranks put the moments of their parts together.

    before                                        after, on rank r
    y = group_norm(x, 32, w, b)                   moments = all_gather(mean and variance of x, by group)
                                                  y = x * scale + shift, of the moments of all, w and b

Moments are merged as by Chan et al. (Updating formulae and a pairwise algorithm for computing sample variances, 1979):
means and variances of parts, each about its own mean, never sums of squares, which cancel. They are gathered rather
than summed up, so that a single exchange is enough for that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import fx

from paracompile.layout.graph import Operation
from paracompile.layout.plan import Sharding
from paracompile.layout.sizes import sizes_of
from paracompile.mesh import Axis
from paracompile.passes.writer import GraphWriter
from paracompile.runtime.collectives import all_gather
from paracompile.torch_private import OpOverload

__all__ = ["with_shared_moments"]

aten = torch.ops.aten


def with_shared_moments(
    write: GraphWriter, operation: Operation, operands: Sequence[fx.Node], held: Sharding, axis: Axis
) -> fx.Node:
    """Writes a norm on this rank's part of what it takes the moments of, its first operand.

    args:
        operation: of whole sizes along `axis`, and already of this rank's along all others.
        held: how the first operand is cut.
    """
    assert operation.op is not None
    return _SHARED_MOMENTS[operation.op.target](write, operation, operands, held, axis)


def _group_norm(
    write: GraphWriter, operation: Operation, operands: Sequence[fx.Node], held: Sharding, axis: Axis
) -> fx.Node:
    assert operation.op is not None
    arguments = operation.op.arguments
    x, (rows, channels, *_) = operands[0], operation.op.operands[0]
    groups, pixels = int(arguments["num_groups"]), [1] * (len(operation.op.operands[0]) - 2)
    computed = torch.promote_types(x.meta["val"].dtype, torch.float32)
    wide = write(aten._to_copy.default, x, dtype=computed) if x.meta["val"].dtype != computed else x
    counts = [held.local_size(rank) for rank in range(axis.size)]
    own = _moments(write, wide, [rows, groups, prod(sizes_of(x.meta["val"])[1:]) // groups])
    mean, variance = _merged(write, own, [count / sum(counts) for count in counts], axis)
    scale = write(aten.rsqrt.default, write(aten.add.Scalar, variance, arguments["eps"]))
    mean, scale = (_of_channels(write, each, [rows, groups, channels // groups], pixels) for each in (mean, scale))
    if arguments["weight"] is not None:
        weight = operands[arguments["weight"].index]
        scale = write(aten.mul.Tensor, scale, write(aten.reshape.default, weight, [channels, *pixels]))
    shift = write(aten.neg.default, write(aten.mul.Tensor, mean, scale))
    if arguments["bias"] is not None:
        bias = operands[arguments["bias"].index]
        shift = write(aten.add.Tensor, shift, write(aten.reshape.default, bias, [channels, *pixels]))
    # In one small tensor they are computed once; Inductor would work them out anew for each pixel.
    both = write(aten.stack.default, [scale, shift])
    scale, shift = (write(aten.select.int, both, 0, which) for which in (0, 1))
    made = write(aten.addcmul.default, shift, wide, scale)  # as PyTorch's own kernel has it
    dtype = operation.node.meta["val"].dtype
    return made if made.meta["val"].dtype == dtype else write(aten._to_copy.default, made, dtype=dtype)


def _moments(write: GraphWriter, x: fx.Node, shape: Sequence[int]) -> fx.Node:
    """Mean and variance of each group of this rank's part, of shape (2, rows, groups); zeros where it is empty."""
    grouped = write(aten.reshape.default, x, list(shape))
    if 0 in shape:
        return write(aten.new_zeros.default, grouped, [2, *shape[:2]], pin_memory=False)
    mean = write(aten.mean.dim, grouped, [2], True)
    spread = write(aten.linalg_vector_norm.default, write(aten.sub.Tensor, grouped, mean), 2, [2])
    variance = write(aten.div.Scalar, write(aten.square.default, spread), shape[2])
    return write(aten.stack.default, [write(aten.squeeze.dim, mean, 2), variance])


def _of_channels(write: GraphWriter, moment: fx.Node, shape: Sequence[int], pixels: Sequence[int]) -> fx.Node:
    """What belongs to a group, once for each of its channels."""
    rows, groups, each = shape
    repeated = write(aten.expand.default, write(aten.unsqueeze.default, moment, 2), list(shape))
    return write(aten.reshape.default, repeated, [rows, groups * each, *pixels])


def _merged(write: GraphWriter, own: fx.Node, shares: Sequence[float], axis: Axis) -> tuple[fx.Node, fx.Node]:
    """Mean and variance of all, from every rank's, which stand for these shares of all positions."""
    shape = list(sizes_of(own.meta["val"]))
    gathered = all_gather(write, own, axis.size, axis.group)
    gathered = write(aten.reshape.default, gathered, [axis.size, *shape])
    by_rank = [write(aten.select.int, gathered, 0, rank) for rank in range(axis.size)]
    means, variances = ([write(aten.select.int, each, 0, which) for each in by_rank] for which in (0, 1))

    def weighted(values: Sequence[fx.Node]) -> fx.Node:
        parts = [write(aten.mul.Scalar, value, share) for value, share in zip(values, shares, strict=True) if share]
        total = parts[0]
        for part in parts[1:]:
            total = write(aten.add.Tensor, total, part)
        return total

    mean = weighted(means)
    apart = [write(aten.square.default, write(aten.sub.Tensor, each, mean)) for each in means]
    return mean, weighted([write(aten.add.Tensor, *pair) for pair in zip(variances, apart, strict=True)])


Writer = Callable[[GraphWriter, Operation, Sequence[fx.Node], Sharding, Axis], fx.Node]

_SHARED_MOMENTS: dict[OpOverload[..., object], Writer] = {aten.group_norm.default: _group_norm}
