"""Propagation: from the queries of attention to every value that the same tokens run through.

The query length of an attention IS a token dimension. From there the place of the tokens is carried forward and
backward through each operator's factors, to a fixed point; no operator is known here. A value has at most one place:
the heaviest attention speaks first, and where a later one wants another dimension of the same value, that use is
found not to match and is gathered.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from paracompile.layout.factors import Factor, Place, Span, project, whole, within
from paracompile.layout.graph import Operation, Value, shape_of


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
        results: the place each result has.
        gathered: operands that are taken as if they were whole: cut anew, as this operation has them.
    """

    factor: Factor
    token: Place
    operands: tuple[Place | None, ...]
    results: tuple[Place, ...]
    gathered: frozenset[int] = frozenset()


Seed = Literal["tokens", "batch"]


def propagate(
    operations: Sequence[Operation], attentions: Iterable[Attention], seed: Seed = "tokens"
) -> dict[Value, Place]:
    """The place of the tokens (or of the batch's rows, `seed="batch"`) in every value that they run through."""
    touching: dict[Value, list[tuple[Operation, int, bool]]] = defaultdict(list)
    for operation in operations:
        for slot, value in enumerate(operation.operands):
            touching[value].append((operation, slot, True))
        for slot, value in enumerate(operation.results):
            touching[value].append((operation, slot, False))

    places: dict[Value, Place] = {}
    for attention in sorted(attentions, key=lambda item: -item.flops):
        query = attention.operation.operands[attention.query]
        result = attention.operation.results[0]  # also where no rule leads there: a causal one has none for its queries
        if len(shape_of(query)) < 3:
            continue
        starts = {value: _start(value, result, seed) for value in (query, result)}
        if places.get(query) not in (None, starts[query]):
            continue
        reached: deque[Value] = deque()
        for value, start in starts.items():
            if start is not None and value not in places:
                places[value] = start
                reached.append(value)
        while reached:
            value = reached.popleft()
            for operation, slot, is_operand in touching[value]:
                for other, place in _carry(operation, slot, is_operand, places[value]):
                    if other not in places:
                        places[other] = place
                        reached.append(other)
    return places


def _start(value: Value, result: Value, seed: Seed) -> Place | None:
    """Where an attention's queries or result hold what is cut; None in queries that are broadcast along it."""
    shape, whole_shape = shape_of(value), shape_of(result)
    dim = -2 if seed == "tokens" else -len(whole_shape)
    if len(shape) + dim < 0 or shape[dim] != whole_shape[dim]:
        return None
    return Place(len(shape) + dim, shape[dim])


def _carry(operation: Operation, slot: int, is_operand: bool, place: Place) -> list[tuple[Value, Place]]:
    """Where the tokens, found at `place` in one slot of the operation, sit in its other values."""
    carried: list[tuple[Value, Place]] = []
    for factor in operation.factors:
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


def cut_of(
    operation: Operation, places: Mapping[Value, Place], attention: Attention | None, seed: Seed = "tokens"
) -> Cut | None:
    """How the operation is cut if its results are to have their places; None where no factor allows it.

    An attention that exchanges tokens is cut along its queries whatever its rule says: a rank is given all that its
    heads need, also where an ordinary cut would be wrong (a causal mask). Rows of a batch that are tokens of another
    attention (a video's frames, between space and time) are not exchanged: that attention is whole.
    """
    if not operation.results or any(result not in places for result in operation.results):
        return None
    factors = operation.factors
    if attention is not None and exchanges(attention, places):
        factors = [_query_factor(attention)] if seed == "tokens" else []
    for factor in factors:
        token = within(places[operation.results[0]], factor.results[0], factor.size)
        if token is None:
            continue
        results = tuple(project(token, span, factor.size) for span in factor.results)
        if results != tuple(places[result] for result in operation.results):
            continue
        operands = tuple(_operand_place(token, span, factor.size) for span in factor.operands)
        if all((place is None) == (span is None) for place, span in zip(operands, factor.operands, strict=True)):
            return Cut(factor, token, operands, tuple(place for place in results if place is not None))
    return None


def _query_factor(attention: Attention) -> Factor:
    operation = attention.operation
    query = whole(shape_of(operation.operands[attention.query]), -2)
    result = whole(shape_of(operation.results[0]), -2)
    operands = tuple(query if slot == attention.query else None for slot in range(len(operation.operands)))
    return Factor(query.length, operands, (result,))


def _operand_place(token: Place, span: Span | None, size: int) -> Place | None:
    return None if span is None else project(token, span, size)


def exchanges(attention: Attention, places: Mapping[Value, Place]) -> bool:
    """Whether the keys are tokens too, so that a rank's queries need other ranks' keys."""
    operands = attention.operation.operands
    keys = (operands[attention.key], operands[attention.value])
    return _at_tokens(operands[attention.query], places) and any(_at_tokens(key, places) for key in keys)


def _at_tokens(value: Value, places: Mapping[Value, Place]) -> bool:
    shape = shape_of(value)
    return len(shape) >= 3 and places.get(value) == Place(len(shape) - 2, shape[-2])


def accepts(
    cut: Cut, slot: int, operation: Operation, attention: Attention | None, places: Mapping[Value, Place]
) -> bool:
    """Whether the operation, when cut, can take this operand as it is cut where it is made.

    An attention that exchanges takes cut keys and values, and its mask whole (it is put in the order in which keys
    arrive). Every other operation takes just what its factor says.
    """
    value = operation.operands[slot]
    if slot in cut.gathered:
        return False
    if attention is not None and exchanges(attention, places) and slot != attention.query:
        return slot != attention.mask and _at_tokens(value, places)
    return places.get(value) == cut.operands[slot]
