"""The collectives of a compiled graph: the one place that says how they are spelled.

Each takes `call(operator, *arguments)`. Given a function that runs the operator it computes; given one that appends a
node it writes the graph. Each is a `_c10d_functional` operator with its own `wait_tensor`, so that the two can be moved
apart and Inductor can order them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

__all__ = ["Call", "all_gather", "all_reduce", "all_to_all"]

c10d = torch.ops._c10d_functional


class Call(Protocol):
    """Applies an operator to arguments: runs it, or writes it into a graph."""

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Any: ...


def all_gather(call: Call, x: Any, ranks: int, group: str) -> Any:
    """The ranks' contiguous tensors of one shape, one behind the other along dimension 0."""
    return _awaited(call, c10d.all_gather_into_tensor.default, x, ranks, group)


def all_reduce(call: Call, x: Any, operation: str, group: str) -> Any:
    """The sum (or what `operation` says) of the ranks' tensors of one shape."""
    return _awaited(call, c10d.all_reduce.default, x, operation, group)


def all_to_all(call: Call, x: Any, arriving: Sequence[int], sent: Sequence[int], group: str) -> Any:
    """Slices of a contiguous tensor's dimension 0, one to each rank; what arrives is one behind the other.

    args:
        arriving, sent: the lengths of the slices by rank.
    """
    return _awaited(call, c10d.all_to_all_single.default, x, list(arriving), list(sent), group)


def _awaited(call: Call, target: Any, *args: Any) -> Any:
    return call(c10d.wait_tensor.default, call(target, *args))
