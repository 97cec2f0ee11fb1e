"""Look-ups: the positions of an index tensor are independent, the dimension that is looked up is not.

A mask (booleans) looks up as many dimensions as it has, and gives one whose size only its values tell.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paracompile.layout.factors import Factor, Op, Operand, Rule, Shape
from paracompile.patterns.rules.labels import Label, Labels, Table, dim_of, equation, factors_of, mixing

aten = torch.ops.aten


def _index_select(op: Op) -> list[Factor]:
    rank = len(op.operands[0])
    if not rank:
        return []
    dim = dim_of(op, "dim", rank)
    result: list[Label] = [*range(rank)]
    result[dim] = "i"
    return factors_of(op, [mixing(range(rank), {dim}), ["i"] * len(op.operands[1])], [result])


def _equal_sizes(dim: int, shapes: Sequence[Shape]) -> list[Label]:
    """Labels of the dimensions in which all of the shapes agree, other than `dim`.

    gather and scatter take the first positions of a longer operand: no equal parts would hold those.
    """
    return [
        None if axis == dim or len(set(sizes)) > 1 else axis for axis, sizes in enumerate(zip(*shapes, strict=True))
    ]


def _gather(op: Op) -> list[Factor]:
    rank = len(op.operands[0])
    if not rank or len(op.operands[1]) != rank:
        return []
    dim = dim_of(op, "dim", rank)
    labels = _equal_sizes(dim, op.operands)
    looked_up = [*labels]
    looked_up[dim] = "i"
    return factors_of(op, [labels, looked_up], [looked_up])


def _take_along_dim(op: Op) -> list[Factor]:
    if op.arguments["dim"] is None:
        return factors_of(op, [[None] * len(op.operands[0]), ["i"]], [["i"]]) if len(op.operands[1]) == 1 else []
    rank = len(op.operands[0])
    dim = dim_of(op, "dim", rank)
    labels: list[Label] = [*mixing(range(rank), {dim})]
    looked_up = [*labels]
    looked_up[dim] = "i"
    return factors_of(op, [labels, looked_up], [looked_up])


def _scatter(op: Op) -> list[Factor]:
    rank = len(op.operands[0])
    if not rank or any(len(shape) != rank for shape in op.operands):
        return []
    labels = _equal_sizes(dim_of(op, "dim", rank), op.operands)
    return factors_of(op, [labels] * len(op.operands), [labels])


def _index_add(op: Op) -> list[Factor]:
    rank = len(op.operands[0])
    labels = mixing(range(rank), {dim_of(op, "dim", rank)} if rank else ())
    source = op.arguments.get("source")
    operands: list[Labels] = [labels, [None] * len(op.operands[1])]
    if isinstance(source, Operand):
        operands.append(labels if len(op.operands[source.index]) == rank else [None] * len(op.operands[source.index]))
    return factors_of(op, operands, [labels])


def _indexed(op: Op) -> tuple[list[Label], list[Label], list[Labels]] | None:
    """Labels of self, of `self[indices]`, and of each index tensor."""
    rank = len(op.operands[0])
    places: list[int] = []
    index_labels: list[Labels] = []
    found: list[Label] = []
    dim = 0
    for index in op.arguments["indices"]:
        if index is None:
            dim += 1
            continue
        shape = op.operands[index.index]
        is_mask = _is_mask(op, index.index)
        looked_up = len(shape) if is_mask else 1
        places += range(dim, dim + looked_up)
        dim += looked_up
        index_labels.append([None] * looked_up if is_mask else [("i", axis) for axis in range(-len(shape), 0)])
        found = max(found, [None] if is_mask else [*index_labels[-1]], key=len)
    if not places or places[-1] >= rank:
        return None
    if any(_is_mask(op, operand) for operand in range(1, 1 + len(index_labels))):
        found[-1] = None  # positions of other indices beside a mask's go with those that it finds
        index_labels = [[None if label == ("i", -1) else label for label in labels] for labels in index_labels]
    labels: list[Label] = [None if dim in places else dim for dim in range(rank)]
    rest = [label for label in labels if label is not None]
    # NumPy's rule: neighbouring indices stay where they are, others come to the front.
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    return labels, [*rest[:first], *found, *rest[first:]], index_labels


def _is_mask(op: Op, operand: int) -> bool:
    return op.dtypes[operand] is torch.bool


def _index(op: Op) -> list[Factor]:
    labelled = _indexed(op)
    if labelled is None:
        return []
    labels, result, indices = labelled
    return factors_of(op, [labels, *indices], [result])


def _index_put(op: Op) -> list[Factor]:
    labelled = _indexed(op)
    if labelled is None:
        return []
    labels, found, indices = labelled
    values = op.shape("values")
    if len(values) > len(found):
        return []
    written = found[len(found) - len(values) :]
    one_for_all = all(size == 1 for size, label in zip(values, written, strict=True) if label is None)
    if one_for_all and len(indices) == 1 and _is_mask(op, 1):  # what each position gets does not depend on the others
        indices = [[("i", dim) for dim, label in enumerate(labels) if label is None]]
        labels = [("i", dim) if label is None else label for dim, label in enumerate(labels)]
    return factors_of(op, [labels, *indices, written], [labels])


RULES: Table = {
    aten.embedding.default: Rule(equation("_e,...->...e")),
    aten.index_select.default: Rule(_index_select),
    aten.gather.default: Rule(_gather),
    aten.take_along_dim.default: Rule(_take_along_dim),
    aten.scatter.src: Rule(_scatter),
    aten.scatter.value: Rule(_scatter),
    aten.scatter_add.default: Rule(_scatter),
    aten.scatter_reduce.two: Rule(_scatter),
    aten.index_add.default: Rule(_index_add),
    aten.index_copy.default: Rule(_index_add),
    aten.index_fill.int_Scalar: Rule(_index_add),
    aten.index.Tensor: Rule(_index),
    aten.index_put.default: Rule(_index_put),
}
