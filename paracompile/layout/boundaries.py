"""Boundaries: which operations run on a rank's tokens only, and where values are gathered.

A minimum cut (as torch's own partitioner uses one to choose what to recompute) between *cut over the ranks* and *whole
on every rank*. Leaving an operation whole costs the work that cutting it would have saved; taking a cut value to where
it must be whole costs one gather, however many readers it has; giving a rank its part of a whole value costs nothing,
as every rank holds it. So token-wise work is cut as early as tokens exist, the gather is put where the value is
narrowest, and a small attention (a text refiner's) is left whole where its exchange would take longer than its work.
A sum over what is cut (of keys times values in linear attention, a mean over tokens) is taken over each rank's part and
added up where its result is smaller than what would have to be gathered for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx

from paracompile.layout.factors import Place
from paracompile.layout.graph import Operation, Value, bytes_of
from paracompile.layout.places import Attention, Cut, accepts, made_in_parts

# A main attention (or convolution, where images are cut) is one with at least this share of the heaviest one's work. It
# is cut whatever the exchange costs: sharding it is what was asked for.
_MAIN = 0.1


_MOMENTS = 16
"""Bytes, next to nothing: a mean and a variance."""


@dataclass(frozen=True)
class Machine:
    """What the costs are weighed with: rough figures of a present GPU and the link between two of them.

    Only ratios matter, and only for small pieces beside the blocks.
    """

    flops: float = 3e14
    """Operations in a second (bf16 matrix products). Everything else counts as next to nothing: it is fused."""
    link: float = 1e11
    """Bytes in a second between ranks."""
    start: float = 2e-3
    """What a collective costs beside its bytes (its start, and that all ranks meet), as a share of the whole model's
    work. A share, so that a small model of a form is cut like a large one."""

    def work(self, flops: int) -> float:
        """Seconds for so many operations."""
        return flops / self.flops

    def transfer(self, size: float, model: float) -> float:
        """Seconds for a collective that sends so many bytes, in a model whose whole work takes `model` seconds."""
        return self.start * model + size / self.link


def _picoseconds(seconds: float) -> int:
    """Whole numbers, so that the sums that a minimum cut compares are exact."""
    return 1 + round(1e12 * seconds)


def bytes_exchanged(cuts: Mapping[Operation, Cut]) -> dict[Operation, int]:
    """The bytes that a rank exchanges for each operation that needs something of the others, if it is cut."""
    found = {}
    for operation, cut in cuts.items():
        halo = cut.factor.halo
        if halo is not None and halo.reach:
            found[operation] = halo.reach * bytes_of(operation.operands[0]) // max(1, halo.size)
        elif cut.factor.reduces:
            found[operation] = _MOMENTS
    return found


def bytes_carried(operation: Operation, cut: Cut, ranks: int) -> list[int]:
    """The bytes in each collective where ranks exchange operands: all that is cut, and the results, travel."""
    if not cut.factor.exchanges:
        return []
    of_operands = zip(operation.operands, cut.operands, strict=True)
    moved = [*(value for value, place in of_operands if place is not None), *operation.results]
    return [bytes_of(value) // ranks for value in moved]


def bytes_summed(operation: Operation) -> int:
    """The bytes that a rank exchanges, about, where ranks add up the results of their parts."""
    return 2 * sum(map(bytes_of, operation.results))


def choose(
    operations: Sequence[Operation],
    outputs: Sequence[Value],
    cuts: Mapping[Operation, Cut],
    attentions: Mapping[Operation, Attention],
    places: Mapping[Value, Place],
    flops: Callable[[Operation], int],
    ranks: int,
    machine: Machine,
    exchanged: Mapping[Operation, int] | None = None,
) -> set[Operation]:
    """The operations to run on a rank's part only.

    args:
        operations: all operations, in order.
        outputs: the graph's outputs, which must be whole.
        cuts: how each operation that can be cut is cut.
        attentions: the attentions among them.
        places: the tokens' place in every value that has one.
        flops: an operation's multiply-add work.
        ranks: over how many ranks the tokens are cut.
        machine: the figures to weigh work and transfers with.
        exchanged: bytes that a rank exchanges in an operation if that is cut, where a spatial dimension is. Then the
            main convolutions are what was asked for, and attention is cut where that is cheaper.
    """
    if exchanged is None:
        work = {operation: item.flops for operation, item in attentions.items() if operation in cuts}
    else:
        work = {operation: flops(operation) for operation in exchanged}
    heaviest = max(work.values(), default=0)
    saved = 1 - 1 / ranks
    works = [machine.work(flops(operation)) for operation in operations]
    model = sum(works)
    network = nx.DiGraph()
    cut, whole = "cut", "whole"
    for number, operation in enumerate(operations):
        if operation not in cuts:
            network.add_edge(number, whole)
            continue
        network.add_edge(cut, number, capacity=_picoseconds(saved * works[number]))
        if cuts[operation].factor.sums:
            seconds = machine.transfer(saved * bytes_summed(operation), model)
            network.add_edge(number, whole, capacity=_picoseconds(seconds))
        elif operation in work and work[operation] >= _MAIN * heaviest:
            network.add_edge(cut, number, capacity=float("inf"))
        elif exchanged is not None and operation in exchanged:
            seconds = machine.transfer(exchanged[operation], model)
            network.add_edge(number, whole, capacity=_picoseconds(seconds))
        elif cuts[operation].factor.exchanges:
            carried = bytes_carried(operation, cuts[operation], ranks)
            seconds = sum(machine.transfer(size, model) for size in carried)
            network.add_edge(number, whole, capacity=_picoseconds(seconds))

    producers = {
        result: number
        for number, operation in enumerate(operations)
        if operation in cuts
        for result in made_in_parts(operation, cuts[operation])
    }

    def read(value: Value, reader: int | str) -> None:
        """`reader` needs `value` whole if it is itself whole: one gather, shared by all such readers."""
        producer = producers.get(value)
        if producer is None:
            return
        gathered = ("gathered", producer, value.index)
        network.add_edge(producer, gathered, capacity=_picoseconds(machine.transfer(saved * bytes_of(value), model)))
        network.add_edge(gathered, reader)

    for number, operation in enumerate(operations):
        for slot, value in enumerate(operation.operands):
            matches = operation in cuts and accepts(cuts[operation], slot, operation, places)
            read(value, number if matches else whole)
    for value in outputs:
        read(value, whole)
    if cut not in network or whole not in network:
        return set(cuts)
    _, (cut_side, _) = nx.minimum_cut(network, cut, whole, flow_func=nx.algorithms.flow.boykov_kolmogorov)
    return {operation for number, operation in enumerate(operations) if number in cut_side and operation in cuts}
