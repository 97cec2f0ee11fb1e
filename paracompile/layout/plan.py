"""The plan: everything that is decided about one graph before any node is rewritten."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import fx

from paracompile.layout.boundaries import Machine, bytes_exchanged, choose
from paracompile.layout.factors import Place, Rule, Shape
from paracompile.layout.graph import Operation, Value, is_tensor, operations, value_of
from paracompile.layout.places import Attention, Cut, Seed, Spatial, accepts, cut_of, propagate, sum_of
from paracompile.layout.segments import Segments, find_segments
from paracompile.layout.shares import Lengths, Shares
from paracompile.layout.sizes import at_least, hint
from paracompile.torch_private import OpOverload


@dataclass(frozen=True)
class Sharding:
    """How one value is cut along one axis: where its tokens sit, into which segments they fall, and who holds what."""

    place: Place
    segments: Lengths
    shares: Shares

    def local(self, rank: int) -> int:
        """How many tokens `rank` holds."""
        return self.shares.local(self.segments, rank)

    def local_size(self, rank: int) -> int:
        """What `rank` holds of the dimension."""
        if self.place.has_margins:
            start, stop = self.bounds(rank)
            return stop - start
        return self.place.outer * self.local(rank) * self.place.inner

    def local_shape(self, shape: Shape, rank: int) -> Shape:
        """The shape of the part that `rank` holds of a value of `shape`."""
        return (*shape[: self.place.dim], self.local_size(rank), *shape[self.place.dim + 1 :])

    def bounds(self, rank: int) -> tuple[int, int]:
        """The positions of the dimension, `[start, stop)`, that `rank` holds of one segment; margins included."""
        place = self.place
        (length,) = self.segments
        assert place.outer == 1

        def edge(number: int) -> int:
            if number in (0, self.shares.ranks):
                return number and place.size
            first, _ = self.shares.window(length, number)
            return min(max(place.before + first * place.inner, 0), place.size)

        return edge(rank), edge(rank + 1)

    def beside(self, other: Sharding, rank: int) -> Sharding:
        """This sharding, in a value of which `rank` holds only its part of what `other` cuts."""
        one, two = self.place, other.place
        if one.dim != two.dim:
            return self
        if two.inner >= one.length * one.inner:
            place = replace(one, outer=one.outer // two.length * other.local(rank))
        else:
            place = replace(one, inner=one.inner // two.length * other.local(rank))
        return replace(self, place=place)


def apart(one: Place, other: Place) -> bool:
    """Whether two axes may cut a value at these places: in two dimensions, or the one around what the other cuts."""
    return one.dim != other.dim or one.inner >= other.length * other.inner or other.inner >= one.length * one.inner


@dataclass(frozen=True)
class Plan:
    """What is cut, and how.

    attributes:
        operations: all operations, in the graph's order.
        attentions: the attentions among them.
        cuts: how each operation that is cut is cut.
        places: the tokens' place in every value they run through, cut or not.
        segments: the segments of what is cut.
        shares: how segments are shared out.
        left_whole: operations that could be cut, and are whole because that is cheaper.
        misaligned: operations that would have cut their tokens into pieces too small to share, so that what they read
            is gathered.
    """

    operations: Sequence[Operation]
    attentions: Mapping[Operation, Attention]
    cuts: Mapping[Operation, Cut]
    places: Mapping[Value, Place]
    segments: Segments
    shares: Shares
    left_whole: frozenset[Operation]
    misaligned: Sequence[Operation]

    @cached_property
    def by_node(self) -> Mapping[fx.Node, Operation]:
        """The operations by the nodes that they are."""
        return {operation.node: operation for operation in self.operations}

    def cuts_node(self, node: fx.Node) -> bool:
        """Whether a node is an operation that is cut."""
        return node in self.by_node and self.by_node[node] in self.cuts

    def result(self, value: Value) -> Sharding | None:
        """How a value is cut where it is made; None if it is whole."""
        lengths = self.segments.values.get(value)
        return Sharding(self.places[value], lengths, self.shares) if lengths is not None else None

    def operand(self, operation: Operation, slot: int) -> Sharding | None:
        """How a cut operation wants an operand; None if whole."""
        if self.cuts[operation].factor.halo is not None:  # of what is whole a rank takes its window
            return self.result(operation.operands[slot]) if self.takes_cut(operation, slot) else None
        lengths = self.segments.operands.get((operation, slot))
        if lengths is None:
            return None
        place = self.cuts[operation].operands[slot]
        assert place is not None
        return Sharding(place, lengths, self.shares)

    def exchanged(self, operation: Operation) -> bool:
        """Whether ranks exchange operands of this operation (an attention's keys and values)."""
        return operation in self.cuts and bool(self.cuts[operation].factor.exchanges)

    def unmatched(self) -> list[tuple[Operation, Value]]:
        """Operations that need a cut value whole, and so make it be gathered."""
        return [
            (operation, value)
            for operation in self.operations
            for slot, value in enumerate(operation.operands)
            if self.result(value) is not None and not self.takes_cut(operation, slot)
        ]

    def takes_cut(self, operation: Operation, slot: int) -> bool:
        """Whether the operation takes this operand just as it is cut where it is made."""
        return operation in self.cuts and accepts(self.cuts[operation], slot, operation, self.places)

    def leaves(self, values: Sequence[Value], places: Mapping[Value, Place]) -> bool:
        """Whether values may be cut at other places as well."""
        return all(own is None or apart(own.place, places[value]) for value in values for own in [self.result(value)])


def make_plan(
    graph: fx.Graph,
    *,
    rule_for: Callable[[OpOverload], Rule | None],
    find_attentions: Callable[[Sequence[Operation]], Sequence[Attention]],
    flops: Callable[[Operation], int],
    ranks: int,
    seed: Seed = "tokens",
    machine: Machine | None = None,
    beside: Plan | None = None,
) -> Plan:
    """Analyses a normalised graph for `ranks` ranks that share its tokens.

    args:
        graph: functional ATen with fake tensors in `meta["val"]` (the pass `normalise` makes it).
        rule_for: the rule of an operator, if there is one.
        find_attentions: the attentions among the operations.
        flops: an operation's multiply-add work.
        ranks: over how many ranks tokens are cut.
        seed: "batch" cuts the rows of the batch instead of tokens, `Spatial` a dimension of images, where attention is
            like any other operation: its queries are cut, and its keys gathered.
        machine: what costs are weighed with.
        beside: what another axis cuts already; no value is cut twice in one and the same part.
    """
    all_operations = operations(graph, rule_for)
    attentions = {attention.operation: attention for attention in find_attentions(all_operations)}
    places = propagate(all_operations, attentions.values(), seed)
    possible = {
        operation: cut
        for operation in all_operations
        if (cut := cut_of(operation, places, seed)) is not None
        and (beside is None or beside.leaves(operation.results, places))
    }
    if seed != "batch":
        for operation in all_operations:
            if operation not in possible and (cut := sum_of(operation, places)) is not None:
                possible[operation] = cut
    (output,) = graph.find_nodes(op="output")
    outputs = [value_of(node) for node in output.all_input_nodes if is_tensor(node)]
    misaligned: dict[Operation, None] = {}
    machine = machine or Machine()
    while True:
        sent = bytes_exchanged(possible) if isinstance(seed, Spatial) else None
        chosen = choose(all_operations, outputs, possible, attentions, places, flops, ranks, machine, sent)
        cuts = {operation: cut for operation, cut in possible.items() if operation in chosen}
        segments = find_segments(cuts, cuts, places, ranks)
        if not segments.misaligned:
            break
        misaligned.update(dict.fromkeys(segments.misaligned))
        looser = {**possible, **segments.misaligned}
        possible = {operation: cut for operation, cut in looser.items() if cut is not None}
    lengths = dict.fromkeys(length for lengths in segments.values.values() for length in lengths)
    for length in lengths:  # torch takes sizes of 0 and 1 for others, and would guard a rank's against them
        at_least(length, 2 * ranks)
    longest = max(lengths, key=hint, default=0)
    return Plan(
        operations=all_operations,
        attentions=attentions,
        cuts=cuts,
        places=places,
        segments=segments,
        shares=Shares(ranks, longest),
        left_whole=frozenset(possible.keys() - cuts.keys()),
        misaligned=tuple(misaligned),
    )
