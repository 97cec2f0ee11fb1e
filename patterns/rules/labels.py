"""The algebra of the rules: dimensions carry labels, and a label names an index range.

`linear` is written `...k, nk, n -> ...n`. A label is a factor that may be cut over ranks when

- every result has it exactly once (a label that a result lacks would be a partial sum there), and
- every operand has it once, or lacks it, or broadcasts it (size 1): such an operand stays whole.

A label that occurs twice in a value is a diagonal and no factor. `None` labels a dimension that is mixed, reduced or
not understood. So a rule only has to say which dimensions belong together, never which of them may be cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from paracompile.layout.factors import Factor, Op, Rule, Shape, Span, whole
from paracompile.torch_private import OpOverload

Label = Hashable | None
Labels = Sequence[Label]
Target = OpOverload[..., Any]
Table = dict[Target, Rule]


def factors_of(op: Op, operands: Iterable[Labels], results: Iterable[Labels]) -> list[Factor]:
    """The factors among the labels. Operands beyond those labelled have no labels at all."""
    operands, results = list(operands), list(results)
    operands += [()] * (len(op.operands) - len(operands))
    factors = []
    for label in dict.fromkeys(results[0]) if results else ():
        if label is None or 0 in op.results[0]:
            continue
        spans_out = [_place(label, labels, shape) for labels, shape in zip(results, op.results, strict=True)]
        size = next((span.length for span in spans_out if span), 0)
        if size < 2 or any(span is None or span.length != size for span in spans_out):
            continue
        if any(list(labels).count(label) > 1 for labels in operands):
            continue
        spans_in = [_place(label, labels, shape) for labels, shape in zip(operands, op.operands, strict=True)]
        spans_in = [None if span and span.length == 1 else span for span in spans_in]
        if all(span is None or span.length == size for span in spans_in):
            factors.append(Factor(size, tuple(spans_in), tuple(span for span in spans_out if span)))
    return factors


def sums_of(op: Op, operands: Iterable[Labels], result: Labels) -> list[Factor]:
    """The factors that the result lacks, of a product or a sum: it is the sum over their positions.

    Only for operators that are linear in every operand, as what an operand adds would be added by each rank.
    """
    operands = list(operands)
    factors: list[Factor] = []
    if any(dtype.is_complex for dtype in op.dtypes):
        return factors
    for label in dict.fromkeys(label for labels in operands for label in labels):
        if label is None or label in result or any(list(labels).count(label) > 1 for labels in operands):
            continue
        spans = [_place(label, labels, shape) for labels, shape in zip(operands, op.operands, strict=True)]
        size = max(span.length for span in spans if span)
        spans = [None if span and span.length == 1 else span for span in spans]
        if size > 1 and all(span is None or span.length == size for span in spans):
            factors.append(Factor(size, tuple(spans), (), sums=True))
    return factors


def _place(label: Label, labels: Labels, shape: Shape) -> Span | None:
    if len(labels) not in (0, len(shape)):
        raise ValueError(f"{len(labels)} labels for the shape {shape}")
    found = [dim for dim, other in enumerate(labels) if other == label]
    return whole(shape, found[0]) if len(found) == 1 else None


def aligned(shape: Shape) -> Labels:
    """Labels that broadcast: -1 for the last dimension, -2 for the one before."""
    return tuple(range(-len(shape), 0))


def mixing(labels: Labels, dims: Iterable[int]) -> Labels:
    """`labels` with the dimensions `dims` mixed."""
    dims = set(dims)
    return tuple(None if dim in dims else label for dim, label in enumerate(labels))


def dropping(labels: Labels, dims: Iterable[int]) -> Labels:
    """`labels` without the dimensions `dims`."""
    dims = set(dims)
    return tuple(label for dim, label in enumerate(labels) if dim not in dims)


def dims_of(op: Op, name: str, rank: int) -> set[int]:
    """The dimensions that the argument `name` gives; all of them where it is absent, None or empty."""
    value = op.arguments.get(name)
    if value is None or value == []:
        return set(range(rank))
    return {dim % max(rank, 1) for dim in ([value] if isinstance(value, int) else value)}


def dim_of(op: Op, name: str, rank: int) -> int:
    """The one dimension that the argument `name` gives."""
    dim = op.arguments[name]
    assert isinstance(dim, int)
    return dim % max(rank, 1)


def equation(text: str) -> Callable[[Op], list[Factor]]:
    """A rule in einsum's notation; `...` stands for dimensions that broadcast, `_` for a mixed one.

    An operand of fewer dimensions than letters has lost its leading ones (they broadcast), and optional operands may be
    missing at the end.
    """
    left, right = text.replace(" ", "").split("->")

    def factors(op: Op) -> list[Factor]:
        operands = [_spell(term, shape) for term, shape in zip(left.split(","), op.operands, strict=False)]
        return factors_of(op, operands, [_spell(right, shape) for shape in op.results])

    return factors


def product(text: str) -> Callable[[Op], list[Factor]]:
    """A product of all operands, in the same notation: letters that the result lacks are summed over."""
    left, right = text.replace(" ", "").split("->")

    def factors(op: Op) -> list[Factor]:
        operands = [_spell(term, shape) for term, shape in zip(left.split(","), op.operands, strict=True)]
        result = _spell(right, op.results[0])
        return factors_of(op, operands, [result]) + sums_of(op, operands, result)

    return factors


def _spell(term: str, shape: Shape) -> Labels:
    before, dots, after = term.partition("...")
    middle = range(len(before) + len(after) - len(shape), 0) if dots else ()
    labels: list[Label] = [*before, *middle, *after]
    return tuple(None if label == "_" else label for label in labels[len(labels) - len(shape) :])
