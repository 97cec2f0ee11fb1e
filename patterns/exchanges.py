"""Collectives in a graph: where one is started, and where its result is waited for."""

from __future__ import annotations

import torch
from torch import fx


def is_collective(node: fx.Node) -> bool:
    """Whether the node starts a collective."""
    name = str(node.target)
    return name.startswith("_c10d_functional.") and not is_wait(node)


def is_wait(node: fx.Node) -> bool:
    return node.target is torch.ops._c10d_functional.wait_tensor.default
