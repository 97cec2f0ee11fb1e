"""The graph as the analysis sees it: values, operations, and the shapes that rules are asked about."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import fx

from paracompile.layout.factors import Factor, Op, Operand, Rule, Shape
from paracompile.layout.sizes import bytes_in, sizes_of
from paracompile.torch_private import STATIC_INPUT, OpOverload, schema_of


@dataclass(frozen=True)
class Value:
    """A tensor in the graph: result `index` of `node` (the node itself, or its `getitem` where it has several)."""

    node: fx.Node
    index: int = 0


@dataclass(frozen=True, eq=False)
class Operation:
    """A node that computes tensors.

    attributes:
        node: the node.
        op: its operator at concrete shapes; None where it is not an ATen operator on tensors.
        rule: what may be cut in it; None where nothing is known.
        operands: the values it takes, in the schema's order, lists flattened (as `Op.operands`).
        results: the values it makes.
    """

    node: fx.Node
    op: Op | None
    rule: Rule | None
    operands: tuple[Value, ...]
    results: tuple[Value, ...]

    @cached_property
    def factors(self) -> Sequence[Factor]:
        """The factors that may be cut; none where nothing is known of the operator, or only data tells a size."""
        if self.rule is None or self.op is None:
            return ()
        sizes = chain.from_iterable(self.op.operands + self.op.results)
        return self.rule.factors(self.op) if all(isinstance(size, int) for size in sizes) else ()


def tensor_of(value: Value) -> torch.Tensor:
    """The (fake) tensor that stands for the value."""
    fake = value.node.meta["val"]
    tensor = fake[value.index] if isinstance(fake, (tuple, list)) else fake
    assert isinstance(tensor, torch.Tensor)
    return tensor


def shape_of(value: Value) -> Shape:
    return sizes_of(tensor_of(value))


def bytes_of(value: Value) -> int:
    """At the sizes of the first call: what costs are weighed by."""
    return bytes_in(tensor_of(value))


def value_of(node: fx.Node) -> Value:
    """The value that a node names: a `getitem` names a result of its producer."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
        return Value(node.args[0], node.args[1])
    return Value(node)


def node_of(value: Value) -> fx.Node:
    """The node that names a value: its producer, or the `getitem` of one of several results."""
    if isinstance(value.node.meta["val"], (tuple, list)):
        return next(user for user in value.node.users if user.args[1:] == (value.index,))
    return value.node


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def readers_of(node: fx.Node) -> list[fx.Node]:
    """What reads a node's results, be it through the `getitem` of one."""
    return [
        reader for user in node.users for reader in (readers_of(user) if user.target is operator.getitem else [user])
    ]


def writes(node: fx.Node) -> bool:
    """Whether a node writes to its operands."""
    return isinstance(node.target, OpOverload) and schema_of(node.target).is_mutable


def is_static(node: fx.Node) -> bool:
    """Whether a graph input is a parameter or a buffer, as Dynamo says: the same at each call, and on all ranks."""
    return STATIC_INPUT in node.meta.get("tensor_dict", {})


def operations(graph: fx.Graph, rule_for: Callable[[OpOverload[..., Any]], Rule | None]) -> list[Operation]:
    """Every node that computes tensors, in the graph's order."""
    return [
        _operation(node, rule_for)
        for node in graph.nodes
        if node.op == "call_function" and node.target is not operator.getitem
    ]


def _operation(node: fx.Node, rule_for: Callable[[OpOverload[..., Any]], Rule | None]) -> Operation:
    results = tuple(Value(node, index) for index in range(_result_count(node)))
    if not isinstance(node.target, OpOverload):
        operands = tuple(value_of(source) for source in node.all_input_nodes if is_tensor(source))
        return Operation(node, None, None, operands, results)
    found: list[Value] = []

    def stand_in(argument: Any) -> Any:
        if isinstance(argument, fx.Node) and is_tensor(argument):
            found.append(value_of(argument))
            return Operand(len(found) - 1)
        if isinstance(argument, (list, tuple)):
            return [stand_in(item) for item in argument]
        return argument

    arguments = {name: stand_in(argument) for name, argument in named_arguments(node).items()}
    dtypes = tuple(tensor_of(value).dtype for value in found)
    op = Op(node.target, arguments, tuple(map(shape_of, found)), tuple(map(shape_of, results)), dtypes)
    return Operation(node, op, rule_for(node.target) if results else None, tuple(found), results)


def spelled(operation: Operation, operands: Sequence[fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of an operation on these operands."""
    assert operation.op is not None
    args, kwargs = [], {}
    for parameter in schema_of(operation.op.target).arguments:
        if parameter.name in operation.op.arguments:
            argument = _fill(operation.op.arguments[parameter.name], operands)
            if parameter.kwarg_only:
                kwargs[parameter.name] = argument
            else:
                args.append(argument)
    return tuple(args), kwargs


def _fill(argument: Any, operands: Sequence[fx.Node]) -> Any:
    if isinstance(argument, Operand):
        return operands[argument.index]
    if isinstance(argument, (list, tuple)):
        return [_fill(item, operands) for item in argument]
    return argument


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument of an ATen node by its name in the schema, defaults filled in."""
    assert isinstance(node.target, OpOverload)
    named: dict[str, Any] = {}
    for position, parameter in enumerate(schema_of(node.target).arguments):
        if parameter.name in node.kwargs:
            named[parameter.name] = node.kwargs[parameter.name]
        elif position < len(node.args) and not parameter.kwarg_only:
            named[parameter.name] = node.args[position]
        else:
            named[parameter.name] = parameter.default_value
    return named


def _result_count(node: fx.Node) -> int:
    fake = node.meta.get("val")
    if isinstance(fake, torch.Tensor):
        return 1
    if isinstance(fake, (tuple, list)) and all(isinstance(item, torch.Tensor) for item in fake):
        return len(fake)
    return 0
