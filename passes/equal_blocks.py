"""Traces equal blocks once: in Dynamo's graph each gives way to a stand-in, which what was traced of one replaces.

    before                             folded                                   unfolded
    h1 = block 0 (40 nodes)            (h1,) = block([h0, w0], like, "0")       h1 = block 0 (100 ATen nodes)
    h2 = block 1 (40 nodes)            (h2,) = block([h1, w1], like, "0")       h2 = block 1 (100 ATen nodes, copied)

Blocks are modules in lists (`patterns.blocks`), equal if they compute the same on inputs that look alike
(`patterns.regions`). A block is folded only if it stands by itself: its nodes follow each other, only tensors leave and
only tensors and sizes enter it, no size depends on data, and no autocast region is open around it. Sizes are calculated
in front of all blocks: else the first one would calculate them for the others, and be none of their equals. The caller
checks what only tracing shows: that a block writes to none of its inputs and hands none of them on, and that nobody
writes to what leaves it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from paracompile.layout.sizes import size_of
from paracompile.passes.formulas import Formulas, symbols_of
from paracompile.patterns.autocast import AUTOCAST_EDGES
from paracompile.patterns.blocks import find_blocks
from paracompile.patterns.regions import Body, look_of
from paracompile.torch_private import LazyGraphModule

__all__ = ["STAND_IN", "Folded", "fold_equal_blocks", "unfold"]


@torch.library.custom_op("paracompile::block", mutates_args=())
def block(inputs: list[Tensor], like: list[Tensor], name: str) -> list[Tensor]:
    """What stands for a block while the rest is traced: new tensors, like those given. It is never run."""
    raise AssertionError("a stand-in was left in the graph")


@block.register_fake
def _(inputs: list[Tensor], like: list[Tensor], name: str) -> list[Tensor]:
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device) for x in like]


STAND_IN = torch.ops.paracompile.block.default


@dataclass(frozen=True)
class Folded:
    """A graph in which stand-ins stand for equal blocks.

    attributes:
        gm: Dynamo's graph with stand-ins; further inputs, behind its own, are what they are given as `like`.
        like: fake tensors for these inputs.
        bodies: by the name that a stand-in is given, the block as a graph of its own.
        members: by stand-in in the order of the graph, the nodes of Dynamo's graph that it stands for.
    """

    gm: fx.GraphModule
    like: list[Tensor]
    bodies: Mapping[str, fx.GraphModule]
    members: Sequence[tuple[fx.Node, ...]]

    def examples(self, name: str) -> list[Any]:
        """What a body is traced with."""
        return [node.meta["example_value"] for node in self.bodies[name].graph.find_nodes(op="placeholder")]


def fold_equal_blocks(gm: fx.GraphModule) -> Folded | None:
    """Puts stand-ins in the place of blocks that have an equal; None if there are none. `gm` is not touched."""
    gm = _with_sizes_in_front(gm)
    found = [body for body in _bodies(gm.graph) if body is not None]
    signatures = {body: body.signature(_look) for body in found}
    count = Counter(signatures.values())
    repeated = [body for body in found if count[signatures[body]] > 1]
    if not repeated:
        return None
    names: dict[tuple[object, ...], str] = {}
    bodies: dict[str, fx.GraphModule] = {}
    likes: dict[str, tuple[Tensor, ...]] = {}
    for body in repeated:
        if signatures[body] not in names:
            name = names[signatures[body]] = str(len(names))
            bodies[name] = _as_graph(body)
            likes[name] = tuple(node.meta["example_value"] for node in body.outputs)
    graph = fx.Graph()
    outer: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        outer[node] = graph.node_copy(node)
    like = {name: [_given(graph, f"like_{name}_{place}", x) for place, x in enumerate(likes[name])] for name in likes}
    starts = {body.nodes[0]: body for body in repeated}
    inside = {node for body in repeated for node in body.nodes}
    for node in gm.graph.nodes:
        if node in starts:
            body = starts[node]
            name = names[signatures[body]]
            given = [outer[source] for source in body.inputs if _is_tensor(source)]
            stand_in = graph.call_function(STAND_IN, (given, like[name], name))
            for place, output in enumerate(body.outputs):
                outer[output] = graph.call_function(operator.getitem, (stand_in, place))
        if node not in inside and node.op != "placeholder":
            outer[node] = graph.node_copy(node, outer.__getitem__)
    folded = LazyGraphModule(gm, graph)
    return Folded(
        folded, [tensor for name in likes for tensor in likes[name]], bodies, [body.nodes for body in repeated]
    )


def unfold(traced: fx.GraphModule, folded: Folded, bodies: Mapping[str, fx.GraphModule]) -> None:
    """Puts what was traced of each block in the place of its stand-ins, and drops the inputs that they were given.

    In what was traced sizes are stated where they are used: those that enter a block are read no more.
    """
    stand_ins = traced.graph.find_nodes(op="call_function", target=STAND_IN)
    for stand_in, members in zip(stand_ins, folded.members, strict=True):
        inputs, _, name = stand_in.args
        assert isinstance(inputs, (list, tuple))
        body = bodies[str(name)].graph
        tensors = [node for node in body.find_nodes(op="placeholder") if isinstance(node.meta["val"], Tensor)]
        inner = dict(zip(tensors, inputs, strict=True))
        with traced.graph.inserting_before(stand_in):
            for node in body.nodes:
                if node.op == "get_attr":
                    inner[node] = _constant(traced, stand_in.graph, bodies[str(name)], node)
                elif node.op == "call_function":
                    inner[node] = traced.graph.node_copy(node, inner.__getitem__)
                    inner[node].meta.update(_provenance(members, node))
        (output,) = body.find_nodes(op="output")
        for user in list(stand_in.users):
            place = user.args[1]
            assert isinstance(place, int)
            user.replace_all_uses_with(inner[output.args[0][place]])
            traced.graph.erase_node(user)
        traced.graph.erase_node(stand_in)
    for node in traced.graph.find_nodes(op="placeholder")[-len(folded.like) :]:
        traced.graph.erase_node(node)


def _with_sizes_in_front(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with all sizes calculated behind its inputs; `gm` itself where no size is open."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs = gm.graph.find_nodes(op="placeholder")
    for node in inputs:
        copies[node] = graph.node_copy(node)
    symbols = symbols_of(inputs, "example_value")
    if not symbols:
        return gm
    formulas = Formulas(graph, {symbol: copies[node] for symbol, node in symbols.items()})
    for node in gm.graph.nodes:
        if node not in copies and _is_size(node):
            copies[node] = made = formulas.written(size_of(node.meta["example_value"]))
            if isinstance(made, fx.Node):
                made.meta["example_value"] = node.meta["example_value"]
    for node in gm.graph.nodes:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    in_front = LazyGraphModule(gm, graph)
    in_front.graph.eliminate_dead_code()
    return in_front


def _bodies(graph: fx.Graph) -> list[Body | None]:
    order = [node for node in graph.nodes if node.op not in ("placeholder", "get_attr", "output")]
    place = {node: number for number, node in enumerate(order)}
    blocks = (tuple(node for node in block.nodes if node in place) for block in find_blocks(graph))  # weights left out
    bodies = [_body(Body(nodes, None), place) for nodes in blocks if nodes]
    folded = {node for body in bodies if body is not None for node in body.nodes}
    if any(node.target in AUTOCAST_EDGES and node not in folded for node in order):
        return []
    return bodies


def _body(body: Body, place: Mapping[fx.Node, int]) -> Body | None:
    """The block, if it stands by itself."""
    adjacent = place[body.nodes[-1]] - place[body.nodes[0]] + 1 == len(body.nodes)
    plain = all(_is_tensor(node) or _is_size(node) for node in body.inputs) and all(map(_is_tensor, body.outputs))
    calls = all(node.op in ("call_function", "call_method") for node in body.nodes)
    return body if adjacent and plain and calls and not any(map(_depends_on_data, body.nodes)) else None


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), Tensor) and not _depends_on_data(node)


def _is_size(node: fx.Node) -> bool:
    return isinstance(size_of(node.meta.get("example_value")), int)


def _depends_on_data(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        return True
    return isinstance(value, (Tensor, torch.SymInt)) and bool(free_unbacked_symbols(value))


def _look(node: fx.Node) -> object:
    return look_of(node.meta.get("example_value"))


def _as_graph(body: Body) -> fx.GraphModule:
    graph = fx.Graph()
    inner: dict[fx.Node, fx.Node] = {}
    for node in body.inputs:
        inner[node] = _given(graph, node.name, node.meta["example_value"])
    for number, node in enumerate(body.nodes):
        inner[node] = graph.node_copy(node, inner.__getitem__)
        inner[node].meta = {"stack_trace": str(number)}  # tracing hands it on, see `_provenance`
    graph.output(tuple(inner[node] for node in body.outputs))
    return LazyGraphModule(nn.Module(), graph)


def _given(graph: fx.Graph, name: str, example: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["example_value"] = example
    return node


def _provenance(members: Sequence[fx.Node], node: fx.Node) -> dict[str, Any]:
    """Where a node comes from: what Dynamo says of the node of its own block that it was traced of."""
    number = node.meta.get("stack_trace", "")
    of = members[int(number)] if number.isdigit() else members[0]
    return {key: of.meta[key] for key in ("nn_module_stack", "source_fn_stack", "stack_trace") if key in of.meta}


def _constant(traced: fx.GraphModule, graph: fx.Graph, body: fx.GraphModule, node: fx.Node) -> fx.Node:
    """A constant of a body, as one of the graph that takes it in."""
    value = getattr(body, str(node.target))
    # Of one tensor under several names `buffers` tells one only, and names would be given twice.
    name = f"_block_constant_{len(list(traced.named_buffers(remove_duplicate=False)))}"
    traced.register_buffer(name, value)
    made = graph.get_attr(name)
    made.meta.update(node.meta)
    return made
