"""The graph as the analysis sees it: values, operations, and the shapes that rules are asked about."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch._ops import OpOverload

from paracompile.errors import GraphError
from paracompile.layout.factors import Factor, Op, Operand, Rule, Shape


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
        """The factors that may be cut; none where nothing is known of the operator."""
        return self.rule.factors(self.op) if self.rule is not None and self.op is not None else ()


def tensor_of(value: Value) -> torch.Tensor:
    """The (fake) tensor that stands for the value."""
    fake = value.node.meta["val"]
    tensor = fake[value.index] if isinstance(fake, (tuple, list)) else fake
    assert isinstance(tensor, torch.Tensor)
    return tensor


def shape_of(value: Value) -> Shape:
    return tuple(tensor_of(value).shape)


def bytes_of(value: Value) -> int:
    tensor = tensor_of(value)
    return tensor.numel() * tensor.element_size()


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
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable


def is_static(node: fx.Node) -> bool:
    """Whether a graph input is a parameter or a buffer, as Dynamo says: the same at each call, and on all ranks."""
    return "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})


def check_static(graph: fx.Graph, example_inputs: Sequence[Any]) -> None:
    """Raises a GraphError where a parameter is not static: by another torch it may be called otherwise.

    Such a weight would be sent to all ranks at each call, and nothing would tell.
    """
    for node, value in zip(graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, nn.Parameter) and not is_static(node):
            raise GraphError(
                node,
                f"it is a parameter, and torch {torch.__version__} does not say so as paracompile reads it",
                "use a version of torch that paracompile was tested with, and report this",
            )


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
    op = Op(node.target, arguments, tuple(map(shape_of, found)), tuple(map(shape_of, results)))
    return Operation(node, op, rule_for(node.target) if results else None, tuple(found), results)


def spelled(operation: Operation, operands: Sequence[fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments of an operation on these operands."""
    assert operation.op is not None
    args, kwargs = [], {}
    for parameter in operation.op.target._schema.arguments:
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
    for position, parameter in enumerate(node.target._schema.arguments):
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
