"""Which inputs of a graph its caller sees again: those that the model writes to, and those that it hands back.

What Dynamo hands back of an input that nothing was done to is the caller's own tensor; the graph has no such output.
(An input of which the graph computes nothing is not even given to it.)
"""

from __future__ import annotations

from torch import fx
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables import TensorVariable
from torch._dynamo.variables.base import VariableTracker

from paracompile.layout.graph import writes

__all__ = ["seen_again"]


def seen_again(graph: fx.Graph) -> frozenset[int]:
    """The places of these inputs among those of a functional graph; valid while Dynamo compiles it."""
    names = _handed_back()
    return frozenset(
        place
        for place, node in enumerate(graph.find_nodes(op="placeholder"))
        if node.name in names or any(writes(user) and user.args[0] is node for user in node.users)
    )


def _handed_back() -> frozenset[str]:
    """The inputs among what lives on after the graph: the returned value, and after a graph break the locals."""
    frame = InstructionTranslator.current_tx()
    names: set[str] = set()

    def see(variable: VariableTracker) -> None:
        # Others are not looked at: one that is not yet a tensor would become one, and a new input of the graph.
        if isinstance(variable, TensorVariable) and variable.proxy.node.op == "placeholder":
            names.add(variable.proxy.node.name)

    alive = [frame.stack, list(frame.symbolic_locals.values())]
    VariableTracker.visit(see, alive, side_effects=frame.output.side_effects)
    return frozenset(names)
