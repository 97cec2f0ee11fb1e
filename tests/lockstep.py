"""All ranks in one process, with real values: the graphs of P ranks interpreted side by side.

The graphs are walked node by node together. An ordinary node runs once for each rank; at a collective the helper itself
carries the values between the ranks. No process group, no gloo.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

c10d = torch.ops._c10d_functional


def run_lockstep(graphs: Sequence[fx.GraphModule], inputs: Sequence[Sequence[Any]]) -> list[Any]:
    """Runs graph r on inputs r for every rank r; the outputs by rank."""
    nodes = [list(gm.graph.nodes) for gm in graphs]
    assert len({len(of_rank) for of_rank in nodes}) == 1, "the ranks' graphs differ in length"
    environments: list[dict[fx.Node, Any]] = [{} for _ in graphs]
    placeholders = [iter(values) for values in inputs]
    for together in zip(*nodes, strict=True):
        assert len({(node.op, str(node.target)) for node in together if node.op == "call_function"}) <= 1
        if together[0].op == "placeholder":
            for environment, node, values in zip(environments, together, placeholders, strict=True):
                environment[node] = next(values)
            continue
        arguments = [
            fx.map_arg((node.args, node.kwargs), environment.__getitem__)
            for node, environment in zip(together, environments, strict=True)
        ]
        if together[0].op == "output":
            return [args[0] for args, _ in arguments]
        if together[0].op == "get_attr":
            results = [getattr(gm, node.target) for gm, node in zip(graphs, together, strict=True)]
        elif together[0].target in _COLLECTIVES:
            results = _COLLECTIVES[together[0].target]([args for args, _ in arguments])
        else:
            results = [node.target(*args, **kwargs) for node, (args, kwargs) in zip(together, arguments, strict=True)]
        for environment, node, result in zip(environments, together, results, strict=True):
            environment[node] = result
    raise AssertionError("a graph without an output")


def _all_to_all(arguments: list[Any]) -> list[torch.Tensor]:
    sent = [buffer.split(sizes) for buffer, _, sizes, _ in arguments]
    received = [torch.cat([parts[rank] for parts in sent]) for rank in range(len(arguments))]
    for result, (_, arriving, _, _) in zip(received, arguments, strict=True):
        assert sum(arriving) == len(result)
    return received


def _all_gather(arguments: list[Any]) -> list[torch.Tensor]:
    gathered = torch.cat([buffer for buffer, _, _ in arguments])
    return [gathered.clone() for _ in arguments]


_COLLECTIVES = {
    c10d.all_to_all_single.default: _all_to_all,
    c10d.all_gather_into_tensor.default: _all_gather,
    c10d.wait_tensor.default: lambda arguments: [args[0] for args in arguments],
}
