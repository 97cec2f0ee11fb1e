"""Segments: at which edges the tokens of each value are cut apart before each piece is shared out over the ranks.

A joint sequence is [text, image]: `cat` joins it, `split` and slices take it apart, and a rank holds
[its text, its image]. So the edges of every `cat`, `split` and slice that a value takes part in are edges of the value,
and of every value that must be cut alike. They are collected to a fixed point over the operations' windows.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from paracompile.layout.factors import Factor, Place, Span
from paracompile.layout.graph import Operation, Value, shape_of
from paracompile.layout.places import Attention, Cut, accepts, exchanges

Lengths = tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """Positions `[start, start + length)` of an operation's tokens, as one of its slots holds them."""

    slot: int
    start: int
    length: int


@dataclass(frozen=True)
class Segments:
    """The segments of every value that is cut, and of every operand that is cut on entering an operation.

    attributes:
        values: segment lengths of each cut value, in order.
        operands: segment lengths of operands by operation and slot.
    """

    values: Mapping[Value, Lengths]
    operands: Mapping[tuple[Operation, int], Lengths]


def find_segments(
    chosen: Iterable[Operation],
    cuts: Mapping[Operation, Cut],
    attentions: Mapping[Operation, Attention],
    places: Mapping[Value, Place],
) -> Segments:
    """The segments of all values of the chosen operations."""
    groups: list[tuple[Operation, list[Window]]] = []
    for operation in chosen:
        groups.extend((operation, windows) for windows in _windows(operation, cuts, attentions, places))
    made = {result for operation, _ in groups for result in operation.results}

    def value_in(operation: Operation, slot: int) -> Value | None:
        """The cut value in the slot, or None if it is cut only on entering the operation."""
        count = len(operation.operands)
        if slot >= count:
            return operation.results[slot - count]
        value = operation.operands[slot]
        cut_alike = accepts(cuts[operation], slot, operation, attentions.get(operation), places)
        return value if value in made and cut_alike else None

    edges: dict[Value, set[int]] = defaultdict(set)
    seen_by: dict[Value, list[int]] = defaultdict(list)
    for number, (operation, windows) in enumerate(groups):
        for window in windows:
            value = value_in(operation, window.slot)
            if value is not None:
                seen_by[value].append(number)

    def edges_of(number: int) -> set[int]:
        operation, windows = groups[number]
        found: set[int] = set()
        for window in windows:
            value = value_in(operation, window.slot)
            found |= {window.start, window.start + window.length}
            found |= {window.start + edge for edge in edges[value]} if value is not None else set()
        return found

    waiting = deque(range(len(groups)))
    queued = set(waiting)
    while waiting:
        number = waiting.popleft()
        queued.discard(number)
        operation, windows = groups[number]
        found = edges_of(number)
        for window in windows:
            value = value_in(operation, window.slot)
            if value is None:
                continue
            inside = {edge - window.start for edge in found if 0 <= edge - window.start <= window.length}
            if not inside <= edges[value]:
                edges[value] |= inside
                again = [other for other in seen_by[value] if other not in queued]
                waiting.extend(again)
                queued.update(again)

    operands: dict[tuple[Operation, int], Lengths] = {}
    for number, (operation, windows) in enumerate(groups):
        found = edges_of(number)
        for window in windows:
            if window.slot < len(operation.operands):
                inside = {edge - window.start for edge in found if 0 <= edge - window.start <= window.length}
                operands[operation, window.slot] = _lengths(inside)
    return Segments({value: _lengths(found) for value, found in edges.items()}, operands)


def _lengths(edges: set[int]) -> Lengths:
    ordered = sorted(edges)
    return tuple(stop - start for start, stop in pairwise(ordered))


def _windows(
    operation: Operation,
    cuts: Mapping[Operation, Cut],
    attentions: Mapping[Operation, Attention],
    places: Mapping[Value, Place],
) -> list[list[Window]]:
    """The groups of slots that must be cut alike: one along the operation's factor, one for exchanged keys."""
    cut = cuts[operation]
    attention = attentions.get(operation)
    slots = enumerate(cut.factor.operands + cut.factor.results)
    groups = [[_window(slot, span, cut.factor, cut.token) for slot, span in slots if span is not None]]
    if attention is not None and exchanges(attention, places):
        keys = (attention.key, attention.value)
        groups.append([Window(slot, 0, shape_of(operation.operands[slot])[-2]) for slot in keys])
    return groups


def _window(slot: int, span: Span, factor: Factor, token: Place) -> Window:
    if span.length == factor.size:
        return Window(slot, 0, token.length)
    return Window(slot, span.start // token.inner, span.length // token.inner)
