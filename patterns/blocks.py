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

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from paracompile.errors import module_paths
from paracompile.layout.graph import is_tensor, named_arguments
from paracompile.layout.sizes import sizes_of
from paracompile.patterns.autocast import ENTER_AUTOCAST, EXIT_AUTOCAST
from paracompile.torch_private import OpOverload

aten = torch.ops.aten

_KEEPS = {aten.clone.default, aten._to_copy.default, aten.clamp.default, aten.nan_to_num.default, aten.alias.default}
_REARRANGES = {aten.reshape.default, aten.permute.default, aten.transpose.int, aten.unsqueeze.default, aten.squeeze.dim}
_CUTS = {aten.split.Tensor, aten.split_with_sizes.default}


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
    """The residual stream through the longest run of blocks; None where no two blocks follow each other on one.

    Where none reaches the output, because the last blocks begin with a projection of the stream and an earlier one, it
    is that of the blocks before, if they are more than half of all.
    """
    blocks = find_blocks(graph)
    owner = {node: block for block in blocks for node in block.nodes}
    to_output = _longest_run(blocks, owner, lambda user, last: user not in owner)
    if to_output is not None:
        return to_output
    run = _longest_run(blocks, owner, lambda user, last: owner.get(user) is not last)
    return run if run is not None and 2 * len(run.blocks) > len(blocks) else None


def _longest_run(
    blocks: Sequence[Block], owner: dict[fx.Node, Block], ends: Callable[[fx.Node, Block], bool]
) -> Stream | None:
    """The longest run of which the last value has a reader that `ends` says is behind it."""
    runs = []
    for last in blocks:
        exits = [node for node in last.nodes if is_tensor(node) and any(ends(user, last) for user in node.users)]
        traced = [stream for node in exits if (stream := _run_to(node, owner, _part_read(node, owner))) is not None]
        if traced:
            runs.append(max(traced, key=lambda stream: (len(stream.blocks), _size(stream.exits[-1]))))
    best = max(runs, key=lambda stream: len(stream.blocks), default=None)
    return best if best is not None and len(best.blocks) > 1 else None


def residual_source(value: fx.Node, inside: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The value outside that `value` is a residual stream of: `value` = it + what was added inside.

    None where there is no such value of the same shape and type. Of several, such as the stream and what a ControlNet
    adds to it, the stream is the one that most was done for.
    """
    return _most_done_for(_residual_sources(value, inside))


def _residual_sources(value: fx.Node, inside: Callable[[fx.Node], bool]) -> list[fx.Node]:
    """The values outside that `value` is the sum of, position by position, beside what was added inside."""
    places = _some_places(value)
    return list(
        {
            node: None
            for node, window, origin in _origins(value, inside, places=places)
            if _covers(node, window) and _alike(node, value) and origin in (None, places)
        }
    )


def _most_done_for(values: Sequence[fx.Node]) -> fx.Node | None:
    return max(values, key=_effort) if len(values) > 1 else next(iter(values), None)


def brought_back(stream: Stream, first: int, end: int) -> list[fx.Node]:
    """The nodes behind blocks `first` to `end - 1` that bring the stream into the order in which it entered them.

    There are such where lists of blocks take turns, on the tokens of each frame and on the frames of each token; none
    where it leaves as it entered, or is not brought back by views alone.
    """
    found: list[fx.Node] = []
    value, entry = stream.exits[end - 1], stream.entries[first]
    while entry not in _residual_sources(value, lambda node: node is not entry):
        readers = list(value.users)
        if len(readers) != 1 or readers[0].target not in _REARRANGES | _KEEPS:
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
            waiting.extend(source for source, window in _steps(node, None) if window is None)
            continue
        arguments = named_arguments(node)
        sources = [residual_source(part, inside) if inside(part) else part for part in arguments["tensors"]]
        if None not in sources:
            return Joined(arguments["dim"] % len(_shape(node)), tuple(source for source in sources if source))
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
        block = owner[current]
        sources = _residual_sources(current, lambda node, block=block: owner.get(node) is block)  # type: ignore[misc]
        source = _of_stream(sources, owner, added_again)
        if source is None:
            break
        added_again.update(sources)
        blocks.append(block)
        entries.append(source)
        exits.append(current)
        current, part = _exit_before(source, owner, part)
        if current is not None and owner[current] in blocks:
            break
    if not blocks:
        return None
    return Stream(tuple(blocks[::-1]), tuple(entries[::-1]), tuple(exits[::-1]))


def _of_stream(sources: Sequence[fx.Node], owner: dict[fx.Node, Block], added_again: set[fx.Node]) -> fx.Node | None:
    """Of the values that a block adds to, the stream: it comes out of a block before.

    That of the first block comes out of none, as what each block adds anew (an embedding of positions), but no block
    behind it adds it again.
    """
    if len(sources) > 1:
        from_blocks = [node for node in sources if _exit_before(node, owner, None)[0] is not None]
        sources = from_blocks or [node for node in sources if node not in added_again] or sources
    return _most_done_for(sources)


Window = tuple[int, int, int] | None
"""A part of a value: dimension, first position and length; None for all of it."""


def _part_read(value: fx.Node, owner: dict[fx.Node, Block]) -> Window:
    """What part of a value is read outside blocks, where it is one: the image out of both streams."""
    readers = [user for user in value.users if user not in owner]
    readers = [part for reader in readers for part in (reader.users if reader.target in _CUTS else [reader])]
    parts = {window for reader in readers for source, window in _steps(reader, None) or [(value, None)]}
    return next(iter(parts)) if len(parts) == 1 else None


def _exit_before(entry: fx.Node, owner: dict[fx.Node, Block], part: Window) -> tuple[fx.Node | None, Window]:
    """The value of an earlier block that `entry` comes from, and the part of it that is read in the end.

    Where lists join several streams it is the one of which `part` is read in the end, or else the largest.
    """
    if entry in owner:
        return entry, part
    found = [
        [(node, window) for node, window, _ in _origins(entry, lambda node: node not in owner, read) if node in owner]
        for read in (part, None)
    ]
    exit_before, window = max(found[0] or found[1], key=lambda each: _size(each[0]), default=(None, None))
    return exit_before, None if exit_before is None or _covers(exit_before, window) else window


Places = tuple[int, ...] | None
"""Some positions of a value, counted through all its dimensions; None where they were not followed."""


def _some_places(value: fx.Node) -> Places:
    """Positions enough to tell whether a value lies in another order."""
    return tuple(number * 0x9E3779B1 % max(1, _size(value)) for number in range(64))


def _origins(
    value: fx.Node, inside: Callable[[fx.Node], bool], part: Window = None, places: Places = None
) -> list[tuple[fx.Node, Window, Places]]:
    """The values not inside that `value` (or a part of it) comes from, which parts of them, and where `places` were."""
    found: list[tuple[fx.Node, Window, Places]] = []
    seen: set[tuple[fx.Node, Window]] = set()
    waiting: list[tuple[fx.Node, Window, Places]] = [(value, part, places)]
    while waiting:
        node, window, now = waiting.pop()
        if (node, window) in seen:
            continue
        seen.add((node, window))
        if node.op == "placeholder" or not inside(node):
            if node is not value:
                found.append((node, window, now))
            continue
        waiting.extend((source, taken, _places_before(node, source, now)) for source, taken in _steps(node, window))
    return found


def _places_before(node: fx.Node, source: fx.Node, places: Places) -> Places:
    """Where positions of what a node makes of `source` are in it; None where it takes a part or joins."""
    if places is None or _size(source) != _size(node):
        return None
    rank = len(_shape(node))
    if node.target is aten.transpose.int:
        arguments, order = named_arguments(node), list(range(rank))
        one, other = arguments["dim0"] % rank, arguments["dim1"] % rank
        order[one], order[other] = other, one
    elif node.target is aten.permute.default:
        order = [dim % rank for dim in named_arguments(node)["dims"]]
    else:
        return places
    before, after = _strides(_shape(source)), _strides(_shape(node))
    return tuple(
        sum(place // after[dim] % _shape(node)[dim] * before[origin] for dim, origin in enumerate(order))
        for place in places
    )


def _strides(shape: Sequence[int]) -> list[int]:
    """How far apart neighbours along each dimension are, where all positions are counted."""
    return [prod(shape[dim + 1 :]) for dim in range(len(shape))]


def _steps(node: fx.Node, window: Window) -> list[tuple[fx.Node, Window]]:
    """Where the stream comes from in one node."""
    if node.target is operator.getitem:
        return _step_of_part(node, window)
    if not isinstance(node.target, OpOverload) or not is_tensor(node):
        return []
    arguments = named_arguments(node)
    operands = [source for source in node.all_input_nodes if is_tensor(source)]
    same = [(source, window) for source in operands if _shape(source) == _shape(node)]
    if node.target in _KEEPS or (node.target is aten.reshape.default and same):
        return same
    if node.target in _REARRANGES:
        return [(arguments["self"], None)] if window is None else []
    if node.target is aten.add.Tensor and arguments["alpha"] == 1:
        return same
    if node.target is aten.slice.Tensor and arguments["step"] == 1 and window is None:
        source, dim = arguments["self"], arguments["dim"] % len(_shape(node))
        start = arguments["start"] or 0
        first = max(0, start + _shape(source)[dim] if start < 0 else start)
        return [(source, (dim, first, _shape(node)[dim]))]
    if node.target is aten.cat.default:
        return _steps_of_cat(arguments["tensors"], arguments["dim"] % len(_shape(node)), window)
    return []


def _step_of_part(node: fx.Node, window: Window) -> list[tuple[fx.Node, Window]]:
    """A `getitem` of a split takes a window of what is split."""
    split, index = node.args
    if window is not None or not isinstance(split, fx.Node) or split.target not in _CUTS:
        return []
    arguments = named_arguments(split)
    dim = arguments["dim"] % len(_shape(node))
    lengths = [part.shape[dim] for part in split.meta["val"]]
    assert isinstance(index, int)
    return [(arguments["self"], (dim, sum(lengths[:index]), lengths[index]))]


def _steps_of_cat(parts: Sequence[fx.Node], dim: int, window: Window) -> list[tuple[fx.Node, Window]]:
    if window is None or window[0] != dim:
        return [(part, window) for part in parts] if window is None else []
    start = 0
    for part in parts:
        length = _shape(part)[dim]
        if window[1:] == (start, length):
            return [(part, None)]
        start += length
    return []


def _covers(node: fx.Node, window: Window) -> bool:
    """Whether a window takes in the whole value."""
    return window is None or window[1:] == (0, _shape(node)[window[0]])


def _alike(node: fx.Node, other: fx.Node) -> bool:
    return is_tensor(node) and _shape(node) == _shape(other) and node.meta["val"].dtype == other.meta["val"].dtype


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return sizes_of(node.meta["val"])


def _effort(node: fx.Node) -> int:
    """How many nodes a value depends on."""
    seen, waiting = {node}, [node]
    while waiting:
        sources = [source for source in waiting.pop().all_input_nodes if source not in seen]
        seen.update(sources)
        waiting.extend(sources)
    return len(seen)


def _size(node: fx.Node) -> int:
    return prod(_shape(node))
