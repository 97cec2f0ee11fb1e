"""Cuts the graph into regions along its blocks; equal regions become one submodule that is called many times.

    before                                        after
    h0 = linear(x, w)                             h0 = self.begin(x, w)
    h1 = h0 + linear(norm(h0), w0)                h1 = self.blocks_0(h0, w0)
    h2 = h1 + linear(norm(h1), w1)                h2 = self.blocks_0(h1, w1)
    cond(hit, reuse, compute, (h2, ...))          cond(hit, reuse, compute, (h2, ...))      (its branches are cut alike)
    return linear(norm(h3), w3)                   return self.end(h3, w3)

Each submodule takes its inputs in the order in which it reads them, whatever they are called outside, so that equal
blocks make equal submodules; then each is compiled once. What is of no block joins the region before it, where that is
met only once: nothing is lost by it.

What remains calls submodules and takes their results, and is run by `paracompile.runtime.program`.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paracompile.errors import module_paths
from paracompile.layout.graph import is_static
from paracompile.passes.first_block_cache import COND
from paracompile.patterns.regions import Body, cut_along_blocks, look_of

__all__ = ["cut_into_regions", "examples_of", "regions_of"]


def cut_into_regions(gm: fx.GraphModule, example_inputs: Sequence[Any], *, along_blocks: bool = True) -> fx.GraphModule:
    """The graph of calls.

    args:
        along_blocks: False: cut at conditionals only, so that each part is compiled in one piece.
    """
    graphs = _Graphs.of(gm, example_inputs)
    found = [cut_along_blocks(part.graph, COND, graphs.look) for part in graphs.parts]
    count = Counter(body.signature for bodies in found for body in bodies if body is not None)
    submodules = _Submodules(graphs)
    for part, bodies in zip(graphs.parts, found, strict=True):
        _write(part, _joined(bodies, count, along_blocks), submodules)
    return gm


def regions_of(gm: fx.GraphModule) -> dict[fx.GraphModule, int]:
    """The different regions of a graph that was cut, branches included, and how often each is called."""
    found: Counter[fx.GraphModule] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_module":
            region = gm.get_submodule(node.target)
            assert isinstance(region, fx.GraphModule)
            found[region] += 1
        elif node.target is COND:
            for branch in node.args[1:3]:
                found.update(regions_of(gm.get_submodule(branch.target)))  # type: ignore[arg-type]
    return dict(found)


def examples_of(region: fx.GraphModule) -> list[Any]:
    """What a region is compiled with: fake tensors like its inputs."""
    return [node.meta["val"] for node in region.graph.find_nodes(op="placeholder")]


@dataclass(frozen=True)
class _Graphs:
    """A graph and the branches of its conditionals.

    attributes:
        parts: the graph, then the branches.
        examples: by input of any of them, what it is compiled with, where that is a tensor subclass.
        static: those of the inputs that are parameters or buffers, with what Dynamo says of them.
    """

    parts: list[fx.GraphModule]
    examples: dict[fx.Node, Any]
    static: dict[fx.Node, Any]

    @classmethod
    def of(cls, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> _Graphs:
        inputs = gm.graph.find_nodes(op="placeholder")
        fake_mode = detect_fake_mode([node.meta["val"] for node in inputs])
        assert fake_mode is not None
        examples = {
            node: fake_mode.from_tensor(cast(Tensor, value), static_shapes=True)
            for node, value in zip(inputs, example_inputs, strict=False)  # inputs of our own come last
            if is_traceable_wrapper_subclass(value)  # for which a plain tensor stands in
        }
        found = cls([gm], examples, {node: node.meta["tensor_dict"] for node in inputs if is_static(node)})
        for conditional in gm.graph.find_nodes(op="call_function", target=COND):
            _, *branches, operands = conditional.args
            for branch in branches:
                found._add(gm.get_submodule(branch.target), operands)
        return found

    def _add(self, branch: nn.Module, operands: Sequence[fx.Node]) -> None:
        assert isinstance(branch, fx.GraphModule)
        self.parts.append(branch)
        for operand, node in zip(operands, branch.graph.find_nodes(op="placeholder"), strict=True):
            if operand in self.examples:
                self.examples[node] = self.examples[operand]
            if operand in self.static:
                self.static[node] = self.static[operand]

    def example(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return getattr(node.graph.owning_module, str(node.target))
        return self.examples.get(node, node.meta["val"])

    def look(self, node: fx.Node) -> object:
        return look_of(self.example(node)), node in self.static


def _joined(bodies: Sequence[Body | None], count: Counter[tuple[object, ...]], along_blocks: bool) -> list[Body | None]:
    """Joins what is of no block with the region before it, where that is met only once; or (not along blocks) all."""
    joined: list[Body | None] = []
    shared = False
    for body in bodies:
        last = joined[-1] if joined else None
        if body is not None and last is not None and not (along_blocks and (shared or body.block is not None)):
            joined[-1] = Body((*last.nodes, *body.nodes), body.block, body.looks)
            continue
        joined.append(body)
        shared = body is not None and count[body.signature] > 1
    return joined


class _Submodules:
    """The regions that were written, by signature."""

    def __init__(self, graphs: _Graphs) -> None:
        self.graphs = graphs
        self.written: dict[tuple[object, ...], tuple[str, fx.GraphModule]] = {}
        self.names: Counter[str] = Counter()

    def of(self, body: Body) -> tuple[str, fx.GraphModule]:
        if body.signature not in self.written:
            name = _name(body)
            self.names[name] += 1
            number = self.names[name]
            name = name if number == 1 else f"{name}_again_{number}"
            self.written[body.signature] = (name, self._module(body))
        return self.written[body.signature]

    def _module(self, body: Body) -> fx.GraphModule:
        graph = fx.Graph()
        inner: dict[fx.Node, fx.Node] = {}
        for number, node in enumerate(body.inputs):
            inner[node] = graph.placeholder(f"given_{number}")
            inner[node].meta["val"] = self.graphs.example(node)
            if node in self.graphs.static:
                inner[node].meta["tensor_dict"] = self.graphs.static[node]
            inner[node]._dynamo_source = None  # AOTAutograd asks; a region's inputs come from many places
        root = nn.Module()
        for node in body.nodes:
            for source in node.all_input_nodes:
                if source not in inner:  # a submodule, of an operator that takes one
                    inner[source] = graph.get_attr(str(source.target))
                    root.register_module(str(source.target), getattr(source.graph.owning_module, str(source.target)))
            # Without its name, which tells where it stood: equal regions are equal in Inductor's cache, too.
            args, kwargs = fx.map_arg((node.args, node.kwargs), inner.__getitem__)
            inner[node] = graph.create_node(node.op, node.target, args, kwargs)
            inner[node].meta = dict(node.meta)
        graph.output(tuple(inner[node] for node in body.outputs))
        module = fx.GraphModule(root, graph)
        module.meta["dynamo_compile_id"] = None  # its mere presence says that inputs know whether they are parameters
        module._param_name_to_source = {}  # type: ignore[assignment]
        return module


def _name(body: Body) -> str:
    """The name of the first block in a region, as "transformer_blocks_0"."""
    paths = (module_paths(node) for node in body.nodes)
    blocks = (path for outer in paths for path in outer if path.rpartition(".")[2].isdigit())
    return re.sub(r"\W", "_", next(blocks, "region"))


def _write(part: fx.GraphModule, bodies: Sequence[Body | None], submodules: _Submodules) -> None:
    """Rewrites one graph to calls, in place."""
    graph = fx.Graph()
    outer: dict[fx.Node, fx.Node] = {}
    for node in part.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            outer[node] = graph.node_copy(node)
    conditionals = iter(part.graph.find_nodes(op="call_function", target=COND))
    for body in bodies:
        if body is None:
            node = next(conditionals)
            for copied in (node, *node.users):
                outer[copied] = graph.node_copy(copied, outer.__getitem__)
            continue
        name, module = submodules.of(body)
        if not hasattr(part, name):
            part.add_submodule(name, module)
        called = graph.call_module(name, tuple(outer[node] for node in body.inputs))
        called.meta["val"] = tuple(node.meta["val"] for node in body.outputs)
        for index, node in enumerate(body.outputs):
            outer[node] = graph.call_function(operator.getitem, (called, index))
            outer[node].meta.update(node.meta)
    (output,) = part.graph.find_nodes(op="output")
    graph.output(fx.map_arg(output.args[0], outer.__getitem__))
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    part.graph = graph
    part.recompile()
