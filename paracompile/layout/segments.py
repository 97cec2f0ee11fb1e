"""Segments: at which edges the tokens of each value are cut apart before each piece is shared out over the ranks.

A joint sequence is [text, image]: `cat` joins it, `split` and slices take it apart, and a rank holds
[its text, its image]. So the edges of every `cat`, `split` and slice that a value takes part in are edges of the value,
and of every value that must be cut alike. They are collected to a fixed point over the operations' windows.

Windows that do not align have no end to that: in `x + cat([x[:, -1:], x[:, :-1]], 1)` a token must be where the one
before it is, so all are on one rank, in pieces of one token. So operations are taken in order, and one that would cut
a value too finely (`too_fine`) takes an operand through a gather instead, cut anew, or is left whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from paracompile.layout.factors import Factor, Place, Span
from paracompile.layout.graph import Operation, Value, bytes_of
from paracompile.layout.places import Cut, accepts, made_in_parts
from paracompile.layout.shares import Lengths, Shares
from paracompile.layout.sizes import hint, same

_MOST_SEGMENTS = 64
"""A gather puts every segment of every rank into its place."""
_MOST_UNEVEN = 1.25
"""What the fullest rank may hold of a value, as a multiple of an even share."""


def too_fine(lengths: Lengths, ranks: int) -> bool:
    """Whether segments are too many, or leave one rank with much more than its share: a token more is no matter.

    That is judged at the sizes of the first call.
    """
    lengths = tuple(map(hint, lengths))
    if len(lengths) > _MOST_SEGMENTS:
        return True
    shares, tokens = Shares(ranks, max(lengths, default=0)), sum(lengths)
    even, most = -(-tokens // ranks), max(shares.local(lengths, rank) for rank in range(ranks))
    return most > _MOST_UNEVEN * even and (most > even + 1 or most == tokens)


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
        misaligned: the operations that would have cut a value too finely, each with the cut that does not: some
            operands are taken through a gather. None where none is left, and the operation must be whole.
    """

    values: Mapping[Value, Lengths]
    operands: Mapping[tuple[Operation, int], Lengths]
    misaligned: Mapping[Operation, Cut | None]


def find_segments(
    chosen: Iterable[Operation],
    cuts: Mapping[Operation, Cut],
    places: Mapping[Value, Place],
    ranks: int,
) -> Segments:
    """The segments of all values of the chosen operations, over so many ranks."""
    chosen = list(chosen)
    made = {result for operation in chosen for result in made_in_parts(operation, cuts[operation])}
    refinement = _Refinement(ranks)
    misaligned: dict[Operation, Cut | None] = {}
    for operation in chosen:
        candidates = _looser(operation, cuts[operation], places)
        taken = (cut for cut in candidates if refinement.take(_groups(operation, cut, places, made)))
        cut = next(taken, None)
        if cut != cuts[operation]:
            misaligned[operation] = cut
    return Segments(refinement.values(), refinement.operands(), misaligned)


def _looser(operation: Operation, cut: Cut, places: Mapping[Value, Place]) -> Iterable[Cut]:
    """`cut`, then with one operand gathered before it, the cheapest and latest first, and at last with all of them."""
    yield cut
    tied = [slot for slot in range(len(operation.operands)) if accepts(cut, slot, operation, places)]
    order = {slot: (bytes_of(operation.operands[slot]), -slot) for slot in tied}
    for slot in sorted(tied, key=order.__getitem__):
        yield replace(cut, gathered=cut.gathered | {slot})
    if len(tied) > 1:
        yield replace(cut, gathered=cut.gathered | set(tied))


@dataclass(frozen=True, eq=False)
class _Group:
    """Slots of an operation that must be cut alike, each with the value in it if that is cut where it is made."""

    operation: Operation
    windows: tuple[tuple[Window, Value | None], ...]

    @property
    def values(self) -> set[Value]:
        return {value for _, value in self.windows if value is not None}


class _Refinement:
    """The edges of all values that are cut, kept at a fixed point while operations are added.

    attributes:
        ranks: over how many ranks.
        edges: of each value.
        groups: those taken so far, by the values in them; all of them under None.
    """

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self.edges: dict[Value, frozenset[int]] = defaultdict(frozenset)
        self.groups: dict[Value | None, dict[_Group, None]] = defaultdict(dict)

    def take(self, groups: Sequence[_Group]) -> bool:
        """Adds what must be cut alike in one operation; changes nothing where that would cut anything too finely."""
        before: dict[Value, frozenset[int]] = {}
        for group in groups:
            for value in (None, *group.values):
                self.groups[value][group] = None
        if self._refine(groups, before):
            return True
        self.edges.update(before)
        for group in groups:
            for value in (None, *group.values):
                del self.groups[value][group]
        return False

    def _refine(self, groups: Sequence[_Group], before: dict[Value, frozenset[int]]) -> bool:
        """Carries edges until nothing changes; notes in `before` what changed; False once anything is too fine."""
        waiting = dict.fromkeys(groups)
        while waiting:
            group = next(iter(waiting))
            del waiting[group]
            found = self._edges_of(group)
            for window, value in group.windows:
                inside = _inside(found, window)
                edges = inside if value is None else self.edges[value] | inside
                if value is not None:
                    if edges == self.edges[value]:
                        continue
                    before.setdefault(value, self.edges[value])
                    self.edges[value] = edges
                    waiting.update(self.groups[value])
                if too_fine(_lengths(edges), self.ranks):
                    return False
        return True

    def _edges_of(self, group: _Group) -> set[int]:
        found: set[int] = set()
        for window, value in group.windows:
            found |= {window.start, window.start + window.length}
            found |= {window.start + edge for edge in self.edges[value]} if value is not None else set()
        return found

    def values(self) -> dict[Value, Lengths]:
        return {value: _lengths(edges) for value, edges in self.edges.items()}

    def operands(self) -> dict[tuple[Operation, int], Lengths]:
        """The segments that each operation takes each of its operands in."""
        return {
            (group.operation, window.slot): _lengths(_inside(found, window))
            for group in self.groups[None]
            for found in [self._edges_of(group)]
            for window, _ in group.windows
            if window.slot < len(group.operation.operands)
        }


def _inside(edges: Iterable[int], window: Window) -> frozenset[int]:
    return frozenset(edge - window.start for edge in edges if 0 <= edge - window.start <= window.length)


def _lengths(edges: Iterable[int]) -> Lengths:
    """The lengths between edges; edges that meet at the first call are guarded to be one."""
    ordered: list[int] = []
    for edge in sorted(edges, key=hint):
        if not ordered or not same(ordered[-1], edge):
            ordered.append(edge)
    return tuple(stop - start for start, stop in pairwise(ordered))


def _groups(
    operation: Operation,
    cut: Cut,
    places: Mapping[Value, Place],
    made: set[Value],
) -> list[_Group]:
    """The slots that must be cut alike: those along the operation's factor, and those that are exchanged."""

    def value_in(slot: int) -> Value | None:
        count = len(operation.operands)
        if slot >= count:
            return operation.results[slot - count]
        value = operation.operands[slot]
        return value if value in made and accepts(cut, slot, operation, places) else None

    slots = enumerate(cut.factor.operands + cut.factor.results)
    windows = [[_window(slot, span, cut.factor, cut.token) for slot, span in slots if span is not None]]
    exchanged = [(slot, span) for slot, span in enumerate(cut.factor.exchanges) if span is not None]
    if exchanged:
        windows.append([Window(slot, 0, span.length) for slot, span in exchanged])
    return [_Group(operation, tuple((window, value_in(window.slot)) for window in alike)) for alike in windows]


def _window(slot: int, span: Span, factor: Factor, token: Place) -> Window:
    if factor.halo is not None or span.length == factor.size:
        return Window(slot, 0, token.length)
    return Window(slot, span.start // token.inner, span.length // token.inner)
