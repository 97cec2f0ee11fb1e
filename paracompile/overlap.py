"""Inductor's settings for a sharded graph: the order that `schedule` gave it, kept.

The graph comes in the order wanted: starts early, waits late, the same collectives in the same order on every rank.
Inductor would undo it (seen with torch 2.13, in the code that it writes for GPUs):

- its passes for locality and for peak memory move work to where its value is read or freed, so that nothing is left to
  run under an exchange: off;
- its passes for communication: "sink_waits_iterative" lets a ring inside Ulysses wait for the next keys before the
  attention on the present ones, and "reorder_communication_preserving_peak_memory" may exchange collectives with each
  other by this rank's memory, so that ranks with uneven shares could meet in different ones: off;
- horizontal fusion makes one kernel of k's and q's last steps, so that k's exchange starts only when q is there:
  `KeepOrder` says that a matrix product comes after the exchanges that were started before it.
"""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import fx

from paracompile.patterns.exchanges import is_collective
from paracompile.torch_private import OrderedSet
from paracompile.torch_private.compilers import CustomGraphPass, preserve_node_ordering

aten = torch.ops.aten

_PRODUCTS = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default}


class KeepOrder(CustomGraphPass):
    """Makes each matrix product depend on the exchanges that were started before it."""

    def __call__(self, graph: fx.Graph) -> None:
        dependencies: dict[fx.Node, OrderedSet[fx.Node]] = {}
        started: OrderedSet[fx.Node] = OrderedSet()
        for node in graph.nodes:
            if is_collective(node):
                started.add(node)
            elif node.target in _PRODUCTS and started:
                dependencies[node] = started
                started = OrderedSet()
        preserve_node_ordering(graph, dependencies)

    def uuid(self) -> Any:
        """Says to Inductor's caches that another version of this pass makes other code."""
        return hashlib.sha256(inspect.getsource(KeepOrder).encode()).hexdigest()


def inductor_settings() -> dict[str, Any]:
    """Patches of Inductor's configuration for a sharded graph."""
    return {
        "reorder_for_locality": False,
        "reorder_for_peak_memory": False,
        "reorder_for_compute_comm_overlap": False,
        "post_grad_custom_post_pass": KeepOrder(),
    }
