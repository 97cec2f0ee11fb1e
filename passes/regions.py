"""Cuts the graph into regions along its blocks; equal regions become one submodule that is called many times.

    before                                        after
    h0 = linear(x, w)                             h0 = self.region(x, w)
    h1 = h0 + linear(norm(h0), w0)                h1 = self.blocks_0(h0, w0)
    h2 = h1 + linear(norm(h1), w1)                h2 = self.blocks_0(h1, w1)
    cond(hit, reuse, compute, (h2, ...))          cond(hit, reuse, compute, (h2, ...))      (its branches are cut alike)
    return linear(norm(h3), w3)                   return self.region_2(h3, w3)

Each submodule takes its inputs in the order in which it reads them, whatever they are called outside, so that equal
blocks make equal submodules; then each is compiled once. What is of no block joins the region before it, where that is
met only once: nothing is lost by it.

How a value lies in memory at the edge of a region is stated: contiguous, if the region computes it, so that a stream
does not keep the layout of what it was patched from through all blocks; where it is a view (a slice of a larger result)
as it is, so that nothing is copied. What the next region is compiled with is what fake tensors say of the one before.
Where only one operand of a `cat` or `stack` holds anything, it is written as the copy that it is: Inductor would hand
back a tensor with the operand's strides, whatever it promised.

What remains calls submodules and takes their results, and is run by `paracompile.runtime.program`.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx, nn

from paracompile.errors import GraphError, module_paths
from paracompile.layout.graph import is_static
from paracompile.layout.sizes import formula, formula_of, free_symbols_of, size_of
from paracompile.passes.evaluation import evaluating
from paracompile.passes.first_block_cache import COND
from paracompile.passes.formulas import Formulas, symbols_of
from paracompile.patterns.regions import Body, cut_along_blocks, is_view, look_of
from paracompile.torch_private import (
    FakeTensorMode,
    LazyGraphModule,
    detect_fake_mode,
    forget_originals,
    is_traceable_wrapper_subclass,
    set_parameter_sources,
    set_source,
)

__all__ = ["cut_into_regions", "examples_of", "regions_of"]

aten = torch.ops.aten


def cut_into_regions(gm: fx.GraphModule, example_inputs: Sequence[Any], *, along_blocks: bool = True) -> fx.GraphModule:
    """The graph of calls, in place.

    args:
        along_blocks: False: cut at conditionals only, so that each part is compiled in one piece.
    """
    _Cutter(gm, example_inputs, along_blocks).run()
    return gm


def regions_of(gm: fx.GraphModule) -> dict[fx.GraphModule, int]:
    """The different regions of a graph that was cut, branches included, and how often each is called."""
    found: Counter[fx.GraphModule] = Counter()
    for node in gm.graph.nodes:
        if node.op == "call_module":
            found[_submodule(gm, node.target)] += 1
        elif node.target is COND:
            for branch in node.args[1:3]:
                found.update(regions_of(_submodule(gm, branch.target)))
    return dict(found)


def examples_of(region: fx.GraphModule) -> list[Any]:
    """What a region is compiled with: fake tensors like its inputs."""
    return [node.meta["val"] for node in region.graph.find_nodes(op="placeholder")]


@dataclass(frozen=True)
class _Region:
    """A region as a submodule.

    attributes:
        name: what it is called.
        module: what it computes.
        results: fake tensors like its results.
        symbols: the sizes that it is given behind its other inputs.
    """

    name: str
    module: fx.GraphModule
    results: tuple[Tensor, ...]
    symbols: tuple[sympy.Symbol, ...]


class _Cutter:
    """Cuts a graph and the branches of its conditionals, in the order in which they run."""

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], along_blocks: bool) -> None:
        self.gm = gm
        self.along_blocks = along_blocks
        inputs = gm.graph.find_nodes(op="placeholder")
        examples = {node: node.meta.get("val") for node in inputs}  # numbers have none, and are constants by now
        fake_mode = detect_fake_mode([node.meta.get("val") for node in gm.graph.nodes]) or FakeTensorMode()
        self.fake_mode: FakeTensorMode = fake_mode
        self.bodies: dict[fx.GraphModule, list[Body | None]] = {}
        self.static = {node: node.meta["tensor_dict"] for node in inputs if is_static(node)}
        self.edges: dict[fx.Node, Any] = examples
        self.symbols = symbols_of(inputs, "val")
        for node, value in zip(inputs, example_inputs, strict=False):  # inputs of our own come last
            if is_traceable_wrapper_subclass(value):  # for which a plain tensor stands in
                self.edges[node] = fake_mode.from_tensor(cast(Tensor, value), static_shapes=True)
        self.signatures: dict[Body, tuple[object, ...]] = {}
        self.made: dict[tuple[object, ...], _Region] = {}
        self.names: Counter[str] = Counter()

    def run(self) -> None:
        self._look_through(self.gm)
        count = Counter(self.signatures.values())
        shared = {body for body, signature in self.signatures.items() if count[signature] > 1}
        for part, bodies in self.bodies.items():
            self.bodies[part] = _joined(bodies, shared, self.along_blocks)
        self.made.clear()
        self.names.clear()
        self._write(self.gm)
        forget_originals(self.fake_mode)

    def _look_through(self, part: fx.GraphModule) -> None:
        """Finds the regions of a graph, and their signatures before any are joined."""
        self.bodies[part] = cut_along_blocks(part.graph, COND)
        conditionals = iter(part.graph.find_nodes(op="call_function", target=COND))
        for body in self.bodies[part]:
            if body is None:
                conditional = next(conditionals)
                for branch in self._enter(part, conditional):
                    self._look_through(branch)
                    self._check_results(branch)
                self._leave(conditional)
            else:
                self.signatures[body] = body.signature(self._look)
                self._region(body)

    def _check_results(self, branch: fx.GraphModule) -> None:
        (output,) = branch.graph.find_nodes(op="output")
        for node in output.args[0]:
            if look_of(self.edges[node]) != look_of(self._contiguous(self.edges[node])):
                raise GraphError(
                    node,
                    "it leaves blocks that may be skipped and is not contiguous",
                    "this is a mistake in paracompile: please report it with the graph that "
                    'options={"dump": FOLDER} writes',
                )

    def _write(self, part: fx.GraphModule) -> None:
        """Rewrites one graph to calls; a branch is given all symbols behind its other inputs."""
        graph = fx.Graph()
        outer: dict[fx.Node, fx.Node] = {}
        for node in part.graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                outer[node] = graph.node_copy(node)
        symbols = {
            symbol: outer[node] if part is self.gm else graph.node_copy(node) for symbol, node in self.symbols.items()
        }
        conditionals = iter(part.graph.find_nodes(op="call_function", target=COND))
        for body in self.bodies[part]:
            if body is None:
                conditional = next(conditionals)
                for branch in self._enter(part, conditional):
                    self._write(branch)
                self._leave(conditional)
                for node in (conditional, *conditional.users):
                    outer[node] = graph.node_copy(node, outer.__getitem__)
                *others, operands = outer[conditional].args
                outer[conditional].args = (*others, (*cast(Any, operands), *symbols.values()))
                continue
            region = self._region(body)
            if not hasattr(part, region.name):
                part.add_submodule(region.name, region.module)
            given = *(outer[node] for node in body.inputs), *map(symbols.__getitem__, region.symbols)
            called = graph.call_module(region.name, given)
            called.meta["val"] = region.results
            for index, node in enumerate(body.outputs):
                outer[node] = graph.call_function(operator.getitem, (called, index))
                outer[node].meta.update({**node.meta, "val": region.results[index]})
        (output,) = part.graph.find_nodes(op="output")
        graph.output(fx.map_arg(output.args[0], outer.__getitem__))
        for node in graph.find_nodes(op="get_attr"):
            if not node.users:
                graph.erase_node(node)
        part.graph = graph
        part.recompile()

    # Values at the edges

    def _example(self, node: fx.Node) -> Any:
        if node.op == "get_attr" and node not in self.edges:
            constant = getattr(node.graph.owning_module, str(node.target))
            self.edges[node] = self.fake_mode.from_tensor(constant, static_shapes=True)
        return self.edges[node]

    def _look(self, node: fx.Node) -> object:
        return look_of(self._example(node)), node in self.static

    def _enter(self, part: fx.GraphModule, conditional: fx.Node) -> list[fx.GraphModule]:
        """The branches of a conditional, their inputs being what it is given."""
        _, *names, operands = conditional.args
        branches = [_submodule(part, name.target) for name in names]  # type: ignore[union-attr]
        for branch in branches:
            for operand, node in zip(operands, branch.graph.find_nodes(op="placeholder"), strict=True):  # type: ignore[arg-type]
                self.edges[node] = self._example(operand)
                if operand in self.static:
                    self.static[node] = self.static[operand]
        return branches

    def _leave(self, conditional: fx.Node) -> None:
        """What comes out of a conditional is contiguous, whichever branch made it."""
        for user in conditional.users:
            index = user.args[1]
            assert isinstance(index, int)
            self.edges[user] = self._contiguous(user.meta["val"])

    # Regions

    def _region(self, body: Body) -> _Region:
        signature = body.signature(self._look)
        if signature not in self.made:
            name = _name(body)
            self.names[name] += 1
            number = self.names[name]
            self.made[signature] = self._make(body, name if number == 1 else f"{name}_{number}")
        region = self.made[signature]
        self.edges.update(zip(body.outputs, region.results, strict=True))
        return region

    def _make(self, body: Body, name: str) -> _Region:
        graph = fx.Graph()
        inner: dict[fx.Node, fx.Node] = {}
        for number, node in enumerate(body.inputs):
            inner[node] = graph.placeholder(f"given_{number}")
            inner[node].meta["val"] = self._example(node)
            if node in self.static:
                inner[node].meta["tensor_dict"] = self.static[node]
            set_source(inner[node], None)  # a region's inputs come from many places
        arguments = [(node.args, node.kwargs) for node in body.nodes]
        symbols = tuple(free_symbols_of((arguments, [self._example(node) for node in body.inputs])))
        given = {symbol: graph.placeholder(f"size_{number}") for number, symbol in enumerate(symbols)}
        for symbol, node in given.items():
            # Made anew: Inductor takes an input for the symbol that it was made of, be that known to be another by now.
            node.meta["val"] = formula(size_of(self.symbols[symbol].meta["val"]))
            set_source(node, None)
        sizes = Formulas(graph, given)
        root = nn.Module()
        for node in body.nodes:
            for source in node.all_input_nodes:
                if source not in inner:  # a submodule, of an operator that takes one
                    inner[source] = graph.get_attr(str(source.target))
                    root.register_module(str(source.target), getattr(source.graph.owning_module, str(source.target)))
            part = _only_part(node)
            if part is not None:
                inner[node] = _copy(graph, node, inner[part])
                continue
            # Without its name, which tells where it stood: equal regions are equal in Inductor's cache, too.
            args, kwargs = sizes.written(fx.map_arg((node.args, node.kwargs), inner.__getitem__))
            inner[node] = graph.create_node(node.op, node.target, args, kwargs)
            inner[node].meta = dict(node.meta)
        graph.output(tuple(inner[node] for node in body.outputs))
        module = LazyGraphModule(root, graph)
        module.meta["dynamo_compile_id"] = None  # its mere presence says that inputs know whether they are parameters
        set_parameter_sources(module, {})
        return _Region(name, module, self._lay_out(module, [is_view(node) for node in body.outputs]), symbols)

    def _lay_out(self, module: fx.GraphModule, views: Sequence[bool]) -> tuple[Tensor, ...]:
        """Makes the results contiguous that are no views; what all of them look like then."""
        with evaluating(self.fake_mode):
            found = list(fx.Interpreter(module).run(*examples_of(module)))
        (output,) = module.graph.find_nodes(op="output")
        results = list(output.args[0])
        for place, (fake, view) in enumerate(zip(found, views, strict=True)):
            if fake.is_contiguous() or view:
                continue
            found[place] = self._contiguous(fake)
            with module.graph.inserting_before(output):
                how: dict[str, Any] = {"memory_format": torch.contiguous_format}
                results[place] = module.graph.call_function(aten.clone.default, (results[place],), how)
                results[place].meta["val"] = found[place]
        output.args = (tuple(results),)
        module.recompile()
        return tuple(found)

    def _contiguous(self, fake: Tensor) -> Tensor:
        with evaluating(self.fake_mode):
            return torch.empty(fake.shape, dtype=fake.dtype, device=fake.device)


def _joined(bodies: Sequence[Body | None], shared: set[Body], along_blocks: bool) -> list[Body | None]:
    """Joins what is of no block with the region before it, where that is met only once; or (not along blocks) all."""
    joined: list[Body | None] = []
    alone = True
    for body in bodies:
        last = joined[-1] if joined else None
        if body is not None and last is not None and (not along_blocks or (alone and body.block is None)):
            joined[-1] = Body((*last.nodes, *body.nodes), body.block)
            continue
        joined.append(body)
        alone = body not in shared
    return joined


def _only_part(node: fx.Node) -> fx.Node | None:
    """The operand of a `cat` or `stack` that is all of its result; None where there are more, or it is neither."""
    if node.target not in (aten.cat.default, aten.stack.default):
        return None
    parts: Sequence[fx.Node] = node.args[0]  # type: ignore[assignment]
    holding = [part for part in parts if 0 not in map(formula_of, part.meta["val"].shape)]
    return holding[0] if len(holding) == 1 and (len(parts) == 1 or node.target is aten.cat.default) else None


def _copy(graph: fx.Graph, joined: fx.Node, part: fx.Node) -> fx.Node:
    """What a `cat` or `stack` of nothing but `part` makes, contiguous."""
    like = joined.meta["val"]
    if joined.target is aten.stack.default:
        part = graph.call_function(aten.unsqueeze.default, (part, joined.args[1] if joined.args[1:] else 0))
        part.meta = dict(joined.meta)
    how: dict[str, Any] = {"dtype": like.dtype, "memory_format": torch.contiguous_format}
    copy = graph.call_function(aten._to_copy.default, (part,), how)
    copy.meta = dict(joined.meta)
    return copy


def _name(body: Body) -> str:
    """The name of the first block in a region, as "transformer_blocks_0"."""
    paths = (module_paths(node) for node in body.nodes)
    blocks = (path for outer in paths for path in outer if path.rpartition(".")[2].isdigit())
    return re.sub(r"\W", "_", next(blocks, "region"))


def _submodule(gm: fx.GraphModule, name: Any) -> fx.GraphModule:
    found = gm.get_submodule(name)
    assert isinstance(found, fx.GraphModule)
    return found
