"""An operation on one rank's part: the same operator, or its sibling, with its size arguments made local."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from paracompile.layout.factors import Local, Op, Span
from paracompile.layout.graph import Operation
from paracompile.layout.places import Cut, cut_of
from paracompile.layout.plan import Sharding
from paracompile.patterns.rules import rule_for

__all__ = ["localised"]


def localised(
    operation: Operation, operands: Sequence[Sharding | None], results: Sequence[Sharding], rank: int
) -> Operation:
    """The operation as `rank` runs it along one axis.

    args:
        operands, results: how each is cut; None for an operand that is whole.
    """
    op, rule = operation.op, operation.rule
    assert op is not None
    assert rule is not None
    places = {value: sharding.place for value, sharding in zip(operation.results, results, strict=True)}
    cut = cut_of(operation, places)
    assert cut is not None
    segments = _segments(cut, [*operands, *results])

    def start(span: Span | None) -> int:
        """Where the window of a span begins among the rank's positions of the factor."""
        if span is None or span.length == cut.factor.size:
            return 0
        before, local = 0, 0
        for length in segments:
            if before * cut.token.inner >= span.start:
                break
            before += length
            local += results[0].shares.of(length)[rank]
        return local * cut.token.inner

    local = Local(
        operands=tuple(
            shape if sharding is None else sharding.local_shape(shape, rank)
            for shape, sharding in zip(op.operands, operands, strict=True)
        ),
        results=tuple(sharding.local_shape(shape, rank) for shape, sharding in zip(op.results, results, strict=True)),
        operand_starts=tuple(map(start, cut.factor.operands)),
        result_starts=tuple(map(start, cut.factor.results)),
    )
    changed = rule.localise(op, local) if rule.localise is not None else {}
    target = rule.local_target or op.target
    there = Op(target, {**op.arguments, **changed}, local.operands, local.results, op.dtypes)
    return Operation(operation.node, there, rule_for(target), operation.operands, operation.results)


def _segments(cut: Cut, shardings: Sequence[Sharding | None]) -> tuple[int, ...]:
    """The segments of all of the factor's positions, from any slot that spans it or from the joined windows."""
    edges = {0, cut.token.length}
    for span, sharding in zip(cut.factor.operands + cut.factor.results, shardings, strict=True):
        if span is None or sharding is None:
            continue
        edge = 0 if span.length == cut.factor.size else span.start // cut.token.inner
        for length in sharding.segments:
            edge += length
            edges |= {edge - length, edge}
    return tuple(stop - start for start, stop in pairwise(sorted(edges)))
