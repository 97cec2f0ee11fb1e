"""Where a graph may be cut along its blocks, and which of the pieces are equal.

    embeddings | block 0 | block 1 | ... | block N | norm, projection

A *region* is a run of nodes that is compiled by itself. Cuts follow blocks (modules in lists that are alike, `blocks`):
a region ends where the last node of a block stands, so that work of the next block which `schedule` put under an
exchange of this one stays with the exchange. What does not depend on the blocks but stands within the first one (rotary
tables, a rank's part of them) belongs to what comes before it.

No cut falls where something is pending: between the start of an exchange and its wait, inside an autocast region, while
a value lives that is no tensor of a known size, or between taking a view of a graph input and writing to that input.

Two regions are equal if they compute the same, on inputs that look alike, whatever those are called and wherever they
come from; see `Body.signature`. Nothing is mutated.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paracompile.layout.graph import is_tensor
from paracompile.patterns.autocast import AUTOCAST_EDGES, ENTER_AUTOCAST, EXIT_AUTOCAST
from paracompile.patterns.blocks import find_blocks
from paracompile.patterns.exchanges import is_collective, is_wait

__all__ = ["Body", "cut_along_blocks", "writes"]

_ALIGNMENT = 16  # bytes; Inductor's code for a GPU assumes it of inputs that had it when they were compiled


def writes(node: fx.Node) -> bool:
    """Whether a node writes to its operands."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


@dataclass(frozen=True)
class Body:
    """What one region computes.

    attributes:
        nodes: its nodes, in order.
        looks: how a value from outside looks, see `look_of`.
    """

    nodes: tuple[fx.Node, ...]
    looks: Callable[[fx.Node], object]

    @cached_property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The values from outside, in the order in which the region first reads them."""
        inside = set(self.nodes)
        found = (source for node in self.nodes for source in node.all_input_nodes if source not in inside)
        return tuple(dict.fromkeys(source for source in found if not _is_module(source)))

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The values that are read outside, in the order in which they are computed."""
        inside = set(self.nodes)
        return tuple(node for node in self.nodes if any(user not in inside for user in node.users))

    @cached_property
    def signature(self) -> tuple[object, ...]:
        """Equal for regions that one compiled function serves, and for no others.

        Operators, constants with their types, which value goes where, how inputs look, and which results leave. What
        a region writes to must be told from what it reads by its memory, so one that writes equals no other.
        """
        number = {node: ("input", index) for index, node in enumerate(self.inputs)}
        number |= {node: ("node", index) for index, node in enumerate(self.nodes)}

        def spelled(argument: Any) -> object:
            if isinstance(argument, fx.Node):
                return number.get(argument) or ("module", id(_attribute(argument)))
            if isinstance(argument, (list, tuple)):
                return type(argument).__name__, tuple(map(spelled, argument))
            if isinstance(argument, dict):
                return tuple((key, spelled(value)) for key, value in argument.items())
            if isinstance(argument, slice):
                return "slice", spelled(argument.start), spelled(argument.stop), spelled(argument.step)
            return type(argument).__name__, repr(argument)  # 1, 1.0 and True are equal, and no equal constants

        return (
            tuple((node.target, spelled(node.args), spelled(node.kwargs)) for node in self.nodes),
            tuple(map(self.looks, self.inputs)),
            tuple(number[node] for node in self.outputs),
            id(self) if any(map(writes, self.nodes)) else None,
        )


def look_of(example: Any) -> object:
    """What compiled code relies on in an input: all but its values and where it lies."""
    if not isinstance(example, torch.Tensor):
        return type(example).__name__, repr(example)
    size, strides = tuple(example.shape), example.stride()
    inner: object = None
    if is_traceable_wrapper_subclass(example):
        names, context = example.__tensor_flatten__()  # type: ignore[attr-defined]
        inner = (repr(context), *((name, look_of(getattr(example, name))) for name in names))
    else:
        inner = example.storage_offset() * example.element_size() % _ALIGNMENT
    return (
        type(example).__name__,
        size,
        tuple(stride for length, stride in zip(size, strides, strict=True) if length != 1),
        example.dtype,
        example.device,
        example.requires_grad,
        inner,
    )


def cut_along_blocks(graph: fx.Graph, edge: object) -> list[list[fx.Node]]:
    """The nodes of `graph` that compute something, region by region, in an order in which they can run.

    args:
        edge: an operator that stands between regions, by itself with the `getitem` of its results.
    """
    owner = {node: index for index, block in enumerate(find_blocks(graph)) for node in block.nodes}
    regions: list[list[fx.Node]] = []
    run: list[fx.Node] = []
    for node in _with_results(graph):
        if node.target is edge:
            regions += [*_regions(run, owner), [node]]
            run = []
        elif _producer(node).target is edge:
            regions[-1].append(node)
        else:
            run.append(node)
    return regions + _regions(run, owner)


def _with_results(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that compute, each followed by the `getitem` nodes of its results."""
    order: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("call_function", "call_module", "call_method") and not _takes_result(node):
            order.append(node)
            order += [user for user in node.users if _takes_result(user)]
    return order


def _takes_result(node: fx.Node) -> bool:
    return node.target is operator.getitem and isinstance(node.args[0], fx.Node) and not is_tensor(node.args[0])


def _producer(node: fx.Node) -> fx.Node:
    source = node.args[0] if _takes_result(node) else node
    assert isinstance(source, fx.Node)
    return source


def _regions(order: Sequence[fx.Node], owner: dict[fx.Node, int]) -> list[list[fx.Node]]:
    """The regions of a run of nodes."""
    blocks = [owner.get(_producer(node)) for node in order]
    early = _early(order, blocks)
    regions = [[node for node, first in zip(order, early, strict=True) if first]]
    rest = [(node, block) for node, block, first in zip(order, blocks, early, strict=True) if not first]
    last = {block: place for place, (_, block) in enumerate(rest) if block is not None}
    start = 0
    for end in sorted(place + 1 for place in last.values()):
        middle = next(place for place in range(start, end) if rest[place][1] is not None)
        regions += [[node for node, _ in rest[start:middle]], [node for node, _ in rest[middle:end]]]
        start = end
    regions.append([node for node, _ in rest[start:]])
    return _join_where_pending([region for region in regions if region])


def _early(order: Sequence[fx.Node], blocks: Sequence[int | None]) -> list[bool]:
    """For each node whether it belongs before the first block, though it may stand inside one.

    So do nodes of no block that stand before the end of the first one and do not depend on it, and what a block only
    happens to be the first to ask for: it depends on no block, and other blocks read it as well.
    """
    first = next((block for block in blocks if block is not None), None)
    if first is None:
        return [False] * len(order)
    end = max(place for place, block in enumerate(blocks) if block == first)
    late: set[fx.Node] = set()
    owner = dict(zip(order, blocks, strict=True))
    within = 0  # autocast regions that are open
    for place, node in enumerate(order):
        within += (node.target is ENTER_AUTOCAST) - (node.target is EXIT_AUTOCAST)
        producer = _producer(node)
        shared = producer is not node and producer not in late
        if not shared and blocks[place] is None:
            shared = place < end
        elif not shared:
            shared = any(owner.get(reader) != blocks[place] for reader in _readers(node))
        fixed = within or node.target in AUTOCAST_EDGES or is_collective(node) or is_wait(node) or writes(node)
        if not shared or (fixed and late) or any(source in late for source in node.all_input_nodes):
            late.add(node)
    return [node not in late for node in order]


def _readers(node: fx.Node) -> list[fx.Node]:
    return [reader for user in node.users for reader in (_readers(user) if _takes_result(user) else [user])]


def _join_where_pending(regions: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Joins neighbours that are cut where something is pending."""
    place = {node: index for index, region in enumerate(regions) for node in region}
    whole: set[int] = set()  # regions that must not be cut from the one before
    for start, end in _pending(place):
        whole |= set(range(place[start] + 1, place.get(end, 0) + 1))
    joined: list[list[fx.Node]] = []
    for index, region in enumerate(regions):
        if index in whole:
            joined[-1] += region
        else:
            joined.append(region)
    return joined


def _pending(nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Pairs of nodes between which no cut may fall."""
    written_by: dict[fx.Node, list[fx.Node]] = {}  # by graph input, and by each view of it
    nodes = list(nodes)
    for node in nodes:
        if is_collective(node) or not _is_static(node):
            yield from ((node, user) for user in node.users)
        if writes(node) and isinstance(node.args[0], fx.Node):
            written_by.setdefault(node.args[0], []).append(node)
    for node in nodes:
        if _is_view(node) and node.all_input_nodes[0] in written_by:
            written_by[node] = written_by[node.all_input_nodes[0]]
            yield from ((node, write) for write in written_by[node])


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and any(
        result.alias_info is not None for result in node.target._schema.returns
    )


def _is_static(node: fx.Node) -> bool:
    """Whether the node's value may leave its region: a tensor whose sizes are numbers."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return not node.users
    return all(isinstance(size, int) for size in value.shape)


def _is_module(node: fx.Node) -> bool:
    return node.op == "get_attr" and not isinstance(_attribute(node), torch.Tensor)


def _attribute(node: fx.Node) -> Any:
    assert isinstance(node.target, str)
    found: Any = node.graph.owning_module
    for name in node.target.split("."):
        found = getattr(found, name)
    return found
