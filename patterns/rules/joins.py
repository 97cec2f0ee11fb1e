"""Operators that join and part dimensions: cat, stack, split, slice and their scatters.

Along the dimension that is joined the positions of the whole are the factor, and each part holds a window of them:

    cat     [0, a) [a, a+b) -> [0, a+b)          split    [0, a+b) -> [0, a) [a, a+b)
    slice   [0, n) -> [s, e)                     slice_scatter    [0, n), [s, e) -> [0, n)

The other dimensions are independent, as they are in stack, unbind, select and in slices with a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from paracompile.layout.factors import Factor, Local, Op, Operand, Rule, Shape, Span, whole
from paracompile.patterns.rules import halos
from paracompile.patterns.rules.labels import Table, dim_of, dropping, factors_of, mixing

aten = torch.ops.aten


def _windows(shapes: tuple[Shape, ...], dim: int) -> tuple[Span, ...]:
    starts = [sum(shape[dim] for shape in shapes[:index]) for index in range(len(shapes))]
    return tuple(Span(dim, start, shape[dim]) for start, shape in zip(starts, shapes, strict=True))


def _cat(op: Op) -> list[Factor]:
    (result,) = op.results
    rank = len(result)
    if any(len(shape) != rank for shape in op.operands) or 0 in result:  # torch skips operands of the shape (0,)
        return []
    dim = dim_of(op, "dim", rank)
    labels = mixing(range(rank), {dim})
    factors = factors_of(op, [labels] * len(op.operands), [labels])
    if result[dim] > 1:
        windows = tuple(window if window.length else None for window in _windows(op.operands, dim))
        factors.append(Factor(result[dim], windows, (whole(result, dim),)))
    return factors


def _stack(op: Op) -> list[Factor]:
    labels: list[int | None] = list(range(len(op.operands[0])))
    joined = labels.copy()
    joined.insert(dim_of(op, "dim", len(op.results[0])), None)
    return factors_of(op, [labels] * len(op.operands), [joined])


def _split(op: Op) -> list[Factor]:
    (operand,) = op.operands
    dim = dim_of(op, "dim", len(operand))
    labels = mixing(range(len(operand)), {dim})
    factors = factors_of(op, [labels], [labels] * len(op.results))
    windows = _windows(op.results, dim)
    if operand[dim] > 1 and windows[-1].start + windows[-1].length == operand[dim] and 0 not in operand:
        factors.append(Factor(operand[dim], (whole(operand, dim),), windows))
    return factors


def _local_split(op: Op, local: Local) -> dict[str, Any]:
    dim = op.arguments["dim"]
    return {"split_sizes": [result[dim] for result in local.results], "dim": dim}


def _dropped(op: Op) -> list[Factor]:
    """unbind and select: the dimension is gone."""
    rank = len(op.operands[0])
    labels = dropping(range(rank), {dim_of(op, "dim", rank)})
    return factors_of(op, [mixing(range(rank), {dim_of(op, "dim", rank)})], [labels] * len(op.results))


def _slice_bounds(op: Op, dim: int) -> tuple[int, int, int]:
    return _bounds(op, dim, op.results[0][dim])


def _bounds(op: Op, dim: int, count: int) -> tuple[int, int, int]:
    """Where a slice of `count` positions begins, one step behind its last position, and its step."""
    size, start, step = op.operands[0][dim], op.arguments["start"], op.arguments["step"]
    start = 0 if start is None else start
    start = min(max(start + size, 0) if start < 0 else start, size)
    return start, start + count * step, step


def _narrow_bounds(op: Op, dim: int) -> tuple[int, int, int]:
    size = op.operands[0][dim]
    start = op.arguments["start"]
    if isinstance(start, Operand):
        return 0, 0, 0
    start = start + size if start < 0 else start
    return start, start + op.arguments["length"], 1


Bounds = Callable[[Op, int], tuple[int, int, int]]


def _sliced(bounds: Bounds) -> Callable[[Op], list[Factor]]:
    def factors(op: Op) -> list[Factor]:
        operand = op.operands[0]
        dim = dim_of(op, "dim", len(operand))
        labels = mixing(range(len(operand)), {dim})
        listed = factors_of(op, [labels], [labels])
        start, end, step = bounds(op, dim)
        if step == 1 and end > start and operand[dim] > 1 and 0 not in operand:
            listed.append(Factor(operand[dim], (whole(operand, dim),), (Span(dim, start, end - start),)))
        if end > start and (start, end, step) != (0, operand[dim], 1):
            listed += halos.slices(op, dim, start, step)
        return listed

    return factors


def _slice_scatter(op: Op) -> list[Factor]:
    (result,) = op.results
    dim = dim_of(op, "dim", len(result))
    labels = mixing(range(len(result)), {dim})
    listed = factors_of(op, [labels, labels], [labels])
    start, end, step = _bounds(op, dim, op.operands[1][dim])
    if step == 1 and end > start and result[dim] > 1 and 0 not in result:
        listed.append(Factor(result[dim], (whole(result, dim), Span(dim, start, end - start)), (whole(result, dim),)))
    return listed


def _select_scatter(op: Op) -> list[Factor]:
    (result,) = op.results
    dim = dim_of(op, "dim", len(result))
    labels = mixing(range(len(result)), {dim})
    return factors_of(op, [labels, dropping(labels, {dim})], [labels])


def _is_cut(op: Op, local: Local, dim: int) -> bool:
    return op.operands[0][dim] != local.operands[0][dim]


def _local_slice(op: Op, local: Local) -> dict[str, Any]:
    dim = op.arguments["dim"]
    if not _is_cut(op, local, dim):
        return {}
    start = local.result_starts[0]
    return {"start": start, "end": start + local.results[0][dim]}


def _local_narrow(op: Op, local: Local) -> dict[str, Any]:
    dim = op.arguments["dim"]
    if not _is_cut(op, local, dim):
        return {}
    return {"start": local.result_starts[0], "length": local.results[0][dim]}


def _local_scatter(op: Op, local: Local) -> dict[str, Any]:
    dim = op.arguments["dim"]
    if not _is_cut(op, local, dim):
        return {}
    start = local.operand_starts[1]
    return {"start": start, "end": start + local.operands[1][dim]}


_SPLIT = Rule(_split, _local_split, aten.split_with_sizes.default)

RULES: Table = {
    aten.cat.default: Rule(_cat),
    aten.concat.default: Rule(_cat),
    aten.concatenate.default: Rule(_cat),
    aten.stack.default: Rule(_stack),
    aten.split.Tensor: _SPLIT,
    aten.split.sizes: _SPLIT,
    aten.split_with_sizes.default: _SPLIT,
    aten.unsafe_split.Tensor: _SPLIT,
    aten.unsafe_split_with_sizes.default: _SPLIT,
    aten.chunk.default: _SPLIT,
    aten.unsafe_chunk.default: _SPLIT,
    aten.tensor_split.sections: _SPLIT,
    aten.tensor_split.indices: _SPLIT,
    aten.unbind.int: Rule(_dropped),
    aten.select.int: Rule(_dropped),
    aten.slice.Tensor: Rule(_sliced(_slice_bounds), _local_slice, on_window=halos.on_sliced_window),
    aten.narrow.default: Rule(_sliced(_narrow_bounds), _local_narrow, on_window=halos.on_narrowed_window),
    aten.slice_scatter.default: Rule(_slice_scatter, _local_scatter),
    aten.select_scatter.default: Rule(_select_scatter),
}
