"""Which inputs of a graph its caller sees again: those that the model writes to, and those that it hands back.

What Dynamo hands back of an input that nothing was done to is the caller's own tensor; the graph has no such output.
(An input of which the graph computes nothing is not even given to it.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, fx

from paracompile.layout.graph import writes
from paracompile.torch_private import (
    FakeTensor,
    InstructionTranslator,
    OpOverload,
    TensorVariable,
    TorchDispatchMode,
    VariableTracker,
    memory_of,
    schema_of,
    tree_leaves,
)

__all__ = ["seen_again", "seen_again_as_captured"]


def seen_again(graph: fx.Graph) -> frozenset[int]:
    """The places of these inputs among those of a functional graph; valid while Dynamo compiles it."""
    names = _handed_back()
    return frozenset(
        place
        for place, node in enumerate(graph.find_nodes(op="placeholder"))
        if node.name in names or any(writes(user) and user.args[0] is node for user in node.users)
    )


def seen_again_as_captured(gm: fx.GraphModule) -> frozenset[int]:
    """The same of a graph as Dynamo hands it over, which is not functional, and whose sizes may be symbols."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    values = [node.meta["example_value"] for node in placeholders]
    writes = _Writes()
    for fake_mode in [value.fake_mode for value in values if isinstance(value, FakeTensor)][:1]:
        with torch.no_grad(), mock.patch.object(fake_mode, "allow_non_fake_inputs", True), fake_mode, writes:
            fx.Interpreter(gm).run(*values)
    names = _handed_back()
    return frozenset(
        place
        for place, (node, value) in enumerate(zip(placeholders, values, strict=True))
        if node.name in names or (isinstance(value, Tensor) and memory_of(value) in writes.memories)
    )


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the memory of all that operators write to, themselves or a view of it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.memories: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(schema_of(cast(OpOverload[..., Any], func)).arguments):
            if argument.is_write:
                given = args[number] if number < len(args) else kwargs.get(argument.name)
                self.memories |= {memory_of(leaf) for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
        return func(*args, **kwargs)


def _handed_back() -> frozenset[str]:
    """The inputs among what lives on after the graph: the returned value, and after a graph break the locals."""
    frame = InstructionTranslator.current_tx()
    names: set[str] = set()

    def see(variable: VariableTracker) -> None:
        # One that is not yet a tensor would become one if `isinstance` asked it, and a new input of the graph.
        if issubclass(type(variable), TensorVariable):
            source = cast(TensorVariable, variable).proxy.node
            if source.op == "placeholder":
                names.add(source.name)

    alive = [frame.stack, list(frame.symbolic_locals.values())]
    if "side_effects" in inspect.signature(VariableTracker.visit).parameters:  # not yet in torch 2.11
        VariableTracker.visit(see, alive, side_effects=frame.output.side_effects)
    else:
        VariableTracker.visit(see, alive)
    return frozenset(names)
