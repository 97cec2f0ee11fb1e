"""Propagation: from the queries of attention to every value that the same tokens run through.

The query length of an attention IS a token dimension. From there the place of the tokens is carried forward and
backward through each operator's factors, to a fixed point; no operator is known here. A value has at most one place:
the heaviest attention speaks first, and where a later one wants another dimension of the same value, that use is
found not to match and is gathered.

Where convolutions do the work instead (an image's or a video's decoder), a spatial dimension of their results is the
seed, and what is cut are its positions where they are coarsest: rows of the latent image. They lie side by side, so
that a rank's neighbours hold what its windows reach over to, and segments are not taken apart.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from paracompile.layout.factors import Factor, Place, Span, project, within
from paracompile.layout.graph import Operation, Value, shape_of
from paracompile.layout.halos import Halo


@dataclass(frozen=True)
class Attention:
    """What the layout must know of an attention operator: which operands are queries, keys and values.

    attributes:
        operation: the operator; its rule covers what needs no communication (the batch, the query length).
        query, key, value: operand numbers of tensors of shape (*batch, heads, tokens, head size).
        mask: operand number of a mask that broadcasts to (*batch, heads, query tokens, key tokens), or None.
        is_causal: query i sees keys 0..i only.
        flops: the work, to tell the main attentions from small ones.
    """

    operation: Operation
    query: int
    key: int
    value: int
    mask: int | None
    is_causal: bool
    flops: int

    @property
    def name(self) -> str:
        return self.operation.node.name


@dataclass(frozen=True)
class Cut:
    """How an operation may be cut along the tokens: one factor, and the tokens' place in it and in every value.

    attributes:
        factor: the factor that the tokens run along.
        token: their place in the factor.
        operands: the place each operand must have; None for one that must be whole.
        results: the place each result has; none where the ranks add up theirs.
        gathered: operands that are taken as if they were whole: cut anew, as this operation has them.
    """

    factor: Factor
    token: Place
    operands: tuple[Place | None, ...]
    results: tuple[Place, ...]
    gathered: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Spatial:
    """A spatial dimension as the seed, counted from the last: -1 is the width, -2 the height, -3 the frames.

    attributes:
        dim: the dimension.
        values: results of convolutions, the coarsest first.
    """

    dim: int
    values: tuple[Value, ...]


Seed = Literal["tokens", "batch"] | Spatial


def propagate(
    operations: Sequence[Operation], attentions: Iterable[Attention], seed: Seed = "tokens"
) -> dict[Value, Place]:
    """The place of what is cut, as the seed says, in every value that it runs through."""
    touching: dict[Value, list[tuple[Operation, int, bool]]] = defaultdict(list)
    for operation in operations:
        for slot, value in enumerate(operation.operands):
            touching[value].append((operation, slot, True))
        for slot, value in enumerate(operation.results):
            touching[value].append((operation, slot, False))

    places: dict[Value, Place] = {}
    for starts in _starts(attentions, seed):
        first = next(iter(starts))
        if places.get(first) not in (None, starts[first]):
            continue
        reached: deque[Value] = deque()
        for value, start in starts.items():
            if start is not None and value not in places:
                places[value] = start
                reached.append(value)
        while reached:
            value = reached.popleft()
            for operation, slot, is_operand in touching[value]:
                for other, place in _carry(operation, slot, is_operand, places[value], seed):
                    if other not in places:
                        places[other] = place
                        reached.append(other)
    return places


def _starts(attentions: Iterable[Attention], seed: Seed) -> Iterator[dict[Value, Place | None]]:
    """Values that begin together, with the place in each; where the first one has another already, none of them do."""
    if isinstance(seed, Spatial):
        for value in seed.values:
            shape = shape_of(value)
            yield {value: Place(len(shape) + seed.dim, shape[seed.dim])}
        return
    for attention in sorted(attentions, key=lambda item: -item.flops):
        query = attention.operation.operands[attention.query]
        result = attention.operation.results[0]  # also where no rule leads there: a causal one has none for its queries
        if len(shape_of(query)) >= 3:
            yield {value: _start(value, result, seed) for value in (query, result)}


def _start(value: Value, result: Value, seed: Literal["tokens", "batch"]) -> Place | None:
    """Where an attention's queries or result hold what is cut; None in queries that are broadcast along it."""
    shape, whole_shape = shape_of(value), shape_of(result)
    dim = -2 if seed == "tokens" else -len(whole_shape)
    if len(shape) + dim < 0 or shape[dim] != whole_shape[dim]:
        return None
    return Place(len(shape) + dim, shape[dim])


def _factors(operation: Operation, seed: Seed) -> Sequence[Factor]:
    """The factors of an operation along which something may be cut that started at this seed."""
    if not isinstance(seed, Spatial):
        return [factor for factor in operation.factors if factor.is_independent]
    factors = [factor for factor in operation.factors if not factor.sums and not factor.exchanges]
    return [factor for factor in factors if factor.halo is not None or not _has_windows(factor)]


def _has_windows(factor: Factor) -> bool:
    return any(span is not None and span.length != factor.size for span in factor.operands + factor.results)


def _carry(operation: Operation, slot: int, is_operand: bool, place: Place, seed: Seed) -> list[tuple[Value, Place]]:
    """Where what is cut, found at `place` in one slot of the operation, sits in its other values."""
    carried: list[tuple[Value, Place]] = []
    for factor in _factors(operation, seed):
        if factor.halo is not None:
            if is_operand and slot == 0 and (made := forward(factor.halo, place)) is not None:
                carried.append((operation.results[0], made))
            elif not is_operand and (needed := backward(factor.halo, place)) is not None:
                carried.append((operation.operands[0], needed))
            continue
        span = factor.operands[slot] if is_operand else factor.results[slot]
        token = within(place, span, factor.size) if span is not None else None
        if token is None:
            continue
        values = zip(operation.operands + operation.results, factor.operands + factor.results, strict=True)
        for value, target in values:
            found = project(token, target, factor.size) if target is not None else None
            if found is not None:
                carried.append((value, found))
    return carried


def forward(halo: Halo, place: Place) -> Place | None:
    """Where a result has what its operand has at `place`; None where it is not along the halo, or not in whole steps.

    Which rank holds an edge row is free, and chosen so that a window reaches as far up as down.
    """
    if not _lies_along(halo, halo.size, place) or place.inner * halo.scale % halo.step:
        return None
    return _place(place, place.inner * halo.scale // halo.step, halo.forward(place.before), halo.size_out)


def backward(halo: Halo, place: Place) -> Place | None:
    """The inverse: where the operand has what the result has at `place`."""
    if not _lies_along(halo, halo.size_out, place) or place.inner * halo.step % halo.scale:
        return None
    return _place(place, place.inner * halo.step // halo.scale, halo.backward(place.before), halo.size)


def _lies_along(halo: Halo, size: int, place: Place) -> bool:
    return place.dim == halo.dim and place.outer == 1 and place.size == size


def _place(place: Place, inner: int, before: int, size: int) -> Place:
    return Place(place.dim, place.length, 1, inner, before, size - before - place.length * inner)


def made_in_parts(operation: Operation, cut: Cut) -> tuple[Value, ...]:
    """The results that ranks hold in parts; none where they add them up."""
    return () if cut.factor.sums else operation.results


def sum_of(operation: Operation, places: Mapping[Value, Place]) -> Cut | None:
    """How the operation is cut if each rank sums up its part of what it sums over; None where that is not cut."""
    for factor in operation.factors if operation.results else ():
        if not factor.sums:
            continue
        slots = [slot for slot, span in enumerate(factor.operands) if span and operation.operands[slot] in places]
        for slot in slots:
            span = factor.operands[slot]
            token = within(places[operation.operands[slot]], span, factor.size) if span is not None else None
            if token is None or token.has_margins:
                continue
            operands = tuple(_operand_place(token, span, factor.size) for span in factor.operands)
            if all((place is None) == (span is None) for place, span in zip(operands, factor.operands, strict=True)):
                return Cut(factor, token, operands, ())
    return None


def cut_of(operation: Operation, places: Mapping[Value, Place], seed: Seed = "tokens") -> Cut | None:
    """How the operation is cut if its results are to have their places; None where no factor allows it.

    Where operands are exchanged (an attention's keys) no other factor will do, as they would be gathered, or the cut
    would be wrong (a causal mask). Rows of a batch that are tokens of another attention (a video's frames, between
    space and time) are not exchanged: that attention is whole. Of images queries are cut, and their keys are gathered.
    """
    if not operation.results or any(result not in places for result in operation.results):
        return None
    factors = _factors(operation, seed)
    exchanged = [factor for factor in operation.factors if _are_exchanged(factor, operation, places)]
    if exchanged and not isinstance(seed, Spatial):
        factors = exchanged if seed == "tokens" else []
    for factor in factors:
        if factor.halo is not None:
            result = places[operation.results[0]]
            operand = backward(factor.halo, result)
            if operand is not None:
                others = (None,) * (len(operation.operands) - 1)
                return Cut(factor, Place(0, result.length), (operand, *others), (result,))
            continue
        token = within(places[operation.results[0]], factor.results[0], factor.size)
        if token is None:
            continue
        results = tuple(project(token, span, factor.size) for span in factor.results)
        if results != tuple(places[result] for result in operation.results):
            continue
        operands = tuple(_operand_place(token, span, factor.size) for span in factor.operands)
        if all((place is None) == (span is None) for place, span in zip(operands, factor.operands, strict=True)):
            for slot, span in enumerate(factor.exchanges):
                if span is not None:
                    operands = (*operands[:slot], _all_of(span), *operands[slot + 1 :])
            return Cut(factor, token, operands, tuple(place for place in results if place is not None))
    return None


def _operand_place(token: Place, span: Span | None, size: int) -> Place | None:
    return None if span is None else project(token, span, size)


def _are_exchanged(factor: Factor, operation: Operation, places: Mapping[Value, Place]) -> bool:
    """Whether operands are cut along ranges of their own, as the operand with the factor itself is along that."""

    def along(spans: Sequence[Span | None]) -> list[bool]:
        cut = zip(operation.operands, spans, strict=True)
        return [places.get(value) == _all_of(span) for value, span in cut if span is not None]

    return any(factor.exchanges) and all(along(factor.operands)) and any(along(factor.exchanges))


def _all_of(span: Span) -> Place:
    return Place(span.dim, span.length)


def accepts(cut: Cut, slot: int, operation: Operation, places: Mapping[Value, Place]) -> bool:
    """Whether the operation, when cut, can take this operand as it is cut where it is made.

    What takes a window takes it from whoever holds it. Every other operation takes just what its factor says.
    """
    value = operation.operands[slot]
    if slot in cut.gathered:
        return False
    if cut.factor.halo is not None and slot == 0 and (place := places.get(value)) is not None:
        return _lies_along(cut.factor.halo, cut.factor.halo.size, place) and place.length == cut.results[0].length
    return places.get(value) == cut.operands[slot]
