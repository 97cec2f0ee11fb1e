"""Marks what the first block cache may skip, in the graph of the whole model, before it is sharded.

    part "front"    embeddings, the first blocks; what depends on no later part          always computed
    part "middle"   blocks 1..N-1 (or 0..N-1) and the code between them                  computed or skipped
    part "back"     the last blocks, if some are kept; norm, projection, output          always computed

Every node gets its part, and nodes that are written for it later (its shards, the exchanges between ranks) inherit it.
Values get roles, which are carried over to the shards as well:

    "before", "after"           the stream where it enters the first block, and where it leaves the front: the
                                difference is the first block's residual, which decides
    "modulation"                what the first block makes of the stream before its first product; decides if asked to
    "enter k", "leave k"        a stream where it enters the middle, and what the back reads of it: their difference is
                                what is stored. A value of the middle that is no stream only has "leave k".

Where the middle joins several streams, and the back reads them as one, they are taken apart where they leave and joined
anew behind, so that each is a residual of one that enters.

Requires functional ATen with static sizes; changes nothing else but `meta`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from paracompile.errors import GraphError, OptionError
from paracompile.layout.graph import is_static, is_tensor
from paracompile.layout.sizes import hint, sizes_of
from paracompile.passes.found import Found, Skipped
from paracompile.passes.writer import GraphWriter
from paracompile.patterns.autocast import AUTOCAST_EDGES
from paracompile.patterns.blocks import (
    Block,
    Joined,
    Stream,
    brought_back,
    find_blocks,
    find_stream,
    joined_sources,
    residual_source,
)
from paracompile.torch_private import detect_fake_mode

__all__ = ["WATCHED", "Part", "mark_blocks", "part_of", "roles_of"]

aten = torch.ops.aten

Part = Literal["front", "middle", "back"]

WATCHED = {"residual": ("before", "after"), "modulation": ("modulation",)}
"""By what the cache may watch, the roles of the values that tell it."""

_ORDER: dict[Part, int] = {"front": 0, "middle": 1, "back": 2}
_PRODUCTS = {aten.linear.default, aten.matmul.default, aten.mm.default, aten.addmm.default, aten.bmm.default}
_NARROWS = {aten.slice.Tensor, aten.split.Tensor, aten.split_with_sizes.default}


def part_of(node: fx.Node) -> Part:
    """The part that a node belongs to; a result of an operation belongs to where the operation does."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    part: Part = node.meta.get("cache_part", "front")
    return part


def roles_of(node: fx.Node) -> dict[str, str]:
    """The roles of a node's value; for each, the form of it that this is.

    "" is the whole; "/sequence 1 [12, 48]" is a rank's part along an axis, which cuts this dimension in these segments.
    """
    roles: dict[str, str] = node.meta.get("cache_roles", {})
    return roles


def mark_blocks(
    gm: fx.GraphModule,
    example_inputs: Sequence[object],
    *,
    first_blocks: int = 1,
    last_blocks: int = 0,
    watch: str = "residual",
    found: Found,
) -> fx.GraphModule:
    """Marks the graph's nodes; leaves a graph without repeated blocks as it is, and tells `found` nothing.

    args:
        first_blocks: blocks at the front that are always computed and decide; 0: of the first one only what the
            "modulation" takes.
        last_blocks: blocks at the end that are always computed.
        watch: what decides, one of `WATCHED`.

    raises:
        OptionError: no block is left to skip, or the first block has no product.
        GraphError: only the data tells how many tokens a block has.
    """
    _check_sizes(gm.graph)
    stream = find_stream(gm.graph)
    if stream is None:
        return gm
    paths = tuple(block.path for block in stream.blocks)
    end = len(paths) - last_blocks
    if first_blocks >= end:
        raise OptionError(
            "first_blocks" if first_blocks >= len(paths) else "last_blocks",
            first_blocks if first_blocks >= len(paths) else last_blocks,
            f"the model has {len(paths)} blocks, {paths[0]} to {paths[-1]}: with {first_blocks} computed at the front "
            f"and {last_blocks} at the end, none is left to skip",
        )
    modulation = _modulation(stream) if watch == "modulation" else None
    parts = _parts(gm.graph, stream, first_blocks, end, modulation)
    for node, part in parts.items():
        node.meta["cache_part"] = part
    if first_blocks:
        _mark(_start_of_residual(stream, first_blocks), "before")
        _mark(stream.exits[first_blocks - 1], "after")
    if modulation is not None:
        _mark(modulation, "modulation")
    _take_apart(gm.graph)
    for number, node in enumerate(_leaving(gm.graph)):
        _mark(node, f"leave {number}")
        source = residual_source(node, _in_middle)
        if source is not None:
            _mark(source, f"enter {number}")
    found.skipped = _skipped(gm.graph, stream, paths[first_blocks:end])
    return gm


def _check_sizes(graph: fx.Graph) -> None:
    for block in find_blocks(graph):
        for node in block.nodes:
            if is_tensor(node) and free_unbacked_symbols(node.meta["val"]):
                raise GraphError(
                    node,
                    "only the data tells its size, so that nothing can be stored for it between steps",
                    "leave out fullgraph=True, so that Dynamo breaks the graph where it is read, or leave out rdt",
                )


def _skipped(graph: fx.Graph, stream: Stream, middle: tuple[str, ...]) -> Skipped:
    """What may be skipped, and what tells calls apart."""
    brought, times = _call_inputs(graph), _times(graph)
    sample = _sample(graph, stream, times)
    changing = (*times, *([] if sample is None else [sample]))
    return Skipped(
        blocks=tuple(block.path for block in stream.blocks),
        middle=middle,
        sample=sample,
        times=times,
        inputs=(*(index for index, _ in brought if index not in changing), *changing),
        numbers=frozenset(index for index, node in brought if node.meta["number"]),
    )


def _mark(node: fx.Node, role: str) -> None:
    node.meta["cache_roles"] = {**roles_of(node), role: ""}


def _parts(graph: fx.Graph, stream: Stream, first: int, end: int, modulation: fx.Node | None) -> dict[fx.Node, Part]:
    """The part of every node but the autocast edges outside blocks, which stay where they stand."""
    of_block: dict[fx.Node, Part] = {}
    for index, block in enumerate(stream.blocks):
        part: Part = "front" if index < first else "middle" if index < end else "back"
        of_block.update(dict.fromkeys(block.nodes, part))
    if not first and modulation is not None:
        of_block.update(dict.fromkeys(_made_for(modulation, stream.blocks[0]), "front"))
    of_block.update(dict.fromkeys(brought_back(stream, first, end), "middle"))
    feeds_middle: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(of_block.get(user) == "middle" or user in feeds_middle for user in node.users):
            feeds_middle.add(node)
    parts: dict[fx.Node, Part] = {}
    for node in graph.nodes:
        if node.op == "output" or (node.target in AUTOCAST_EDGES and node not in of_block):
            continue
        latest: Part = max(
            (parts.get(source, "front") for source in node.all_input_nodes), key=_ORDER.__getitem__, default="front"
        )
        if node in of_block:
            parts[node] = of_block[node]
            _check_order(node, parts[node], latest)
        else:
            late = latest == "middle" and node not in feeds_middle
            if late and not _narrows(node, parts):
                latest = "back"
            elif node.target is aten.cat.default and all(of_block.get(user) == "middle" for user in node.users):
                latest = "middle"  # joined there, so that a part of what leaves it is found in what enters
            parts[node] = latest
        if node.target is operator.getitem:
            parts[node] = parts[node.all_input_nodes[0]]
    return parts


def _narrows(node: fx.Node, parts: dict[fx.Node, Part]) -> bool:
    """Whether the node takes a part of a value of the middle, and nobody later needs the rest (the text's tokens).

    Of a stream only what is a stream itself is taken: where tokens were joined before the middle, none of them enters
    it alone, and what is stored is what was added to all.
    """
    if node.target not in _NARROWS:
        return False
    (whole,) = node.all_input_nodes
    taken = [node] if is_tensor(node) else list(node.users)

    def entered(value: fx.Node) -> fx.Node | None:
        return residual_source(value, lambda inside: inside in (node, value) or parts.get(inside) == "middle")

    if entered(whole) is not None and None in map(entered, taken):
        return False
    return all(user.target in _NARROWS for user in whole.users if parts.get(user) != "middle")


def _check_order(node: fx.Node, part: Part, latest: Part) -> None:
    if _ORDER[latest] > _ORDER[part]:
        raise GraphError(
            node,
            f"it belongs to the blocks at the {part} and needs a value of a later block ({latest}), so blocks cannot "
            "be skipped",
            "choose other first_blocks and last_blocks, or leave out rdt",
        )


def _in_middle(node: fx.Node) -> bool:
    return part_of(node) == "middle"


def _leaving(graph: fx.Graph) -> list[fx.Node]:
    """The values of the middle that are read after it."""
    return [
        node for node in graph.nodes if _in_middle(node) and is_tensor(node) and not all(map(_in_middle, node.users))
    ]


def _take_apart(graph: fx.Graph) -> None:
    """Has streams that the middle joined, and that the back reads as one, leave it apart."""
    for node in _leaving(graph):
        joined = joined_sources(node, _in_middle) if residual_source(node, _in_middle) is None else None
        if joined is not None:
            _rejoin(graph, node, joined)


def _rejoin(graph: fx.Graph, node: fx.Node, joined: Joined) -> None:
    """Cuts the stream at the end of the middle, and joins it for those who read it behind."""
    fake_mode = detect_fake_mode(node.meta["val"])
    assert fake_mode is not None
    write = GraphWriter(fake_mode, graph)
    with graph.inserting_before(node.next):
        write.origin, start, streams = node, 0, []
        for source in joined.sources:
            end = start + sizes_of(source.meta["val"])[joined.dim]
            streams.append(write(aten.slice.Tensor, node, joined.dim, start, end))
            start = end
        write.origin = None
        again = write(aten.cat.default, streams, joined.dim)
    again.meta["cache_part"] = "back"
    node.replace_all_uses_with(again, delete_user_cb=lambda user: not _in_middle(user))


def _start_of_residual(stream: Stream, first: int) -> fx.Node:
    """Where the stream has entered the blocks of the front that keep its shape."""
    shape = sizes_of(stream.exits[first - 1].meta["val"])
    start = first - 1
    while start > 0 and sizes_of(stream.entries[start - 1].meta["val"]) == shape:
        start -= 1
    return stream.entries[start]


def _modulation(stream: Stream) -> fx.Node:
    """What the first block makes of the stream for its first product: normalised, scaled and shifted by the time."""
    on_stream = {stream.entries[0]}
    for node in stream.blocks[0].nodes:
        if on_stream.isdisjoint(node.all_input_nodes):
            continue
        if node.target in _PRODUCTS and node.args[0] in on_stream and isinstance(node.args[0], fx.Node):
            return node.args[0]
        on_stream.add(node)
    raise OptionError(
        "watch", "modulation", f"the first block, {stream.blocks[0].path}, has no product on its stream: leave it out"
    )


def _made_for(modulation: fx.Node, block: Block) -> set[fx.Node]:
    """What of a block the modulation depends on, itself included."""
    inside, found, waiting = set(block.nodes), set[fx.Node](), [modulation]
    while waiting:
        node = waiting.pop()
        if node in inside and node not in found:
            found.add(node)
            waiting.extend(node.all_input_nodes)
    for node in block.nodes[: block.nodes.index(modulation)]:
        if node.target in AUTOCAST_EDGES:
            raise OptionError("first_blocks", 0, f"{block.path} begins under an autocast of its own: give at least 1")
    return found


def _times(graph: fx.Graph) -> tuple[int, ...]:
    """One number a row, or what a model calls by its name: some take a time for each token.

    Of Python's numbers only what is called so: a scale tells nothing of where in a generation a call is.
    """
    return tuple(
        index
        for index, node in _call_inputs(graph)
        if "timestep" in node.name or (node.meta["val"].dim() <= 1 and not node.meta["number"])
    )


def _sample(graph: fx.Graph, stream: Stream, times: tuple[int, ...]) -> int | None:
    """Of the inputs that the stream starts from: one as large as an output (a denoiser's), else the largest."""
    seen, waiting = {stream.entries[0]}, [stream.entries[0]]
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                waiting.append(source)
    (output,) = graph.find_nodes(op="output")
    shapes = [_first_shape(node) for node in output.all_input_nodes if is_tensor(node)]
    candidates = [
        (_first_shape(node) in shapes, prod(_first_shape(node)), -index)
        for index, node in _call_inputs(graph)
        if node in seen and index not in times
    ]
    return -max(candidates)[2] if candidates else None


def _first_shape(node: fx.Node) -> tuple[int, ...]:
    """The shape at the first call: which input is denoised does not depend on the sizes of later ones."""
    return tuple(map(hint, sizes_of(node.meta["val"])))


def _call_inputs(graph: fx.Graph) -> list[tuple[int, fx.Node]]:
    """The tensors that a call brings, with their places: neither parameters nor buffers."""
    return [
        (index, node)
        for index, node in enumerate(graph.find_nodes(op="placeholder"))
        if is_tensor(node) and not is_static(node)
    ]
