"""Where a graph may be cut along its blocks, and which of the pieces are equal.

    embeddings | block 0 | block 1 | ... | block N | norm, projection

A *region* is a run of nodes that is compiled by itself. Cuts follow blocks (modules in lists that are alike, `blocks`):
a region ends where the last node of a block stands, so that work of the next block which `schedule` put under an
exchange of this one stays with the exchange. What does not depend on the blocks but stands within the first one (rotary
tables, a rank's part of them) belongs to what comes before it, so that the first block is like the others.

No cut falls where something is pending: between the start of an exchange and its wait, inside an autocast region, while
a value lives that is no tensor of a known size, or between taking a view of a graph input and writing to that input.

Two regions are equal if they compute the same, on inputs that look alike, whatever those are called and wherever they
come from; see `Body.signature`. Nothing is mutated.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from paracompile.errors import module_paths
from paracompile.layout.graph import is_tensor, readers_of, writes
from paracompile.layout.sizes import Size, formula_of
from paracompile.patterns.autocast import AUTOCAST_EDGES, ENTER_AUTOCAST, EXIT_AUTOCAST
from paracompile.patterns.blocks import find_blocks
from paracompile.patterns.exchanges import is_collective, is_wait
from paracompile.torch_private import OpOverload, is_traceable_wrapper_subclass, schema_of

__all__ = ["Body", "cut_along_blocks", "is_view", "look_of"]

_ALIGNMENT = 16  # bytes; Inductor's code for a GPU assumes it of inputs that had it when they were compiled


def is_view(node: fx.Node) -> bool:
    """Whether a node's value is, or may be, a view of another."""
    target = _producer(node).target
    return isinstance(target, OpOverload) and any(result.alias_info is not None for result in schema_of(target).returns)


@dataclass(frozen=True, eq=False)
class Body:
    """What one region computes.

    attributes:
        nodes: its nodes, in order.
        block: the path of the block that it ends with; None where it is of none.
    """

    nodes: tuple[fx.Node, ...]
    block: str | None

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

    def signature(self, look: Callable[[fx.Node], object]) -> tuple[object, ...]:
        """Equal for regions that one compiled function serves, and for no others.

        Operators, constants with their types, which value goes where, how inputs look (see `look_of`), and which
        results leave. What a region writes to must be told from what it reads by its memory, so one that writes equals
        no other.
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
            if isinstance(argument, Size):
                return "size", formula_of(argument)
            return type(argument).__name__, repr(argument)  # 1, 1.0 and True are equal, and no equal constants

        return (
            tuple((node.target, spelled(node.args), spelled(node.kwargs)) for node in self.nodes),
            tuple(map(look, self.inputs)),
            tuple(number[node] for node in self.outputs),
            id(self) if any(map(writes, self.nodes)) else None,
        )


def look_of(example: Any) -> object:
    """What compiled code relies on in an input: all but its values and where it lies."""
    inner: object
    if is_traceable_wrapper_subclass(example):
        names, context = example.__tensor_flatten__()
        inner = (repr(context), *((name, look_of(getattr(example, name))) for name in names))
    elif not isinstance(example, torch.Tensor):
        return type(example).__name__, repr(example)
    else:
        inner = formula_of(example.storage_offset() * example.element_size() % _ALIGNMENT)
    size, strides = (tuple(map(formula_of, sizes)) for sizes in (example.shape, example.stride()))
    return (
        type(example).__name__,
        size,
        tuple(stride for length, stride in zip(size, strides, strict=True) if length != 1),
        example.dtype,
        example.device,
        example.requires_grad,
        inner,
    )


def cut_along_blocks(graph: fx.Graph, edge: object) -> list[Body | None]:
    """The regions of `graph`, in an order in which they can run; None stands for a node with the operator `edge`.

    args:
        edge: an operator that stands between regions, by itself.
    """
    owner = {node: block.path for block in find_blocks(graph) for node in block.nodes}
    bodies: list[Body | None] = []
    run: list[fx.Node] = []
    for node in _with_results(graph):
        if node.target is edge:
            bodies += [*_bodies(run, owner), None]
            run = []
        elif _producer(node).target is not edge:
            run.append(node)
    return bodies + _bodies(run, owner)


def _bodies(run: Sequence[fx.Node], owner: Mapping[fx.Node, str]) -> list[Body | None]:
    return [Body(tuple(nodes), owner.get(_producer(nodes[-1]))) for nodes in _regions(run, owner)]


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


def _regions(order: Sequence[fx.Node], owner: Mapping[fx.Node, str]) -> list[list[fx.Node]]:
    """The regions of a run of nodes; `owner` says which block a node is of."""
    blocks = {node: owner.get(_producer(node)) for node in order}
    early = _early(order, blocks)
    rest = [node for node in order if node not in early]
    ends = _ends(rest, blocks)
    ahead = _ahead(rest, blocks, ends)
    regions = [[node for node in order if node in early]]
    start = 0
    for block, last in sorted(ends.items(), key=operator.itemgetter(1)):
        end = last + 1
        first, inside = _moved(rest[start:end], {node for node in ahead if blocks[node] == block})
        middle = next((place for place, node in enumerate(inside) if blocks[node] is not None), len(inside))
        regions[-1] += first
        regions += [inside[:middle], inside[middle:]]
        start = end
    regions.append(rest[start:])
    return _join_where_pending([region for region in regions if region])


def _ends(order: Sequence[fx.Node], blocks: Mapping[fx.Node, str | None]) -> dict[str, int]:
    """The place of the last node of each block."""
    return {block: place for place, node in enumerate(order) if (block := blocks[node]) is not None}


def _early(order: Sequence[fx.Node], blocks: Mapping[fx.Node, str | None]) -> set[fx.Node]:
    """What belongs before the first block, though it may stand inside one.

    It depends on no block, and is of none and stands before the end of the first, or is of a block that only happens to
    be the first to ask for it: others read it as well.
    """
    ends = _ends(order, blocks)
    if not ends:
        return set()
    end = ends[next(block for node in order if (block := blocks[node]) is not None)]
    shared = _shared(order, blocks)
    early: set[fx.Node] = set()
    late: set[fx.Node] = set()
    for place, (node, fixed) in enumerate(_with_fixed(order)):
        if _takes_result(node):
            wanted = _producer(node) in early
        elif blocks[node] is None:
            wanted = place < end
        else:
            wanted = node in shared
        stays = not wanted or (fixed and late) or any(source in late for source in node.all_input_nodes)
        (late if stays else early).add(node)
    return early


def _shared(order: Sequence[fx.Node], blocks: Mapping[fx.Node, str | None]) -> set[fx.Node]:
    """What several other blocks read, and what is computed for it alone."""
    shared: set[fx.Node] = set()
    for node in reversed(order):
        readers = [] if _takes_result(node) else readers_of(node)
        others = {block for reader in readers if (block := blocks.get(reader)) not in (None, blocks[node])}
        if len(others) > 1 or (readers and shared.issuperset(readers)):
            shared.add(node)
    return shared


def _with_fixed(order: Sequence[fx.Node]) -> Iterator[tuple[fx.Node, bool]]:
    """Each node, and whether it must not pass others."""
    within = 0  # autocast regions that are open
    for node in order:
        within += (node.target is ENTER_AUTOCAST) - (node.target is EXIT_AUTOCAST)
        draws = isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        edge = within > 0 or node.target in AUTOCAST_EDGES
        yield node, edge or draws or is_collective(node) or is_wait(node) or writes(node)


def _ahead(order: Sequence[fx.Node], blocks: Mapping[fx.Node, str | None], ends: Mapping[str, int]) -> set[fx.Node]:
    """The nodes whose likes, in other blocks of the list, stand within the block before.

    So does what is made of the time alone: `schedule` puts it under an exchange of the block before, if there is one.
    """
    by_end = sorted(ends.items(), key=operator.itemgetter(1))
    end_before = {block: end for (_, end), (block, _) in pairwise([("", -1), *by_end])}
    met: Counter[object] = Counter()
    alike: dict[object, list[fx.Node]] = {}
    ahead: set[object] = set()
    for place, node in enumerate(order):
        block = blocks[node]
        if block is None:
            continue
        within = next((path for path in reversed(module_paths(node)) if path.startswith(block)), block)
        kind = block.rpartition(".")[0], within.removeprefix(block), str(node.target)
        met[block, kind] += 1
        likeness = kind, met[block, kind]
        alike.setdefault(likeness, []).append(node)
        if place < end_before[block]:
            ahead.add(likeness)
    return {node for likeness in ahead for node in alike[likeness]}


def _moved(run: Sequence[fx.Node], ahead: set[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Of the run up to a block's end, what of `ahead` may stand before it, and the rest.

    What runs under an exchange of the block itself stays there.
    """
    first: list[fx.Node] = []
    rest: list[fx.Node] = []
    late: set[fx.Node] = set()
    started = False
    for node, fixed in _with_fixed(run):
        started = started or is_collective(node)
        if node in ahead and not (fixed or started) and not any(source in late for source in node.all_input_nodes):
            first.append(node)
        else:
            late.add(node)
            rest.append(node)
    return first, rest


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
        if is_collective(node) or not _has_known_size(node):
            yield from ((node, user) for user in node.users)
        if writes(node) and isinstance(node.args[0], fx.Node):
            written_by.setdefault(node.args[0], []).append(node)
    for node in nodes:
        if is_view(node) and node.all_input_nodes[0] in written_by:
            written_by[node] = written_by[node.all_input_nodes[0]]
            yield from ((node, write) for write in written_by[node])


def _has_known_size(node: fx.Node) -> bool:
    """Whether the node's value may leave its region: a tensor whose sizes do not depend on data."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return not node.users
    return not free_unbacked_symbols(value)


def _is_module(node: fx.Node) -> bool:
    return node.op == "get_attr" and not isinstance(_attribute(node), torch.Tensor)


def _attribute(node: fx.Node) -> Any:
    assert isinstance(node.target, str)
    found: Any = node.graph.owning_module
    for name in node.target.split("."):
        found = getattr(found, name)
    return found
