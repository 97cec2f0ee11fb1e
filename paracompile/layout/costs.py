"""What a plan costs: by this it is chosen what is cut, where several things can be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paracompile.layout.boundaries import Machine, bytes_carried, bytes_exchanged, bytes_summed
from paracompile.layout.graph import Operation, bytes_of, is_tensor, value_of
from paracompile.layout.plan import Plan
from paracompile.layout.sizes import hint

__all__ = ["Cost", "cost_of"]


@dataclass(frozen=True)
class Cost:
    """What the fullest rank does in one call.

    attributes:
        share: its part of the whole's products.
        bytes: what it exchanges.
        seconds: both together, on a `Machine`.
    """

    share: float
    bytes: int
    seconds: float


def cost_of(plan: Plan, flops: Callable[[Operation], int], ranks: int, machine: Machine) -> Cost:
    """The cost of a plan."""
    work = {operation: flops(operation) for operation in plan.operations}
    model = machine.work(sum(work.values()))
    fullest = 0.0
    for operation, amount in work.items():
        part = 1.0
        if operation in plan.cuts:
            length = hint(plan.cuts[operation].token.length)
            part = max(plan.shares.local((length,), rank) for rank in range(ranks)) / max(1, length)
        fullest += part * amount
    (output,) = plan.operations[0].node.graph.find_nodes(op="output")
    gathered = {value for _, value in plan.unmatched()}
    gathered |= {value for node in output.all_input_nodes if is_tensor(node) and plan.result(value := value_of(node))}
    summed = [bytes_summed(operation) for operation, cut in plan.cuts.items() if cut.factor.sums]
    carried = [size for operation, cut in plan.cuts.items() for size in bytes_carried(operation, cut, ranks)]
    sizes = [*bytes_exchanged(plan.cuts).values(), *summed, *carried]
    sizes += [(ranks - 1) * bytes_of(value) // ranks for value in gathered]
    seconds = machine.work(round(fullest)) + sum(machine.transfer(size, model) for size in sizes)
    return Cost(fullest / max(1, sum(work.values())), sum(sizes), seconds)
