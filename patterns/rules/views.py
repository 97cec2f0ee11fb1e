"""Reshapes, transpositions, repetitions: operators that only move elements.

Reshape. Number the elements row-major. Dimension `k` of a shape is the digit `(number // below) % size`, where `below`
is the product of the sizes after it and `above = below * size`. A range of digits `[low, high)`, that is
`(number // low) % (high / low)`, lies in one dimension when `below | low | high | above` (each divides the next), with
`outer = above / high` and `inner = low / below`. So a dimension of the operand and one of the result have one largest
factor in common:

    low = lcm(below, below'),  high = gcd(above, above'),  if low divides high.

That covers (B, S) -> (B*S) and back, sizes of 1, and pairs like (4, 6) -> (6, 4), which only share parts.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch

from paracompile.layout.factors import Factor, Local, Op, Rule, Shape, Span, whole
from paracompile.layout.sizes import common_divisor, common_multiple, divides
from paracompile.patterns.rules.labels import Table, aligned, dim_of, dims_of, dropping, factors_of, mixing

aten = torch.ops.aten


def reshape(op: Op) -> list[Factor]:
    (result,) = op.results
    operand = op.operands[0]
    if 0 in operand:
        return []
    factors = []
    for dim, (below, above) in enumerate(_digits(operand)):
        for dim_out, (below_out, above_out) in enumerate(_digits(result)):
            low, high = common_multiple(below, below_out), common_divisor(above, above_out)
            if not divides(low, high) or high == low:
                continue
            size = high // low
            span = Span(dim, 0, size, above // high, low // below)
            span_out = Span(dim_out, 0, size, above_out // high, low // below_out)
            factors.append(Factor(size, (span, *[None] * (len(op.operands) - 1)), (span_out,)))
    return factors


def _digits(shape: Shape) -> list[tuple[int, int]]:
    return [(prod(shape[dim + 1 :]), prod(shape[dim:])) for dim in range(len(shape))]


def _permuted(order: list[int]) -> list[int]:
    return [dim % len(order) for dim in order]


def _permute(op: Op) -> list[Factor]:
    labels = range(len(op.operands[0]))
    return factors_of(op, [labels], [_permuted(op.arguments["dims"])])


def _swap(first: str, second: str) -> Rule:
    def factors(op: Op) -> list[Factor]:
        rank = len(op.operands[0])
        labels = list(range(rank))
        if rank:
            one, two = dim_of(op, first, rank), dim_of(op, second, rank)
            labels[one], labels[two] = labels[two], labels[one]
        return factors_of(op, [range(rank)], [labels])

    return Rule(factors)


def _t(op: Op) -> list[Factor]:
    labels = range(len(op.operands[0]))
    return factors_of(op, [labels], [labels[::-1]])


def _movedim(op: Op) -> list[Factor]:
    rank = len(op.operands[0])
    source, destination = (
        [dim % rank for dim in ([value] if isinstance(value, int) else value)]
        for value in (op.arguments["source"], op.arguments["destination"])
    )
    rest = iter(dim for dim in range(rank) if dim not in source)
    labels = [source[destination.index(dim)] if dim in destination else next(rest) for dim in range(rank)]
    return factors_of(op, [range(rank)], [labels])


def _expand(op: Op) -> list[Factor]:
    return factors_of(op, map(aligned, op.operands), map(aligned, op.results))


def _diagonal(op: Op) -> list[Factor]:
    rank = len(op.operands[0])
    gone = dims_of(op, "dim1", rank) | dims_of(op, "dim2", rank)
    return factors_of(op, [range(rank)], [(*dropping(range(rank), gone), None)])


def _repeat(op: Op) -> list[Factor]:
    """Position `r * size + i` of a result's dimension is the operand's `i`, repeated the `r`-th time."""
    (operand,), (result,) = op.operands, op.results
    extra = len(result) - len(operand)
    factors = []
    for dim, size_out in enumerate(result):
        size = operand[dim - extra] if dim >= extra else 1
        times = size_out // size if size else 0
        if size > 1 and times:
            factors.append(Factor(size, (whole(operand, dim - extra),), (Span(dim, 0, size, outer=times),)))
        if times > 1:
            factors.append(Factor(times, (None,), (Span(dim, 0, times, inner=size),)))
    return factors


def _local_repeats(name: str) -> Any:
    def localise(op: Op, local: Local) -> dict[str, Any]:
        (operand,), (result,) = local.operands, local.results
        extra = len(result) - len(operand)
        repeats = op.arguments[name]
        repeats = [1] * (len(result) - len(repeats)) + list(repeats)
        sizes = [1] * extra + list(operand)
        # An empty part says nothing about how often it is repeated, and needs nothing.
        return {name: [out // size if size else times for out, size, times in zip(result, sizes, repeats, strict=True)]}

    return localise


def _repeat_interleave(op: Op) -> list[Factor]:
    """Position `i * repeats + r` is the operand's `i`; without `dim` the operand is flattened first."""
    (operand,), (result,) = op.operands, op.results
    if 0 in result:
        return []
    rank = len(operand)
    dim = op.arguments["dim"]
    if dim is None:
        sizes, dim_out, before = operand, 0, 1
        factors = []
    else:
        dim_out = dim % rank
        sizes, before = (operand[dim_out],), 1
        factors = factors_of(op, [mixing(range(rank), {dim_out})], [mixing(range(rank), {dim_out})])
    times = result[dim_out] // prod(sizes)
    for index, size in enumerate(sizes):
        if size > 1:
            where = whole(operand, index if dim is None else dim_out)
            inner = prod(sizes[index + 1 :]) * times
            factors.append(Factor(size, (where,), (Span(dim_out, 0, size, before, inner),)))
        before *= size
    if times > 1:
        factors.append(Factor(times, (None,), (Span(dim_out, 0, times, outer=prod(sizes)),)))
    return factors


def _local_interleave(op: Op, local: Local) -> dict[str, Any]:
    (operand,), (result,) = local.operands, local.results
    dim = op.arguments["dim"]
    size, out = (prod(operand), result[0]) if dim is None else (operand[dim], result[dim])
    repeats = out // size if size else op.arguments["repeats"]
    return {"repeats": repeats, "output_size": None if op.arguments["output_size"] is None else out}


def _shape_argument(name: str) -> Any:
    def localise(op: Op, local: Local) -> dict[str, Any]:
        return {name: list(local.results[0])}

    return localise


def _local_unflatten(op: Op, local: Local) -> dict[str, Any]:
    dim = op.arguments["dim"] % len(local.operands[0])
    return {"sizes": list(local.results[0][dim : dim + len(op.arguments["sizes"])])}


def _meshgrid(op: Op) -> list[Factor]:
    """`i, j -> ij, ij`, or `ji, ji` with the indexing of images."""
    labels = list(range(len(op.operands)))
    if op.arguments.get("indexing") == "xy" and len(labels) > 1:
        labels[:2] = labels[1::-1]
    operands = [(index,) if shape else () for index, shape in enumerate(op.operands)]
    return factors_of(op, operands, [labels] * len(op.results))


# A part of a dimension may have the size 1, which squeeze would take away: so it is called as a reshape.
_SQUEEZE = Rule(reshape, _shape_argument("shape"), aten.reshape.default)
_RESHAPE = Rule(reshape, _shape_argument("size"))

RULES: Table = {
    aten.reshape.default: Rule(reshape, _shape_argument("shape")),
    aten.view.default: _RESHAPE,
    aten._unsafe_view.default: _RESHAPE,
    aten.view_copy.default: _RESHAPE,
    aten.flatten.using_ints: Rule(reshape),
    aten.ravel.default: Rule(reshape),
    aten.unflatten.int: Rule(reshape, _local_unflatten),
    aten.unsqueeze.default: Rule(reshape),
    aten.squeeze.default: _SQUEEZE,
    aten.squeeze.dim: _SQUEEZE,
    aten.squeeze.dims: _SQUEEZE,
    aten.permute.default: Rule(_permute),
    aten.transpose.int: _swap("dim0", "dim1"),
    aten.swapaxes.default: _swap("axis0", "axis1"),
    aten.swapdims.default: _swap("dim0", "dim1"),
    aten.t.default: Rule(_t),
    aten.movedim.int: Rule(_movedim),
    aten.movedim.intlist: Rule(_movedim),
    aten.moveaxis.int: Rule(_movedim),
    aten.moveaxis.intlist: Rule(_movedim),
    aten.expand.default: Rule(_expand, _shape_argument("size")),
    aten.broadcast_to.default: Rule(_expand, _shape_argument("size")),
    aten.expand_as.default: Rule(_expand),
    aten.diagonal.default: Rule(_diagonal),
    aten.repeat.default: Rule(_repeat, _local_repeats("repeats")),
    aten.tile.default: Rule(_repeat, _local_repeats("dims")),
    aten.repeat_interleave.self_int: Rule(_repeat_interleave, _local_interleave),
    aten.meshgrid.default: Rule(_meshgrid),
    aten.meshgrid.indexing: Rule(_meshgrid),
}
