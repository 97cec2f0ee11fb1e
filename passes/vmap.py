"""Writes what `torch.vmap` maps as operators on whole batches: functorch's levels are no operators.

    before (Dynamo's graph)                          after
    _vmap_increment_nesting(8, 'error')              y = call_module(x)      with the graph
    b = _add_batch_dim(x, 0, 1)                          sum = aten.sum.dim_IntList(x, [1, 2])
    y = _remove_batch_dim(b * b.sum(), 1, 8, 0)          y = aten.mul.Tensor(x, aten.unsqueeze(...))
    _vmap_decrement_nesting()

functorch itself does the work, while it is traced.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from paracompile.torch_private import (
    get_dynamic_layer_stack_depth,
    pop_dynamic_layer_stack,
    vmap_decrement_nesting,
    vmap_increment_nesting,
)

__all__ = ["write_vmaps"]


def write_vmaps(gm: fx.GraphModule, stand_in: Callable[[Any], Any]) -> fx.GraphModule:
    """Dynamo's graph with a call of its own graph for each region that is mapped; `gm` itself where there is none.

    args:
        stand_in: makes a plain fake tensor like an example value; called, as all tracing is done, in the mode outside.
    """
    if not gm.graph.find_nodes(op="call_function", target=vmap_increment_nesting):
        return gm
    graph = fx.Graph()
    bodies: dict[str, fx.GraphModule] = {}
    copies: dict[fx.Node, fx.Node] = {}
    region: list[fx.Node] = []
    depth = 0
    for node in gm.graph.nodes:
        depth += node.target is vmap_increment_nesting
        if depth == 0:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            continue
        region.append(node)
        depth -= node.target is vmap_decrement_nesting
        if depth == 0:
            name = f"mapped_{len(bodies)}"
            bodies[name] = _call(name, gm, graph, copies, region, stand_in)
            region = []
    targets = {str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module")} - bodies.keys()
    held = {target: operator.attrgetter(target)(gm) for target in targets}
    written = fx.GraphModule({**held, **bodies}, graph)
    written.meta.update(gm.meta)
    return written


def _call(
    name: str,
    gm: fx.GraphModule,
    graph: fx.Graph,
    copies: dict[fx.Node, fx.Node],
    region: list[fx.Node],
    stand_in: Callable[[Any], Any],
) -> fx.GraphModule:
    """Writes the call of a region, and returns what is called: the region as it is traced."""
    inside = set(region)
    taken = dict.fromkeys(source for node in region for source in node.all_input_nodes if source not in inside)
    given = [node for node in region if any(user not in inside for user in node.users)]
    body = fx.Graph()
    copied = {source: body.placeholder(source.name) for source in taken}
    for node in region:
        copied[node] = body.node_copy(node, copied.__getitem__)
    body.output(tuple(copied[node] for node in given))
    with _levels_kept():
        traced = make_fx(fx.GraphModule(gm, body), tracing_mode="fake", _allow_non_fake_inputs=True)(
            *(stand_in(source.meta["example_value"]) for source in taken)
        )
    made = graph.call_module(name, tuple(copies[source] for source in taken))
    for index, node in enumerate(given):
        copies[node] = graph.call_function(operator.getitem, (made, index))
        copies[node].meta.update(node.meta)
    return traced


@contextlib.contextmanager
def _levels_kept() -> Iterator[None]:
    """Leaves functorch's levels as they were, also where what is mapped raises: torch would map all that follows."""
    before = get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        while get_dynamic_layer_stack_depth() > before:
            pop_dynamic_layer_stack()
