"""Python's numbers among a graph's inputs that may change from call to call: a scale, a guidance, a time.

Dynamo takes a number for a constant until it meets a second value, and then for an input: a float as a tensor () that
is asked for its `item()`, an int as a symbol. Most of them are only calculated with, which a tensor () can be as well.
An int in a shape stays a symbol, as the sizes of tensors are; attention's own scale must be known while compiling.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_symbols

from paracompile.torch_private import SYMBOLIC, refs_tensor

__all__ = ["FILLED", "IN_PLACE", "MADE", "OF_NUMBERS", "Numbers", "find_numbers"]

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
_FUNCTIONS = ("sqrt", "sin", "cos", "tan", "sinh", "cosh", "tanh", "asin", "acos", "atan", "log2")

OF_NUMBERS: Mapping[Any, Callable[..., torch.Tensor]] = {
    **{getattr(operator, name): getattr(operator, name) for name in (*_BINARY, "neg", "pos", "abs")},
    **{getattr(operator, f"i{name}"): getattr(operator, name) for name in _BINARY},
    **{SYMBOLIC[name]: getattr(torch, name) for name in _FUNCTIONS if name in SYMBOLIC},
    torch.sym_float: operator.pos,
}
"""Functions that make a number of numbers, and the function of tensors () that does the same."""

MADE = frozenset({torch.scalar_tensor, refs_tensor})
"""What makes a tensor () of one number."""

FILLED: Mapping[Any, int] = {torch.full: 1, torch.full_like: 1, "new_full": 2}
"""What makes a tensor of a shape that is full of a number, and the place of the number."""

_ARITHMETIC = (*_BINARY, "div", "eq", "ne", "lt", "le", "gt", "ge")
_WRITING = ("add", "sub", "mul", "truediv", "div", "pow")

IN_PLACE: Mapping[Any, int] = {
    **{getattr(operator, f"i{name}"): 1 for name in _WRITING if hasattr(operator, f"i{name}")},
    **{f"{name}_": 1 for name in _WRITING if hasattr(torch.Tensor, f"{name}_")},
    "fill_": 1,
    "masked_fill_": 2,
    operator.setitem: 2,
}
"""What writes to its first operand, and the place of a number that it takes."""

_BY_PLACE: Mapping[Any, tuple[int, ...]] = {
    **{getattr(operator, name): (0, 1) for name in _ARITHMETIC if hasattr(operator, name)},
    **{getattr(torch, name): (0, 1) for name in _ARITHMETIC if hasattr(torch, name)},
    **{name: (1,) for name in _ARITHMETIC if hasattr(torch.Tensor, name)},
    torch.where: (1, 2),
    "where": (2,),
    "masked_fill": (2,),
    **dict.fromkeys(MADE, (0,)),
    **{target: (place,) for target, place in {**FILLED, **IN_PLACE}.items()},
}
"""By function or method, the places in which a tensor () is as good as a number."""


@dataclass(frozen=True)
class Numbers:
    """What was found in one graph of Dynamo's.

    attributes:
        kept: the nodes that stand for numbers which are only calculated with.
        inputs: the places of all graph inputs that are numbers.
        ints: the places of kept ones that are ints.
        constants: the symbols of floats that are not kept; an int is a size then, and may be open.
    """

    kept: frozenset[fx.Node]
    inputs: frozenset[int]
    ints: frozenset[int]
    constants: frozenset[sympy.Symbol]


def find_numbers(graph: fx.Graph) -> Numbers:
    """All numbers that come in from outside; sizes of tensors are none."""
    placeholders = graph.find_nodes(op="placeholder")
    tensors = [node.meta["example_value"] for node in placeholders if _is_tensor(node)]
    sizes = set().union(*map(free_symbols, tensors))
    sources: dict[fx.Node, frozenset[fx.Node]] = {}  # by number, the nodes that it is calculated from
    for node in graph.nodes:
        if not isinstance(node.meta.get("example_value"), (torch.SymInt, torch.SymFloat)):
            continue
        if _comes_in(node) and not free_symbols(node.meta["example_value"]) <= sizes:
            sources[node] = frozenset({node})
        elif made_of := [sources[source] for source in node.all_input_nodes if source in sources]:
            sources[node] = frozenset().union(*made_of)
    needed = [sources[node] for node in sources if not all(_calculates(user, node) for user in node.users)]
    constant = frozenset[fx.Node]().union(*needed)
    kept = frozenset(node for node in sources if sources[node] - constant)
    values = [node.meta["example_value"] for node in constant]
    return Numbers(
        kept=kept,
        inputs=frozenset(place for place, node in enumerate(placeholders) if _is_number(node)),
        ints=frozenset(place for place, node in enumerate(placeholders) if node in kept),
        constants=frozenset().union(*(free_symbols(value) for value in values if isinstance(value, torch.SymFloat))),
    )


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("example_value"), torch.Tensor)


def _is_number(placeholder: fx.Node) -> bool:
    is_float = getattr(placeholder.meta.get("grapharg"), "pass_arg_as_tensor", False)
    return is_float or isinstance(placeholder.meta.get("example_value"), torch.SymInt)


def _comes_in(node: fx.Node) -> bool:
    """Whether a number is a graph input, or the `item()` of one."""
    asked = node.op == "call_method" and node.target == "item"
    return node.op == "placeholder" or (asked and _is_number(node.all_input_nodes[0]))


def _calculates(user: fx.Node, number: fx.Node) -> bool:
    """Whether `user` does with a number nothing but what it could do with a tensor ()."""
    places: Sequence[int] = ()
    if isinstance(user.meta.get("example_value"), (torch.SymInt, torch.SymFloat)):
        places = range(len(user.args)) if user.target in OF_NUMBERS else ()
    elif _is_tensor(user) or user.target in IN_PLACE:
        places = _BY_PLACE.get(user.target, ())
    read: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), read.append)
    return read.count(number) == sum(place < len(user.args) and user.args[place] is number for place in places)
