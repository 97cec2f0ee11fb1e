"""Spells operators on tensor subclasses so that the subclass is asked.

    before                                               after
    aten.linear.default(x, quantised weight)             torch.nn.functional.linear(x, quantised weight)
    cond(hit, reuse, compute, (x, quantised weight))     cond(hit, reuse, compute, (x, data, scale)), and in a branch
                                                         linear(x, rebuild(data, scale))

A weight quantised by torchao answers `torch.nn.functional.linear`; the ATen operator would be decomposed first, into
operators that it does not know. `torch.cond` takes plain tensors only (torch 2.13), so such a weight comes in as the
tensors that it is made of and is put together where it is used. Comes last: from here on the graph is not all ATen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from paracompile.passes.first_block_cache import COND

__all__ = ["dispatch_on_subclasses", "flatten_inputs", "flattened_inputs"]

Rebuild = Callable[..., torch.Tensor]


def dispatch_on_subclasses(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """Respells `linear` on subclasses among the graph's inputs, and takes apart those that a conditional is given.

    `flattened_inputs` then says which inputs are to be taken apart for the call. In place.
    """
    inputs = zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=False)  # inputs of our own come last
    special = {node: value for node, value in inputs if is_traceable_wrapper_subclass(value)}
    conditionals = gm.graph.find_nodes(op="call_function", target=COND)
    places = {node: place for place, node in enumerate(gm.graph.find_nodes(op="placeholder"))}
    taken_apart = {node: value for node, value in special.items() if set(conditionals) & set(node.users)}
    rebuilt = _take_apart(gm.graph, taken_apart)
    for conditional in conditionals:
        _pass_leaves(gm, conditional, rebuilt)
    for node in taken_apart:
        gm.graph.erase_node(node)
    linears = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    _respell(linears, {*special, *(whole for wholes in rebuilt.values() for whole in wholes[0])})
    gm.meta["flattened_inputs"] = tuple(sorted(places[node] for node in taken_apart))
    gm.recompile()
    return gm


def flattened_inputs(gm: fx.GraphModule) -> tuple[int, ...]:
    """The places of inputs that the graph takes as the plain tensors that they are made of."""
    places: tuple[int, ...] = gm.meta.get("flattened_inputs", ())
    return places


def flatten_inputs(arguments: Iterable[Any], places: Sequence[int]) -> list[Any]:
    """The arguments with those at `places` taken apart."""
    flat: list[Any] = []
    for place, argument in enumerate(arguments):
        flat.extend(_leaves(argument) if place in places else [argument])
    return flat


def _respell(linears: Iterable[fx.Node], special: set[fx.Node]) -> None:
    for node in linears:
        if special & set(node.all_input_nodes):
            node.target = torch.nn.functional.linear


Rebuilt = Mapping[fx.Node, tuple[list[fx.Node], list[fx.Node], Rebuild]]
"""For each input that was taken apart: the nodes that put it together, its plain tensors, and what puts it together."""


def _take_apart(graph: fx.Graph, inputs: Mapping[fx.Node, Any]) -> Rebuilt:
    """Writes placeholders for the plain tensors of each input, and puts it together before each use."""
    rebuilt = {}
    for node, value in inputs.items():
        leaves = _split_placeholder(graph, node, _leaves(value))
        rebuild = _rebuild_of(value)
        wholes = [
            _put_together(graph, user, node, leaves, rebuild) for user in list(node.users) if user.target is not COND
        ]
        rebuilt[node] = (wholes, leaves, rebuild)
    return rebuilt


def _pass_leaves(gm: fx.GraphModule, conditional: fx.Node, rebuilt: Rebuilt) -> None:
    """Gives a conditional and its branches plain tensors."""
    hit, reuse, compute, operands = conditional.args
    assert isinstance(operands, tuple)
    for name in (reuse, compute):
        assert isinstance(name, fx.Node)
        branch = gm.get_submodule(str(name.target))
        assert isinstance(branch, fx.GraphModule)
        inputs = branch.graph.find_nodes(op="placeholder")
        wholes = set()
        for operand, node in zip(operands, inputs, strict=True):
            if operand not in rebuilt:
                continue
            _, leaves, rebuild = rebuilt[operand]
            inner = _split_placeholder(branch.graph, node, [leaf.meta["val"] for leaf in leaves])
            wholes |= {_put_together(branch.graph, user, node, inner, rebuild) for user in list(node.users)}
            branch.graph.erase_node(node)
        _respell(branch.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default), wholes)
        branch.recompile()
    flat: list[Any] = []
    for operand in operands:
        flat.extend(rebuilt[operand][1] if isinstance(operand, fx.Node) and operand in rebuilt else [operand])
    conditional.args = (hit, reuse, compute, tuple(flat))


def _split_placeholder(graph: fx.Graph, node: fx.Node, leaves: Sequence[torch.Tensor]) -> list[fx.Node]:
    made = []
    with graph.inserting_before(node):
        for number, leaf in enumerate(leaves):
            made.append(graph.placeholder(f"{node.name}_{number}"))
            made[-1].meta["val"] = leaf
            made[-1]._dynamo_source = None
    return made


def _put_together(
    graph: fx.Graph, user: fx.Node, node: fx.Node, leaves: Sequence[fx.Node], rebuild: Rebuild
) -> fx.Node:
    with graph.inserting_before(user):
        whole = graph.call_function(rebuild, tuple(leaves))
    whole.meta["val"] = node.meta["val"]
    user.replace_input_with(node, whole)
    return whole


def _leaves(value: Any) -> list[torch.Tensor]:
    """The plain tensors that a subclass is made of; subclasses within it are taken apart as well."""
    if not is_traceable_wrapper_subclass(value):
        return [value]
    names, _ = value.__tensor_flatten__()
    return [leaf for name in names for leaf in _leaves(getattr(value, name))]


def _rebuild_of(value: Any) -> Rebuild:
    """What puts `_leaves(value)` together again."""
    names, context = value.__tensor_flatten__()
    inner = {name: getattr(value, name) for name in names}
    counts = {name: len(_leaves(part)) for name, part in inner.items()}
    parts = {name: _rebuild_of(part) for name, part in inner.items() if is_traceable_wrapper_subclass(part)}
    kind, size, stride = type(value), tuple(map(int, value.shape)), tuple(map(int, value.stride()))

    def rebuild(*leaves: torch.Tensor) -> torch.Tensor:
        rest, made = list(leaves), {}
        for name in names:
            own, rest = rest[: counts[name]], rest[counts[name] :]
            made[name] = parts[name](*own) if name in parts else own[0]
        whole: torch.Tensor = kind.__tensor_unflatten__(made, context, size, stride)
        return whole

    return rebuild
