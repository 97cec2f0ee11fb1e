"""The repeated blocks of a transformer, and the streams of tokens that run through them.

    h0 ──► block 0 ──► h1 ──► block 1 ──► ... ──► block N ──► norm, projection ──► output
           h1 = h0 + f(h0)                          (a residual stream: every block adds to it)

A block is a module in a list ("blocks.3") that is like another in the list: it has at least half of the other's
submodules (the last block is often shorter, or other at its end: what nobody reads is left out). The run of blocks
is found from its end: a value that leaves the last block is followed backwards through what a residual stream is made
of (additions, and views that join it to other tokens, take it out again or bring its dimensions into another order),
block by block and from list to list, until it comes from something else: an embedding. Blocks beside the stream
(refiners of the text) are never met.

Requires functional ATen with fake tensors (`normalise`). Nothing is mutated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from paracompile.errors import module_paths
from paracompile.layout.graph import is_tensor, named_arguments, operations
from paracompile.patterns.autocast import ENTER_AUTOCAST, EXIT_AUTOCAST
from paracompile.patterns.flops import flops_of
from paracompile.patterns.origins import (
    CUTS,
    KEEPS,
    REARRANGES,
    Window,
    covers,
    origins,
    residual_sources,
    shape_of,
    size_of,
    steps,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class Block:
    """One block.

    attributes:
        path: its module, as "transformer_blocks.3".
        nodes: what was captured in it, in the graph's order.
    """

    path: str
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Stream:
    """The residual stream that reaches the output.

    attributes:
        blocks: the blocks it runs through, in order.
        entries: the value that enters each block.
        exits: the value that leaves each block.
    """

    blocks: tuple[Block, ...]
    entries: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]


def find_blocks(graph: fx.Graph) -> list[Block]:
    """All blocks of lists of modules, by their place in the graph; of nested lists the outermost."""
    regions = _regions_in_blocks(graph)
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        path = regions.get(node) or _block_of(node)
        if path is not None:
            nodes.setdefault(path, []).append(node)
    blocks = {path: Block(path, tuple(inside)) for path, inside in nodes.items()}
    inner = {path: _inner(block) for path, block in blocks.items()}
    lists: dict[str, list[str]] = {}
    for path in blocks:
        lists.setdefault(path.rpartition(".")[0], []).append(path)
    found = [
        blocks[path]
        for path in blocks
        if len(inner[path]) > 1 and _has_likeness(inner[path], [inner[o] for o in lists[path.rpartition(".")[0]]])
    ]
    position = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(found, key=lambda block: position[block.nodes[0]])


def find_stream(graph: fx.Graph) -> Stream | None:
    """The residual stream through the run of blocks with most work; None where no two blocks follow each other on one.

    Where none reaches the output, because the last blocks begin with a projection of the stream and an earlier one, it
    is that of the blocks before, if they are more than half of all.
    """
    blocks = find_blocks(graph)
    owner = {node: block for block in blocks for node in block.nodes}
    to_output = _runs(blocks, owner, lambda user, last: user not in owner)
    if to_output:
        return max(to_output, key=_work(graph)) if len(to_output) > 1 else to_output[0]
    runs = _runs(blocks, owner, lambda user, last: owner.get(user) is not last)
    run = max(runs, key=lambda stream: len(stream.blocks), default=None)
    return run if run is not None and 2 * len(run.blocks) > len(blocks) else None


def _runs(blocks: Sequence[Block], owner: dict[fx.Node, Block], ends: Callable[[fx.Node, Block], bool]) -> list[Stream]:
    """The runs of two blocks or more of which the last value has a reader that `ends` says is behind it."""
    runs = []
    for last in blocks:
        exits = [node for node in last.nodes if is_tensor(node) and any(ends(user, last) for user in node.users)]
        traced = [stream for node in exits if (stream := _run_to(node, owner, _part_read(node, owner))) is not None]
        if traced:
            runs.append(max(traced, key=lambda stream: (len(stream.blocks), size_of(stream.exits[-1]))))
    return [stream for stream in runs if len(stream.blocks) > 1]


def _work(graph: fx.Graph) -> Callable[[Stream], int]:
    """What counts the products in a stream's blocks: an encoder of the text may have more blocks than the model."""
    of_node = {operation.node: flops_of(operation) for operation in operations(graph, lambda target: None)}
    return lambda stream: sum(of_node.get(node, 0) for block in stream.blocks for node in block.nodes)


def residual_source(value: fx.Node, inside: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The value outside that `value` is a residual stream of: `value` = it + what was added inside.

    None where there is no such value of the same shape and type. Of several, such as the stream and what a ControlNet
    adds to it, the stream is the one that most was done for.
    """
    return _most_done_for(residual_sources(value, inside))


def _most_done_for(values: Sequence[fx.Node]) -> fx.Node | None:
    return max(values, key=_effort) if len(values) > 1 else next(iter(values), None)


def brought_back(stream: Stream, first: int, end: int) -> list[fx.Node]:
    """The nodes behind blocks `first` to `end - 1` that bring the stream into the order in which it entered them.

    There are such where lists of blocks take turns, on the tokens of each frame and on the frames of each token; none
    where it leaves as it entered, or is not brought back by views alone.
    """
    found: list[fx.Node] = []
    value, entry = stream.exits[end - 1], stream.entries[first]
    while entry not in residual_sources(value, lambda node: node is not entry):
        readers = list(value.users)
        if len(readers) != 1 or readers[0].target not in REARRANGES | KEEPS:
            return []
        value = readers[0]
        found.append(value)
    return found


@dataclass(frozen=True)
class Joined:
    """What a stream was joined from.

    attributes:
        dim: the dimension in which its parts lie side by side.
        sources: for each part, in order, the value that it is a residual stream of.
    """

    dim: int
    sources: tuple[fx.Node, ...]


def joined_sources(value: fx.Node, inside: Callable[[fx.Node], bool]) -> Joined | None:
    """The streams outside that were joined inside to the one that `value` belongs to; None where none were."""
    waiting, seen = [value], set()
    while waiting:
        node = waiting.pop()
        if node in seen or not inside(node):
            continue
        seen.add(node)
        if node.target is not aten.cat.default:
            waiting.extend(source for source, window in steps(node, None) if window is None)
            continue
        arguments = named_arguments(node)
        sources = [residual_source(part, inside) if inside(part) else part for part in arguments["tensors"]]
        if None not in sources:
            return Joined(arguments["dim"] % len(shape_of(node)), tuple(source for source in sources if source))
    return None


def _block_of(node: fx.Node) -> str | None:
    return next((path for path in module_paths(node) if path.rpartition(".")[2].isdigit()), None)


def _regions_in_blocks(graph: fx.Graph) -> dict[fx.Node, str]:
    """The block of each edge of an autocast region that lies in one; the edges themselves come from no module."""
    found: dict[fx.Node, str] = {}
    opened: dict[fx.Node, set[str | None]] = {}
    for node in graph.nodes:
        if node.target is ENTER_AUTOCAST:
            opened[node] = set()
        elif node.target is EXIT_AUTOCAST:
            (enter,) = node.all_input_nodes
            blocks = opened.pop(enter)
            block = blocks.pop() if len(blocks) == 1 else None
            if block is not None:
                found[enter] = found[node] = block
        else:
            for blocks in opened.values():
                blocks.add(_block_of(node))
    return found


def _inner(block: Block) -> frozenset[str]:
    """The submodules that a block's nodes come from, by their names inside the block."""
    return frozenset(
        path[len(block.path) :]
        for node in block.nodes
        for path in module_paths(node)
        if path == block.path or path.startswith(block.path + ".")
    )


def _has_likeness(inner: frozenset[str], of_list: Sequence[frozenset[str]]) -> bool:
    """Whether another block of the list is alike; a list of one has none to compare with."""
    return len(of_list) == 1 or sum(2 * len(inner & other) >= min(len(inner), len(other)) for other in of_list) > 1


def _run_to(value: fx.Node, owner: dict[fx.Node, Block], part: Window) -> Stream | None:
    """The stream that ends with `value`, which leaves a block, and of which this part is read."""
    blocks: list[Block] = []
    entries: list[fx.Node] = []
    exits: list[fx.Node] = []
    current: fx.Node | None = value
    added_again: set[fx.Node] = set()
    while current is not None:
        sources = _sources_of_block(current, owner)
        source = _of_stream(sources, owner, added_again)
        if source is None:
            break
        added_again.update(sources)
        blocks.append(owner[current])
        entries.append(source)
        exits.append(current)
        current, part = _exit_before(source, owner, part)
        if current is not None and owner[current] in blocks:
            break
    if not blocks:
        return None
    return Stream(tuple(blocks[::-1]), tuple(entries[::-1]), tuple(exits[::-1]))


def _sources_of_block(value: fx.Node, owner: dict[fx.Node, Block]) -> list[fx.Node]:
    """The values that what leaves a block is the sum of, beside what was added in it.

    Where they were taken from a larger value that had been written to, its views are taken anew by whoever reads them
    first, as functional graphs have it: in the block.
    """
    block = owner[value]

    def inside(node: fx.Node) -> bool:
        return owner.get(node) is block

    def taken_from_outside(node: fx.Node) -> bool:
        return node.target is aten.slice.Tensor and not any(map(inside, node.all_input_nodes))

    return residual_sources(value, inside) or residual_sources(
        value, lambda node: inside(node) and not taken_from_outside(node)
    )


def _of_stream(sources: Sequence[fx.Node], owner: dict[fx.Node, Block], added_again: set[fx.Node]) -> fx.Node | None:
    """Of the values that a block adds to, the stream: it comes out of a block before.

    That of the first block comes out of none, as what each block adds anew (an embedding of positions), but no block
    behind it adds it again.
    """
    if len(sources) > 1:
        from_blocks = [node for node in sources if _exit_before(node, owner, None)[0] is not None]
        sources = from_blocks or [node for node in sources if node not in added_again] or sources
    return _most_done_for(sources)


def _part_read(value: fx.Node, owner: dict[fx.Node, Block]) -> Window:
    """What part of a value is read outside blocks, where it is one: the image out of both streams."""
    readers = [user for user in value.users if user not in owner]
    readers = [part for reader in readers for part in (reader.users if reader.target in CUTS else [reader])]
    parts = {window for reader in readers for source, window in steps(reader, None) or [(value, None)]}
    return next(iter(parts)) if len(parts) == 1 else None


def _exit_before(entry: fx.Node, owner: dict[fx.Node, Block], part: Window) -> tuple[fx.Node | None, Window]:
    """The value of an earlier block that `entry` comes from, and the part of it that is read in the end.

    Where lists join several streams it is the one of which `part` is read in the end, or else the largest.
    """
    if entry in owner:
        return entry, part
    found = [
        [(node, window) for node, window, _ in origins(entry, lambda node: node not in owner, read) if node in owner]
        for read in (part, None)
    ]
    exit_before, window = max(found[0] or found[1], key=lambda each: size_of(each[0]), default=(None, None))
    return exit_before, None if exit_before is None or covers(exit_before, window) else window


def _effort(node: fx.Node) -> int:
    """How many nodes a value depends on."""
    seen, waiting = {node}, [node]
    while waiting:
        sources = [source for source in waiting.pop().all_input_nodes if source not in seen]
        seen.update(sources)
        waiting.extend(sources)
    return len(seen)
