"""All ranks in one process, with real values: the graphs of P ranks interpreted side by side.

Each rank's graph is interpreted up to its next collective; then the helper carries the values between the ranks of
each group itself. No process group, no gloo. Groups are known by the names that `Ranks.simulated` gives them.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import fx

from paracompile.mesh import Ranks
from paracompile.passes.first_block_cache import COND

c10d = torch.ops._c10d_functional

Collective = tuple[Any, tuple[Any, ...]]


def run_lockstep(
    graphs: Sequence[fx.GraphModule], inputs: Sequence[Sequence[Any]], sizes: dict[str, int] | None = None
) -> list[Any]:
    """Runs graph r on inputs r for every rank r; the outputs by rank.

    args:
        sizes: the mesh's sizes by axis; all ranks on the ulysses axis if left out.
    """
    sizes = sizes or {"ulysses": len(graphs)}
    ranks = [Ranks.simulated(**sizes, rank=rank) for rank in range(len(graphs))]
    runs = [_run(gm, values) for gm, values in zip(graphs, inputs, strict=True)]
    outputs: list[Any] = [None] * len(runs)
    waiting: list[Any] = [None] * len(runs)
    while True:
        asked: list[Collective] = []
        for number, run in enumerate(runs):
            try:
                asked.append(run.send(waiting[number]))
            except StopIteration as end:
                outputs[number] = end.value
        if not asked:
            return outputs
        assert len(asked) == len(runs), "some ranks ended while others wait in a collective"
        assert len({(str(target), args[-1]) for target, args in asked}) == 1, "ranks are in different collectives"
        target, group = asked[0][0], asked[0][1][-1]
        for members in _groups(ranks, group):
            results = _COLLECTIVES[target]([asked[member][1] for member in members])
            for member, result in zip(members, results, strict=True):
                waiting[member] = result


def _run(gm: fx.GraphModule, inputs: Sequence[Any]) -> Generator[Collective, Any, Any]:
    environment: dict[fx.Node, Any] = {}
    last_reader = {source: node for node in gm.graph.nodes for source in node.all_input_nodes}
    values = iter(inputs)
    outside = _autocast_state()
    for node in gm.graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), environment.__getitem__)
        if node.op == "placeholder":
            environment[node] = next(values)
        elif node.op == "get_attr":
            environment[node] = getattr(gm, node.target)
        elif node.op == "output":
            return args[0]
        elif node.target is c10d.wait_tensor.default:
            environment[node] = args[0]
        elif node.op == "call_module":
            environment[node] = yield from _run(gm.get_submodule(node.target), args)
        elif node.target is COND:
            hit, reuse, compute, operands = args
            environment[node] = yield from _run(reuse if hit else compute, operands)
        elif node.target in _COLLECTIVES:
            mine = _autocast_state()
            _set_autocast(outside)
            environment[node] = yield node.target, args
            outside = _autocast_state()
            _set_autocast(mine)
        else:
            environment[node] = node.target(*args, **kwargs)
        for source in node.all_input_nodes:
            if last_reader[source] is node:
                del environment[source]
        del args, kwargs
    raise AssertionError("a graph without an output")


_Autocast = tuple[bool, torch.dtype, bool]


def _autocast_state() -> _Autocast:
    """Autocast belongs to the thread, which the ranks share: each takes its own along when it goes on."""
    return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()


def _set_autocast(state: _Autocast) -> None:
    enabled, dtype, caches = state
    torch.set_autocast_enabled("cpu", enabled)
    torch.set_autocast_dtype("cpu", dtype)
    torch.set_autocast_cache_enabled(caches)


def _groups(ranks: Sequence[Ranks], group: str) -> list[list[int]]:
    """The members of each group of this name, in the order of their ranks in it."""
    apart = {
        "ulysses": lambda rank: (rank.batch.rank, rank.ring.rank),
        "ring": lambda rank: (rank.batch.rank, rank.ulysses.rank),
        "sequence": lambda rank: rank.batch.rank,
        "batch": lambda rank: rank.sequence_rank,
        "all": lambda rank: 0,
    }[group]
    groups: dict[Any, list[int]] = {}
    for number, rank in enumerate(ranks):
        groups.setdefault(apart(rank), []).append(number)
    return list(groups.values())


def _all_to_all(arguments: list[Any]) -> list[torch.Tensor]:
    sent = [buffer.split(sizes) for buffer, _, sizes, _ in arguments]
    received = [torch.cat([parts[rank] for parts in sent]) for rank in range(len(arguments))]
    for rank, (_, arriving, _, _) in enumerate(arguments):
        assert [len(parts[rank]) for parts in sent] == arriving
    return received


def _all_gather(arguments: list[Any]) -> list[torch.Tensor]:
    gathered = torch.cat([buffer for buffer, _, _ in arguments])
    assert len({buffer.shape for buffer, _, _ in arguments}) == 1
    return [gathered.clone() for _ in arguments]


def _all_reduce(arguments: list[Any]) -> list[torch.Tensor]:
    (operation,) = {operation for _, operation, _ in arguments}
    values = torch.stack([value for value, _, _ in arguments])
    total = {"sum": values.sum, "max": values.amax}[operation](0)
    return [total.clone() for _ in arguments]


_COLLECTIVES = {
    c10d.all_reduce.default: _all_reduce,
    c10d.all_to_all_single.default: _all_to_all,
    c10d.all_gather_into_tensor.default: _all_gather,
}
